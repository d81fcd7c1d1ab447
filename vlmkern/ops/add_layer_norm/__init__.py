"""`vlmkern::add_layer_norm`: residual sum and layer norm in one. The maths is in reference.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ...dispatch import checks, choice, library
from . import native, reference
from .problem import AddLayerNorm, AddLayerNormGradient


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`layer_norm(x + residual)` over the last dimension, and the sum: from one half of a pre-norm block to the next.

    Args:
        x: [..., C], any strides. float32, bfloat16, float16 or float64.
        residual: [..., C], of x's shape, or None.
        weight: [C] or None, for ones.
        bias: [C] or None, for zeros.
        eps: added to the variance.

    Returns:
        normed: [..., C], dense, dtype of `x`; mean and variance are those of the sum as rounded to that dtype,
            computed in float32, or in float64 for float64.
        summed: x + residual, [..., C], dense, dtype of `x`; without residual, `x` itself.

    Raises:
        ValueError: shapes that do not fit together, or tensors on different devices.
        TypeError: dtypes that differ from that of `x`, or are not floating point.

    Under autocast all tensors are cast like those of a linear layer, since the sum is the next one's residual.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    normed, summed = _op(x, residual, weight, bias, eps, choice.requested())
    # an op's result must not be its argument, so the op has no sum to give here
    return normed, x if residual is None else summed


def _check(p: AddLayerNorm) -> None:
    x = p.x
    checks.float_tensor("x", x)
    checks.value(x.dim() >= 1, lambda: f"x: got shape {list(x.shape)}, expected [..., C]")
    for name, tensor, shape, layout in (
        ("residual", p.residual, x.shape, "[..., C] like x"),
        ("weight", p.weight, x.shape[-1:], "[C]"),
        ("bias", p.bias, x.shape[-1:], "[C]"),
    ):
        if tensor is not None:
            checks.shape(name, tensor, shape, layout)
            checks.like(name, tensor, "x", x)


def _check_bwd(p: AddLayerNormGradient) -> None:
    # under the names that this op has for them
    checks.float_tensor("summed", p.summed)
    _check(p.forward)
    checks.same_as("grad", p.grad, "summed", p.summed, "[..., C]")
    if p.grad_summed is not None:
        checks.same_as("grad_summed", p.grad_summed, "summed", p.summed, "[..., C]")
    checks.wanted(p.wanted, 3)


def _fake(p: AddLayerNorm) -> tuple[Tensor, Tensor]:
    return p.x.new_empty(p.x.shape), p.x.new_empty(0 if p.residual is None else p.x.shape)


def _fake_bwd(p: AddLayerNormGradient) -> list[Tensor]:
    summed = p.summed
    shapes = (summed.shape, summed.shape[-1:], summed.shape[-1:])
    return [summed.new_empty(shape) for shape, want in zip(shapes, p.wanted, strict=True) if want]


def _setup_context(ctx: Any, p: AddLayerNorm, output: tuple[Tensor, Tensor]) -> None:
    ctx.eps, ctx.has_sum = p.eps, p.residual is not None
    # zeros in place of a gradient that nobody asked for would be one more tensor to write and read
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.has_sum else p.x, p.weight, p.bias)


def _backward(
    ctx: Any, needed: tuple[bool, ...], grad: Tensor | None, grad_summed: Tensor | None
) -> tuple[Tensor | None, ...]:
    of_x, of_residual, of_weight, of_bias, _ = needed
    if not ctx.has_sum:
        grad_summed = None
    if grad is None:
        d_x, d_weight, d_bias = grad_summed, None, None
    else:
        wanted = [of_x or of_residual, of_weight, of_bias]
        grads = iter(_op_bwd(grad, grad_summed, *ctx.saved_tensors, ctx.eps, wanted, ctx.backend))
        d_x, d_weight, d_bias = (next(grads) if want else None for want in wanted)
    return d_x if of_x else None, d_x if of_residual else None, d_weight, d_bias, None


def _triton() -> ModuleType:
    from . import triton

    return triton


_op, _op_bwd = library.define_with_gradient(
    "add_layer_norm",
    library.Form(AddLayerNorm, "(Tensor normed, Tensor summed)", _check, _fake),
    library.Form(AddLayerNormGradient, "Tensor[]", _check_bwd, _fake_bwd),
    providers={"reference": reference, "native": native, "triton": _triton},
    setup_context=_setup_context,
    backward=_backward,
)
