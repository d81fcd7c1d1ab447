"""Non-causal multi-head attention: softmax(scale * Q K^T) V, per image or per packed segment.

Vaswani et al., "Attention Is All You Need" (2017), eq. 1. Scores, softmax and sums are float32 (float64
for float64 inputs); inputs and the result have the tensors' own dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Attention, AttentionGradient


def attention(p: Attention) -> tuple[Tensor, Tensor]:
    """q, k, v [B, N, H, D] or packed [T, H, D] -> output of the same shape and the log-sum-exp of the scaled
    scores, [B, H, N] or [H, T], in float32 (float64)."""
    q, k, v, scale, cu_seqlens, _max_seqlen = p
    # tokens outside every segment, which only unchecked bounds leave, attend to nothing
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    batch = q.shape[:-3]
    lse = q.new_full((*batch, q.shape[-2], q.shape[-3]), -torch.inf, dtype=_accumulator(q))
    for rows, columns in _segments(q, cu_seqlens):
        scores = _scores(q[rows], k[rows], scale)
        highest = scores.amax(-1, keepdim=True)
        # in place: the scores are by far the largest tensor here, and every pass over them counts
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        out[rows] = (weights @ _heads_first(v[rows]) / total).transpose(0, 1).to(q.dtype)
        lse[columns] = (highest + total.log()).squeeze(-1)
    return out, lse


def attention_bwd(p: AttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, dense: P = softmax(S), dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)),
    dQ = scale * dS K, dK = scale * dS^T Q. Everything is recomputed from the inputs."""
    grad, q, k, v, _out, _lse, scale, cu_seqlens, _max_seqlen = p
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for rows, _ in _segments(q, cu_seqlens):
        query, key, value, d_out = (_heads_first(t[rows]) for t in (q, k, v, grad))
        weights = _scores(q[rows], k[rows], scale).softmax(-1)
        d_weights = d_out @ value.mT
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        for result, gradient in ((dq, d_scores @ key), (dk, d_scores.mT @ query), (dv, weights.mT @ d_out)):
            result[rows] = gradient.transpose(0, 1).to(q.dtype)
    return dq, dk, dv


def _segments(q: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple]:
    """Index of each image or segment in [.., H, D] tensors, and in the log-sum-exp."""
    if q.numel() == 0:
        return
    if cu_seqlens is None:
        yield from ((b, b) for b in range(q.shape[0]))
        return
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if start < end:
            yield slice(start, end), (slice(None), slice(start, end))


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (_heads_first(q) * scale) @ _heads_first(k).mT


def _heads_first(x: Tensor) -> Tensor:
    """[N, H, D] -> [H, N, D] in the accumulator's dtype."""
    return x.transpose(0, 1).to(_accumulator(x))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
