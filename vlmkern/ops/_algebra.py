"""Products, activations and gradients that several backends compute alike: each puts its own kernels in their place.

The reference has formulas of its own, so that it can judge these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu_tanh", "gelu", "quick_gelu", "silu")
"""What `ops.linear` takes as `activation`."""

STEEPNESS = 1.702
"""Of quick GELU, x * sigmoid(1.702 x): Hendrycks and Gimpel (2016), section 2."""

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""a b^T + c of matrices [M, K] and [N, K] and a vector [N] or None."""


def activate(x: Tensor, activation: str) -> Tensor:
    """Applies an activation of `ACTIVATIONS`."""
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    if activation == "quick_gelu":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.sigmoid(STEEPNESS * wide)).to(x.dtype)
    return F.gelu(x, approximate=_approximation(activation))


def activate_(x: Tensor, activation: str) -> Tensor:
    """`activate` in place: a result need not be mapped into memory twice."""
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x, inplace=True)
    if activation == "quick_gelu":
        return x.copy_(activate(x, activation))
    return torch.ops.aten.gelu_(x, approximate=_approximation(activation))


def activate_bwd(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """The gradient by what an activation other than "none" was applied to."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, before)
    if activation == "quick_gelu":
        # silu(c x) / c has the slope that silu has at c x, which is finite where x is
        wide = torch.promote_types(grad.dtype, torch.float32)
        most = torch.finfo(wide).max
        steep = (STEEPNESS * before.to(wide)).clamp_(-most, most)
        return torch.ops.aten.silu_backward(grad.to(wide), steep).to(grad.dtype)
    return torch.ops.aten.gelu_backward(grad, before, approximate=_approximation(activation))


def as_rows(x: Tensor) -> Tensor:
    """[..., C] -> [M, C], also where there are no elements and a shape of -1 could be anything."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """Of attention's log-sum-exp: [B, H, N] for [B, N, H, D], [H, T] for packed [T, H, D]."""
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def linear_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    wanted: list[bool],
    before: Tensor | None = None,
    *,
    product: Product = F.linear,
) -> list[Tensor]:
    """Gradients of `ops.linear` by (x, weight, bias, residual), those that are wanted, in this order. The layer's value
    before the activation is computed again where the forward did not keep it."""
    rows, d_out = as_rows(x), as_rows(grad)
    want_x, want_weight, want_bias, want_residual = wanted
    d_linear = d_out
    if activation != "none" and (want_x or want_weight or want_bias):
        before = product(rows, weight, bias) if before is None else before.reshape(d_out.shape)
        d_out = d_out.contiguous()  # torch's gradient of gelu refuses rows that overlap
        d_linear = activate_bwd(d_out, before, activation)
    grads: list[Tensor] = []
    if want_x:
        grads.append(product(d_linear, weight.T, None).view(x.shape))
    if want_weight:
        grads.append(product(d_linear.T, rows.T, None))
    if want_bias:
        grads.append(d_linear.sum(0))
    if want_residual:
        # a copy: an op's result must not share memory with its arguments
        grads.append(grad.clone(memory_format=torch.contiguous_format))
    return grads


def swiglu_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    *,
    silu_mul: Callable[[Tensor], Tensor],
    product: Product = F.linear,
) -> Tensor:
    """The MLP as two products with `silu_mul` between them, [M, 2F] -> [M, F]."""
    return swiglu_mlp_keep(x, w_up, w_down, b_up, b_down, silu_mul=silu_mul, product=product)[0]


def swiglu_mlp_keep(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    *,
    silu_mul: Callable[[Tensor], Tensor],
    product: Product = F.linear,
) -> tuple[Tensor, Tensor]:
    """The same, and the up-projection, [..., 2F]."""
    up = product(as_rows(x), w_up, b_up)
    y = product(silu_mul(up), w_down, b_down)
    return y.view(*x.shape[:-1], len(w_down)), up.view(*x.shape[:-1], len(w_up))


def swiglu_mlp_bwd(
    grad: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    wanted: list[bool],
    up: Tensor | None = None,
    *,
    silu_mul_bwd: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    product: Product = F.linear,
) -> list[Tensor]:
    """Gradients of `ops.swiglu_mlp` by (x, w_up, w_down, b_up, b_down), those that are wanted, in this order. The
    up-projection is computed again where the forward did not keep it. `silu_mul_bwd` takes the gradient [M, F] and the
    up-projection [M, 2F], and gives the gradient of the latter and the hidden values again."""
    rows, d_out = as_rows(x), as_rows(grad)
    want_x, want_w_up, want_w_down, want_b_up, want_b_down = wanted
    grads: list[Tensor] = []
    if want_x or want_w_up or want_w_down or want_b_up:
        up = product(rows, w_up, b_up) if up is None else up.reshape(len(rows), len(w_up)).contiguous()
        d_up, hidden = silu_mul_bwd(product(d_out, w_down.T, None), up)
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


def _approximation(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
