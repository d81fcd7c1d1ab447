"""Residual sum and RMS norm: summed = x + residual, normed = summed / sqrt(mean(summed^2) + eps) * (weight + offset).

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import RMSNorm, RMSNormGradient


def rms_norm(p: RMSNorm) -> tuple[Tensor, Tensor]:
    """x and residual [..., C], weight [C] -> normed and summed [..., C]; without residual, [0] for the sum."""
    x, weight, residual, eps, offset = p
    summed = x if residual is None else (x + residual).contiguous()
    rows, _ = _normed(summed, eps)
    normed = (rows * (_wide(weight) + offset)).to(x.dtype).contiguous()
    return normed, x.new_empty(0) if residual is None else summed


def rms_norm_bwd(p: RMSNormGradient) -> list[Tensor]:
    """Gradients by (x or residual, which are the same, weight), those that are wanted, in this order. The statistics
    are computed again from `summed`."""
    rows, scale = _normed(p.summed, p.eps)
    grad = _wide(p.grad)
    weighted = grad * (_wide(p.weight) + p.offset)
    d_x = (weighted - rows * (weighted * rows).mean(-1, keepdim=True)) * scale
    if p.grad_summed is not None:
        d_x = d_x + p.grad_summed
    d_weight = (grad * rows).flatten(0, -2).sum(0) if rows.dim() > 1 else grad * rows
    found = (d_x, d_weight)
    return [t.to(p.summed.dtype).contiguous() for t, want in zip(found, p.wanted, strict=True) if want]


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of mean square 1, and the inverse of what its root was."""
    x = _wide(x)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def _wide(x: Tensor) -> Tensor:
    """What is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
