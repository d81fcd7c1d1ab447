"""The blocks of vision transformers over the ops, whoever owns the parameters: the modules of this package and those of
other people's models call the same functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops

Projection = tuple[Tensor, "Tensor | None"]
"""Weight [out, in] and bias [out] or None of a linear layer."""


def self_attention(
    x: Tensor,
    qkv: list[Projection],
    out: Projection,
    num_heads: int,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention with its projections: out(attention(q(x), k(x), v(x))) + residual.

    Args:
        x: [B, N, C], or packed [T, C] with `cu_seqlens` and `max_seqlen` (see `ops.attention`).
        qkv: one projection to 3*H*D with the rows of q, k and v one after the other, read in place, or three to H*D
            each (2 % slower on CPU, but nobody's weights have to be moved).
        out: H*D to C.
        num_heads: H.
        scale: factor on the scores; D ** -0.5 when None.
        residual: like x, or None.

    Returns:
        Like x.
    """
    if len(qkv) == 1:
        q, k, v = ops.linear(x, *qkv[0]).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    else:
        q, k, v = (ops.linear(x, *projection).unflatten(-1, (num_heads, -1)) for projection in qkv)
    attended = ops.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return ops.linear(attended.flatten(-2), *out, residual=residual)


def mlp(x: Tensor, up: Projection, down: Projection, activation: str, residual: Tensor | None = None) -> Tensor:
    """down(act(up(x))) + residual, for x and residual [..., C]; activations as in `ops.linear`."""
    return ops.linear(ops.linear(x, *up, activation=activation), *down, residual=residual)


def swiglu(x: Tensor, gate: Projection, value: Projection, down: Projection) -> Tensor:
    """down(silu(gate(x)) * value(x)) for x [..., C]: `ops.swiglu_mlp` for weights that are kept apart."""
    hidden = ops.linear(x, *gate, activation="silu") * ops.linear(x, *value)
    return ops.linear(hidden, *down)


def pre_norm_block(
    x: Tensor,
    attention_norm: nn.LayerNorm,
    attend: Callable[[Tensor, Tensor | None], Tensor],
    mlp_norm: nn.LayerNorm,
    feed_forward: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """x + attention(norm(x)), then x + mlp(norm(x)), for x [..., C].

    Under autocast the sums and norms are torch's, so that a float32 x stays float32 from block to block.

    Args:
        attend, feed_forward: of a normed input and a residual to add, or None for none.
    """
    # torch has no autocast for tensors without memory, on which work is counted
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        if torch.get_autocast_dtype(x.device.type) != x.dtype:
            # the ops would round the residual to their products' dtype
            x = x + attend(attention_norm(x), None)
            return x + feed_forward(mlp_norm(x), None)
    elif x.is_cuda:
        attended = attend(attention_norm(x), None)
        normed, x = ops.add_layer_norm(attended, x, mlp_norm.weight, mlp_norm.bias, eps=mlp_norm.eps)
        return feed_forward(normed, x)
    # the product before adds the residual in its epilogue, which takes no pass of its own
    x = attend(attention_norm(x), x)
    return feed_forward(mlp_norm(x), x)
