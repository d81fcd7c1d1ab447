"""Residual sum and layer norm on CPU, by the C++ kernels of ops/_norms.py."""

from __future__ import annotations

from torch import Tensor

from ...dispatch.extension import lacks
from ...dispatch.targets import Target
from .. import _norms
from .problem import AddLayerNorm, AddLayerNormGradient


def supports(p: AddLayerNorm, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.x.dtype)


def supports_bwd(p: AddLayerNormGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.summed.dtype)


def add_layer_norm(p: AddLayerNorm) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    return _norms.norm(*p, offset=0.0, centred=True)


def add_layer_norm_bwd(p: AddLayerNormGradient) -> list[Tensor]:
    """See reference.py."""
    return _norms.norm_bwd(p.grad, p.grad_summed, p.summed, p.weight, p.eps, 0.0, p.wanted, centred=True)
