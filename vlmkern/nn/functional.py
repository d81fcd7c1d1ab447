"""The blocks of vision transformers over the ops, whoever owns the parameters: the modules of this package and those of
other people's models call the same functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops

Projection = tuple[Tensor, "Tensor | None"]
"""Weight [out, in] and bias [out] or None of a linear layer."""

Prepare = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]
"""What becomes of queries and keys [..., H, D] before their products are taken: norms."""


def self_attention(
    x: Tensor,
    qkv: list[Projection],
    out: Projection,
    num_heads: int,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    prepare: Prepare | None = None,
) -> Tensor:
    """Multi-head self-attention with its projections: out(attention(q(x), k(x), v(x))) + residual.

    Args:
        x: [B, N, C], or packed [T, C] with `cu_seqlens` and `max_seqlen` (see `ops.attention`).
        qkv: one projection to 3*H*D with the rows of q, k and v one after the other, read in place, or three to H*D
            each (2 % slower on CPU, but nobody's weights have to be moved).
        out: H*D to C.
        num_heads: H.
        scale: factor on the scores; D ** -0.5 when None.
        rotary: see `ops.attention`.
        residual: like x, or None.
        prepare: of queries and keys, before they are turned.

    Returns:
        Like x.
    """
    if len(qkv) == 1:
        q, k, v = ops.linear(x, *qkv[0]).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    else:
        q, k, v = (ops.linear(x, *projection).unflatten(-1, (num_heads, -1)) for projection in qkv)
    if prepare is not None:
        q, k = prepare(q, k)
    attended = ops.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, rotary=rotary)
    return ops.linear(attended.flatten(-2), *out, residual=residual)


def cross_attention(x: Tensor, context: Tensor, qkv: Projection, out: Projection, num_heads: int) -> Tensor:
    """out(attention(q(x), k(context), v(context))) of x [B, N, C] and context [B, M, C], with one projection to 3*H*D
    as in `self_attention`."""
    weight, bias = qkv
    width = weight.shape[0] // 3
    of_q, of_kv = (None, None) if bias is None else bias.split((width, 2 * width))
    q = ops.linear(x, weight[:width], of_q).unflatten(-1, (num_heads, -1))
    k, v = ops.linear(context, weight[width:], of_kv).unflatten(-1, (2, num_heads, -1)).unbind(-3)
    return ops.linear(ops.attention(q, k, v).flatten(-2), *out)


def mlp(x: Tensor, up: Projection, down: Projection, activation: str, residual: Tensor | None = None) -> Tensor:
    """down(act(up(x))) + residual, for x and residual [..., C]; activations as in `ops.linear`."""
    return ops.linear(ops.linear(x, *up, activation=activation), *down, residual=residual)


def gated_mlp(
    x: Tensor,
    gate: Projection,
    value: Projection,
    down: Projection,
    activation: str = "silu",
    residual: Tensor | None = None,
) -> Tensor:
    """down(act(gate(x)) * value(x)) + residual for x [..., C]: with silu `ops.swiglu_mlp` for weights that are kept
    apart."""
    hidden = ops.linear(x, *gate, activation=activation) * ops.linear(x, *value)
    return ops.linear(hidden, *down, residual=residual)


def pre_norm_block(
    x: Tensor,
    attention_norm: nn.Module,
    attend: Callable[[Tensor, Tensor | None], Tensor],
    mlp_norm: nn.Module,
    feed_forward: Callable[[Tensor, Tensor | None], Tensor],
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """x + attention(norm(x)), then x + mlp(norm(x)), for x [..., C].

    Under autocast the sums and norms are torch's, so that a float32 x stays float32 from block to block.

    Args:
        attention_norm, mlp_norm: layer norms, or whatever else is called as a norm.
        attend, feed_forward: of a normed input and a residual to add, or None for none.
        scales: factors [C] on the two summands before they are added, LayerScale, or None. Touvron et al., "Going
            deeper with Image Transformers" (2021), eq. 1.
    """
    # torch has no autocast for tensors without memory, on which work is counted
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        if torch.get_autocast_dtype(x.device.type) != x.dtype:
            # the ops would round the residual to their products' dtype
            x = x + _scaled(attend(attention_norm(x), None), scales[0])
            return x + _scaled(feed_forward(mlp_norm(x), None), scales[1])
    elif x.is_cuda and scales == (None, None) and isinstance(mlp_norm, nn.LayerNorm):
        attended = attend(attention_norm(x), None)
        normed, x = ops.add_layer_norm(attended, x, mlp_norm.weight, mlp_norm.bias, eps=mlp_norm.eps)
        return feed_forward(normed, x)
    # the product before adds the residual in its epilogue, which takes no pass of its own
    for norm, part, scale in zip((attention_norm, mlp_norm), (attend, feed_forward), scales, strict=True):
        x = part(norm(x), x) if scale is None else torch.addcmul(x, part(norm(x), None), scale)
    return x


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale
