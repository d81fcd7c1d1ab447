"""RMS norm on CPU, by the C++ kernels of ops/_norms.py."""

from __future__ import annotations

from torch import Tensor

from ...dispatch.extension import lacks
from ...dispatch.targets import Target
from .. import _norms
from .problem import RMSNorm, RMSNormGradient


def supports(p: RMSNorm, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.x.dtype)


def supports_bwd(p: RMSNormGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.summed.dtype)


def rms_norm(p: RMSNorm) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    return _norms.norm(p.x, p.residual, p.weight, None, p.eps, p.offset, centred=False)


def rms_norm_bwd(p: RMSNormGradient) -> list[Tensor]:
    """See reference.py."""
    return _norms.norm_bwd(p.grad, p.grad_summed, p.summed, p.weight, p.eps, p.offset, p.wanted, centred=False)
