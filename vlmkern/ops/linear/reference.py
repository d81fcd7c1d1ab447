"""Linear layer with an epilogue: y = act(x W^T + bias) + residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Linear, LinearGradient


def linear(p: Linear) -> Tensor:
    """x [..., C], weight [E, C], bias [E], residual [..., E] -> [..., E]."""
    x, weight, bias, activation, residual = p
    y = F.linear(x, weight, bias)
    if activation == "silu":
        y = F.silu(y)
    elif activation != "none":
        y = F.gelu(y, approximate=_gelu(activation))
    return y if residual is None else y + residual


def linear_bwd(p: LinearGradient) -> list[Tensor]:
    """Gradients by (x, weight, bias, residual), those that are wanted, in this order: with z = x W^T + bias,
    dz = act'(z) * dy, dx = dz W, dW = dz^T x, dbias = sum dz and dresidual = dy."""
    grad, x, weight, bias, activation, wanted = p
    rows = grad.shape[:-1].numel()
    dy, x_rows = grad.reshape(rows, grad.shape[-1]), x.reshape(rows, x.shape[-1])
    dz = dy = dy.contiguous()  # torch's gradient of gelu refuses rows that overlap
    if activation == "silu":
        dz = torch.ops.aten.silu_backward(dy, F.linear(x_rows, weight, bias))
    elif activation != "none":
        dz = torch.ops.aten.gelu_backward(dy, F.linear(x_rows, weight, bias), approximate=_gelu(activation))
    every = ((dz @ weight).view(x.shape), dz.mT @ x_rows, dz.sum(0), grad.clone(memory_format=torch.contiguous_format))
    return [gradient for gradient, want in zip(every, wanted, strict=True) if want]


def _gelu(activation: str) -> str:
    return {"gelu_tanh": "tanh", "gelu": "none"}[activation]
