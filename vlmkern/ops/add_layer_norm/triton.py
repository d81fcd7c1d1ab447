"""Residual sum and layer norm on GPUs: the Triton kernels of `vlmkern.kernels.add_layer_norm`."""

from __future__ import annotations

from torch import Tensor

from ...dispatch.targets import Target
from ...kernels.add_layer_norm import norm as kernels
from .problem import AddLayerNorm, AddLayerNormGradient


def supports(p: AddLayerNorm, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return _supports(p.x)


def supports_bwd(p: AddLayerNormGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return _supports(p.summed)


def add_layer_norm(p: AddLayerNorm) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    normed, summed = kernels.add_layer_norm_fwd(*p)
    return normed, p.x.new_empty(0) if summed is None else summed


def add_layer_norm_bwd(p: AddLayerNormGradient) -> list[Tensor]:
    """See reference.py."""
    parameters = any(p.wanted[1:])
    d_x, *shares = kernels.add_layer_norm_bwd(p.grad, p.grad_summed, p.summed, p.weight, p.eps, parameters)
    found = (d_x, *(None if share is None else share.to(p.summed.dtype) for share in shares))
    return [x for x, want in zip(found, p.wanted, strict=True) if want]


def _supports(x: Tensor) -> str | None:
    if x.dtype in kernels.DTYPES and 0 < x.shape[-1] <= kernels.MAX_COLS:
        return None
    return (
        f"it has no kernel for {x.shape[-1]} columns of {x.dtype}; it takes up to {kernels.MAX_COLS} in float32,"
        " bfloat16 and float16"
    )
