"""`vlmkern::add_layer_norm`: residual sum and layer norm in one. The maths is in `vlmkern.reference.add_layer_norm`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _backends
from ..reference import add_layer_norm as reference
from . import _checks, _library


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
    normed, summed = _op(x, residual, weight, bias, eps, _backends.requested())
    # an op's result must not be its argument, so the op has no sum to give here
    return normed, x if residual is None else summed


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    _checks.float_tensor("x", x)
    _checks.value(x.dim() >= 1, lambda: f"x: got shape {list(x.shape)}, expected [..., C]")
    for name, tensor, shape, layout in (
        ("residual", residual, x.shape, "[..., C] like x"),
        ("weight", weight, x.shape[-1:], "[C]"),
        ("bias", bias, x.shape[-1:], "[C]"),
    ):
        if tensor is not None:
            _checks.shape(name, tensor, shape, layout)
            _checks.like(name, tensor, "x", x)


def _check_bwd(
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    wanted: list[bool],
) -> None:
    _check(summed, None, weight, bias, eps)
    _checks.twin("grad", grad, "summed", summed, "[..., C]")
    if grad_summed is not None:
        _checks.twin("grad_summed", grad_summed, "summed", summed, "[..., C]")
    _checks.wanted(wanted, 3)


def _fake(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _fake_bwd(
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    shapes = (summed.shape, summed.shape[-1:], summed.shape[-1:])
    return [summed.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.eps = inputs
    ctx.has_sum = residual is not None
    # zeros in place of a gradient that nobody asked for would be one more tensor to write and read
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.has_sum else x, weight, bias)


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


_op = _library.define(
    "add_layer_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor normed, Tensor summed)",
    check=_check,
    fake=_fake,
    implementations={
        "reference": reference.add_layer_norm,
        "triton": _library.lazy("gpu.add_layer_norm", "add_layer_norm"),
    },
)
_op_bwd = _library.define(
    "add_layer_norm_bwd",
    "(Tensor grad, Tensor? grad_summed, Tensor summed, Tensor? weight, Tensor? bias, float eps, bool[] wanted)"
    " -> Tensor[]",
    check=_check_bwd,
    fake=_fake_bwd,
    backward=True,
    implementations={
        "reference": reference.add_layer_norm_bwd,
        "triton": _library.lazy("gpu.add_layer_norm", "add_layer_norm_bwd"),
    },
)
_library.differentiable(_op, setup_context=_setup_context, backward=_backward)
_library.not_differentiable(_op_bwd)
_library.autocast(_op)
