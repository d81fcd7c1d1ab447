"""Linear layer with an epilogue: y = act(x W^T + b) + residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu_tanh", "gelu", "silu")


def activate(x: Tensor, activation: str) -> Tensor:
    """Applies an activation of `ACTIVATIONS`."""
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate=_approximation(activation))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """x [..., C], weight [E, C], bias [E], residual [..., E] -> [..., E]."""
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def linear_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    wanted: list[bool],
    *,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> list[Tensor]:
    """Gradients by (x, weight, bias, residual), those that are wanted, in this order. The layer's value before the
    activation is recomputed, so the forward keeps nothing but its inputs. Backends may compute the products, all
    of the form a b^T + c, in their own way."""
    rows, d_out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    want_x, want_weight, want_bias, want_residual = wanted
    d_linear = d_out
    if activation != "none" and (want_x or want_weight or want_bias):
        before = product(rows, weight, bias)
        if activation == "silu":
            d_linear = torch.ops.aten.silu_backward(d_out, before)
        else:
            d_linear = torch.ops.aten.gelu_backward(d_out, before, approximate=_approximation(activation))
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


def _approximation(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
