"""`vlmkern::rms_norm`: residual sum and RMS norm in one. The maths is in reference.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ...dispatch import checks, choice, library
from . import native, reference
from .problem import RMSNorm, RMSNormGradient


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)` over the last dimension, of x or of x + residual.

    Args:
        x: [..., C], any strides; views as q of a fused projection, [B, N, H, D], are read in place. float32, bfloat16,
            float16 or float64.
        weight: [C].
        residual: [..., C], of x's shape, or None.
        eps: added to the mean square.
        offset: added to the weight, in float32: 1 for Gemma, whose weights are stored as what they differ from 1 by.

    Returns:
        normed: [..., C], dense, dtype of `x`; the mean square is that of the sum as rounded to that dtype. All is
            computed in float32, or in float64 for float64, and rounded once. Llama and Qwen in transformers round
            before they multiply by the weight too, which this leaves out.
        summed: only with residual: x + residual, [..., C], dense, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or tensors on different devices.
        TypeError: dtypes that differ from that of `x`, or are not floating point.

    Under autocast all tensors are cast like those of a linear layer, since the sum is the next one's residual.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    normed, summed = _op(x, weight, residual, eps, offset, choice.requested())
    return normed if residual is None else (normed, summed)


def _check(p: RMSNorm) -> None:
    x = p.x
    checks.float_tensor("x", x)
    checks.value(x.dim() >= 1, lambda: f"x: got shape {list(x.shape)}, expected [..., C]")
    checks.shape("weight", p.weight, x.shape[-1:], "[C]")
    checks.like("weight", p.weight, "x", x)
    if p.residual is not None:
        checks.same_as("residual", p.residual, "x", x, "[..., C]")


def _check_bwd(p: RMSNormGradient) -> None:
    # under the names that this op has for them
    checks.float_tensor("summed", p.summed)
    _check(p.forward)
    checks.same_as("grad", p.grad, "summed", p.summed, "[..., C]")
    if p.grad_summed is not None:
        checks.same_as("grad_summed", p.grad_summed, "summed", p.summed, "[..., C]")
    checks.wanted(p.wanted, 2)


def _fake(p: RMSNorm) -> tuple[Tensor, Tensor]:
    return p.x.new_empty(p.x.shape), p.x.new_empty(0 if p.residual is None else p.x.shape)


def _fake_bwd(p: RMSNormGradient) -> list[Tensor]:
    shapes = (p.summed.shape, p.summed.shape[-1:])
    return [p.summed.new_empty(shape) for shape, want in zip(shapes, p.wanted, strict=True) if want]


def _setup_context(ctx: Any, p: RMSNorm, output: tuple[Tensor, Tensor]) -> None:
    ctx.eps, ctx.offset, ctx.has_sum = p.eps, p.offset, p.residual is not None
    # zeros in place of a gradient that nobody asked for would be one more tensor to write and read
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.has_sum else p.x, p.weight)


def _backward(
    ctx: Any, needed: tuple[bool, ...], grad: Tensor | None, grad_summed: Tensor | None
) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_residual, *_ = needed
    if not ctx.has_sum:
        grad_summed = None
    if grad is None:
        d_x, d_weight = grad_summed, None
    else:
        wanted = [of_x or of_residual, of_weight]
        grads = iter(_op_bwd(grad, grad_summed, *ctx.saved_tensors, ctx.eps, ctx.offset, wanted, ctx.backend))
        d_x, d_weight = (next(grads) if want else None for want in wanted)
    return d_x if of_x else None, d_weight, d_x if of_residual else None, None, None


def _triton() -> ModuleType:
    from . import triton

    return triton


_op, _op_bwd = library.define_with_gradient(
    "rms_norm",
    library.Form(RMSNorm, "(Tensor normed, Tensor summed)", _check, _fake),
    library.Form(RMSNormGradient, "Tensor[]", _check_bwd, _fake_bwd),
    providers={"reference": reference, "native": native, "triton": _triton},
    setup_context=_setup_context,
    backward=_backward,
)
