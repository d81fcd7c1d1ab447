"""SwiGLU MLP: y = (silu(gate) * value) W_down^T + b_down with [value | gate] = x W_up^T + b_up.

Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import SwiGLU, SwiGLUGradient


def swiglu_mlp(p: SwiGLU) -> Tensor:
    """x [..., C], w_up [2F, C], w_down [E, F], b_up [2F], b_down [E] -> [..., E]."""
    return swiglu_mlp_keep(p)[0]


def swiglu_mlp_keep(p: SwiGLU) -> tuple[Tensor, Tensor]:
    """The same, and the up-projection, [..., 2F]."""
    x, w_up, w_down, b_up, b_down = p
    up = F.linear(x, w_up, b_up)
    value, gate = up.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, w_down, b_down), up


def swiglu_mlp_bwd(p: SwiGLUGradient) -> list[Tensor]:
    """Gradients by (x, w_up, w_down, b_up, b_down), those that are wanted, in this order. With h = silu(gate) * value:
    dh = dy W_down, dvalue = dh * silu(gate), dgate = dh * value * silu'(gate)."""
    grad, x, w_up, w_down, b_up, wanted, up = p
    rows = grad.shape[:-1].numel()
    dy, x_rows = grad.reshape(rows, grad.shape[-1]), x.reshape(rows, x.shape[-1])
    up = F.linear(x_rows, w_up, b_up) if up is None else up.reshape(rows, up.shape[-1])
    value, gate = up.chunk(2, dim=-1)
    activated = F.silu(gate)
    dh = dy @ w_down
    d_up = torch.cat([dh * activated, torch.ops.aten.silu_backward(dh * value, gate)], dim=-1)
    every = (
        (d_up @ w_up).view(x.shape),
        d_up.mT @ x_rows,
        dy.mT @ (activated * value),
        d_up.sum(0),
        dy.sum(0),
    )
    return [gradient for gradient, want in zip(every, wanted, strict=True) if want]
