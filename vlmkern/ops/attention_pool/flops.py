"""FLOPs of `ops.attention_pool`: products alone, a multiply-add as two."""

from __future__ import annotations

import math

from .problem import AttentionPool, AttentionPoolGradient


def attention_pool(p: AttentionPool) -> int:
    """The formula's own form: keys and values of every slot, zero slots too, query and output of every window; scores
    inside windows are left out, as in the paper (5e-5 of the rest). What a backend saves by absorbing weights is not
    seen here."""
    windows = math.prod(p.windows_shape)
    return 2 * windows * (math.prod(p.window) * p.w_kv.numel() + p.w_q.numel() + p.w_o.numel())


def attention_pool_bwd(p: AttentionPoolGradient) -> int:
    """Everything again but the output layer, and of each product's two gradients those that are wanted."""
    windows = math.prod(p.forward.windows_shape)
    slots = windows * math.prod(p.window)
    inputs, (of_q, _, of_kv, _, of_o, _, of_pad) = p.wanted[: len(p.features)], p.wanted[len(p.features) :]
    products = (1 + of_kv + (any(inputs) or of_pad)) * slots * p.w_kv.numel()
    products += (1 + of_q + (any(inputs) or of_pad)) * windows * p.w_q.numel()
    return 2 * (products + (1 + of_o) * windows * p.w_o.numel())
