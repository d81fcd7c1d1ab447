"""Residual sum and layer norm: summed = x + residual, normed = (summed - mean) / sqrt(variance + eps) * weight + bias.

Ba, Kiros and Hinton, "Layer Normalization" (2016).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import AddLayerNorm, AddLayerNormGradient


def add_layer_norm(p: AddLayerNorm) -> tuple[Tensor, Tensor]:
    """x and residual [..., C], weight and bias [C] -> normed and summed [..., C]; without residual, [0] for the sum."""
    x, residual, weight, bias, eps = p
    summed = x if residual is None else (x + residual).contiguous()
    normed = F.layer_norm(summed, x.shape[-1:], weight, bias, eps).contiguous()
    return normed, x.new_empty(0) if residual is None else summed


def add_layer_norm_bwd(p: AddLayerNormGradient) -> list[Tensor]:
    """Gradients by (x or residual, which are the same, weight, bias), those that are wanted, in this order. The
    statistics are computed again from `summed`."""
    grad, grad_summed, summed, weight, bias, eps, wanted = p
    aten, size = torch.ops.aten, summed.shape[-1:]
    _, mean, scale = aten.native_layer_norm(summed, size, weight, bias, eps)
    grads = aten.native_layer_norm_backward(grad, summed, size, mean, scale, weight, bias, wanted)
    d_x, d_weight, d_bias = (x.contiguous() if want else None for x, want in zip(grads, wanted, strict=True))
    if d_x is not None and grad_summed is not None:
        d_x = d_x + grad_summed
    return [x for x in (d_x, d_weight, d_bias) if x is not None]
