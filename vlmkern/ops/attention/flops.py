"""FLOPs of `ops.attention`: products alone, a multiply-add as two."""

from __future__ import annotations

import itertools

from .problem import Attention, AttentionGradient


def attention(p: Attention) -> int:
    """Two products, each of H * D multiply-adds for every query and key that it sees."""
    *_, heads, head_dim = p.q.shape
    if p.cu_seqlens is None:
        pairs = p.q.shape[0] * _pairs(p, p.q.shape[1], p.k.shape[1])
    else:
        lengths = ([b - a for a, b in itertools.pairwise(t.tolist())] for t in (p.cu_seqlens, p.bounds_k))
        pairs = sum(_pairs(p, queries, keys) for queries, keys in zip(*lengths, strict=True))
    return 4 * pairs * heads * head_dim


def attention_bwd(p: AttentionGradient) -> int:
    """Five products: the scores again, and those of the four gradients dP, dV, dQ, dK."""
    return attention(p.forward) // 2 * 5


def _pairs(p: Attention, queries: int, keys: int) -> int:
    """Queries and keys that see each other in one image or segment: query i stands at place i + keys - queries."""
    if p.window_left < 0 and p.window_right < 0:
        return queries * keys
    total = 0
    for place in range(keys - queries, keys):
        first = max(0, place - p.window_left) if p.window_left >= 0 else 0
        last = min(keys - 1, place + p.window_right) if p.window_right >= 0 else keys - 1
        total += max(0, last - first + 1)
    return total
