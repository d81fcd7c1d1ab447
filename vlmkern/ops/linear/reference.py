"""Linear layer with an epilogue: y = act(x W^T + bias) + residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Linear, LinearGradient


def linear(p: Linear) -> Tensor:
    """x [..., C], weight [E, C], bias [E], residual [..., E] -> [..., E]."""
    return linear_keep(p)[0]


def linear_keep(p: Linear) -> tuple[Tensor, Tensor]:
    """The same, and what the activation was applied to, [..., E]."""
    x, weight, bias, activation, residual = p
    y = before = F.linear(x, weight, bias)
    if activation == "silu":
        y = F.silu(y)
    elif activation == "quick_gelu":
        wide = _wide(y)
        y = (wide * torch.sigmoid(1.702 * wide)).to(y.dtype)
    elif activation != "none":
        y = F.gelu(y, approximate=_gelu(activation))
    if residual is not None:
        y = y + residual
    # results of an op must not share memory
    return y, before.clone() if y is before else before


def linear_bwd(p: LinearGradient) -> list[Tensor]:
    """Gradients by (x, weight, bias, residual), those that are wanted, in this order: with z = x W^T + bias,
    dz = act'(z) * dy, dx = dz W, dW = dz^T x, dbias = sum dz and dresidual = dy."""
    grad, x, weight, bias, activation, wanted, before = p
    rows = grad.shape[:-1].numel()
    dy, x_rows = grad.reshape(rows, grad.shape[-1]), x.reshape(rows, x.shape[-1])
    dz = dy = dy.contiguous()  # torch's gradient of gelu refuses rows that overlap
    if activation != "none":
        z = F.linear(x_rows, weight, bias) if before is None else before.reshape(dy.shape)
        if activation == "silu":
            dz = torch.ops.aten.silu_backward(dy, z)
        elif activation == "quick_gelu":
            sigmoid = torch.sigmoid(1.702 * _wide(z))
            dz = (_wide(dy) * (sigmoid + _wide(z) * (1.702 * sigmoid * (1 - sigmoid)))).to(dy.dtype)
        else:
            dz = torch.ops.aten.gelu_backward(dy, z, approximate=_gelu(activation))
    every = ((dz @ weight).view(x.shape), dz.mT @ x_rows, dz.sum(0), grad.clone(memory_format=torch.contiguous_format))
    return [gradient for gradient, want in zip(every, wanted, strict=True) if want]


def _wide(x: Tensor) -> Tensor:
    """What is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gelu(activation: str) -> str:
    return {"gelu_tanh": "tanh", "gelu": "none"}[activation]
