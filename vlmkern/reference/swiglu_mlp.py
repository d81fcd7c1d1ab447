"""SwiGLU MLP: y = (silu(gate) * value) W_down^T + b_down with [value | gate] = x W_up^T + b_up.

Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_mul(up: Tensor) -> Tensor:
    """[..., 2F] = [value | gate] -> silu(gate) * value, [..., F]."""
    value, gate = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def silu_mul_bwd(grad: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `silu_mul` by `up`, [..., 2F], and its recomputed output, [..., F]."""
    value, gate = up.chunk(2, dim=-1)
    sigmoid, activated = torch.sigmoid(gate), F.silu(gate)
    d_value = grad * activated
    d_gate = grad * value * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_value, d_gate], dim=-1), activated * value


def swiglu_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    *,
    silu_mul: Callable[[Tensor], Tensor] = silu_mul,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """The formula, with its parts left open: backends put their kernels in their place."""
    return linear(silu_mul(linear(x, w_up, b_up)), w_down, b_down)


def swiglu_mlp_bwd(
    grad: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    wanted: list[bool],
    *,
    silu_mul_bwd: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = silu_mul_bwd,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> list[Tensor]:
    """Gradients by (x, w_up, w_down, b_up, b_down), those that are wanted, in this order. The
    up-projection is recomputed, so the forward keeps nothing but its inputs. `product` is a b^T + c."""
    rows, d_out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    want_x, want_w_up, want_w_down, want_b_up, want_b_down = wanted
    grads: list[Tensor] = []
    if want_x or want_w_up or want_w_down or want_b_up:
        d_up, hidden = silu_mul_bwd(product(d_out, w_down.T, None), product(rows, w_up, b_up))
        if want_x:
            grads.append(product(d_up, w_up.T, None).view(x.shape))
        if want_w_up:
            grads.append(product(d_up.T, rows.T, None))
        if want_w_down:
            grads.append(product(d_out.T, hidden.T, None))
        if want_b_up:
            grads.append(d_up.sum(0))
    if want_b_down:
        grads.append(d_out.sum(0))
    return grads
