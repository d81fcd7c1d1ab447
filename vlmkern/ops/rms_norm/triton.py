"""Residual sum and RMS norm on GPUs: the Triton kernels of `vlmkern.kernels.rms_norm`."""

from __future__ import annotations

from torch import Tensor

from ...dispatch.targets import Target
from ...kernels.rms_norm import norm as kernels
from .problem import RMSNorm, RMSNormGradient


def supports(p: RMSNorm, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return _supports(p.x)


def supports_bwd(p: RMSNormGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return _supports(p.summed)


def rms_norm(p: RMSNorm) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    normed, summed = kernels.rms_norm_fwd(*p)
    return normed, p.x.new_empty(0) if summed is None else summed


def rms_norm_bwd(p: RMSNormGradient) -> list[Tensor]:
    """See reference.py."""
    d_x, share = kernels.rms_norm_bwd(p.grad, p.grad_summed, p.summed, p.weight, p.eps, p.offset, p.wanted[1])
    found = (d_x, None if share is None else share.to(p.summed.dtype))
    return [x for x, want in zip(found, p.wanted, strict=True) if want]


def _supports(x: Tensor) -> str | None:
    if x.dtype in kernels.DTYPES and 0 < x.shape[-1] <= kernels.MAX_COLS and x.shape[:-1].numel() <= kernels.MAX_ROWS:
        return None
    return (
        f"it has no kernel for {x.shape[:-1].numel()} rows of {x.shape[-1]} columns of {x.dtype}; it takes up to"
        f" {kernels.MAX_ROWS} of up to {kernels.MAX_COLS} in float32, bfloat16 and float16"
    )
