"""FLOPs of `ops.attention`: products alone, a multiply-add as two."""

from __future__ import annotations

from .problem import Attention, AttentionGradient


def attention(p: Attention) -> int:
    """Two products, each of N^2 * H * D multiply-adds an image."""
    *_, heads, head_dim = p.q.shape
    if p.cu_seqlens is not None:
        return 4 * int(p.cu_seqlens.diff().long().square().sum()) * heads * head_dim
    return 4 * p.q.shape[0] * p.q.shape[1] ** 2 * heads * head_dim


def attention_bwd(p: AttentionGradient) -> int:
    """Five products: the scores again, and those of the four gradients dP, dV, dQ, dK."""
    return attention(p.forward) // 2 * 5
