"""Multi-head attention: softmax(cap(scale * Q K^T) + mask) V, per image or per packed segment.

Vaswani et al., "Attention Is All You Need" (2017), eq. 1; fewer heads of keys: Ainslie et al. (2023); the cap: Gemma
Team (2024), section 2; the rotation of queries and keys: Su et al. (2021), eq. 34. Scores, softmax and sums are float32
(float64 for float64 inputs); inputs, rotated queries and keys, and the result have the tensors' own dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _rotary
from .problem import Attention, AttentionGradient


def attention(p: Attention) -> tuple[Tensor, Tensor]:
    """q [B, N, H, D] or packed [T, H, D] -> output of the same shape and the log-sum-exp of the scores, [B, H, N] or
    [H, T], in float32 (float64). A query that sees no key gets 0 and -inf."""
    # tokens outside every segment, which only unchecked bounds leave, attend to nothing
    out = torch.zeros_like(p.q, memory_format=torch.contiguous_format)
    batch = p.q.shape[:-3]
    lse = p.q.new_full((*batch, p.q.shape[-2], p.q.shape[-3]), -torch.inf, dtype=_accumulator(p.q))
    for s in _sequences(p):
        scores, seen, _ = _scores(p, *s.rotated(p))
        highest = scores.amax(-1, keepdim=True)
        # in place: the scores are by far the largest tensor here, and every pass over them counts
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        attended = weights @ _of_groups(p.v[s.keys], p) / total
        logarithm = (highest + total.log()).squeeze(-1)
        if seen is not None:
            sees = seen.any(-1)
            attended, logarithm = attended.where(sees[:, None], 0), logarithm.where(sees, -torch.inf)
        out[s.queries] = attended.transpose(0, 1).to(p.q.dtype)
        lse[s.statistics] = logarithm
    return out, lse


def attention_bwd(p: AttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, dense: P = softmax(S), dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)),
    dQ = scale * dS K, dK = scale * dS^T Q; the cap's slope in between, rotations turned back behind, and heads of a
    group summed. Everything is recomputed from the inputs."""
    f = p.forward
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (f.q, f.k, f.v))
    for s in _sequences(f):
        q, k = s.rotated(f)
        scores, seen, slope = _scores(f, q, k)
        query, key, value, d_out = (
            _heads_first(q),
            _of_groups(k, f),
            _of_groups(f.v[s.keys], f),
            _heads_first(p.grad[s.queries]),
        )
        weights = scores.softmax(-1)
        if seen is not None:
            weights = weights.where(seen, 0)  # a row of nothing but -inf would be NaN
        d_weights = d_out @ value.mT
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * f.scale
        if slope is not None:
            d_scores = d_scores * slope
        groups = (f.k.shape[-2], -1)
        d_key, d_value = ((x.mT @ y).unflatten(0, groups).sum(1) for x, y in ((d_scores, query), (weights, d_out)))
        d_query = d_scores @ key
        tables, tables_k = s.tables(f)
        dq[s.queries] = _rotated(d_query.transpose(0, 1), tables, f.interleaved, back=True).to(f.q.dtype)
        dk[s.keys] = _rotated(d_key.transpose(0, 1), tables_k, f.interleaved, back=True).to(f.q.dtype)
        dv[s.keys] = d_value.transpose(0, 1).to(f.q.dtype)
    return dq, dk, dv


class _Sequence(NamedTuple):
    """Indices of an image or segment: in [.., H, D] tensors, in the log-sum-exp, and in tables of rotations."""

    queries: Any
    keys: Any
    statistics: Any

    def tables(self, p: Attention) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        if p.cos is None:
            return None, None

        def of(tables: tuple[Tensor, Tensor], index: Any) -> tuple[Tensor, Tensor]:
            return tuple(t if p.cu_seqlens is None and t.dim() == 2 else t[index] for t in tables)

        return of((p.cos, p.sin), self.queries), of(p.tables_k, self.keys)

    def rotated(self, p: Attention) -> tuple[Tensor, Tensor]:
        """Queries and keys, [N, H, D]."""
        tables, tables_k = self.tables(p)
        q, k = p.q[self.queries], p.k[self.keys]
        return _rotated(q, tables, p.interleaved), _rotated(k, tables_k, p.interleaved)


def _sequences(p: Attention) -> Iterator[_Sequence]:
    """Those with queries and keys."""
    if p.q.numel() == 0 or p.k.numel() == 0:
        return
    if p.cu_seqlens is None:
        yield from (_Sequence(b, b, b) for b in range(p.q.shape[0]))
        return
    pairs = (itertools.pairwise(bounds.tolist()) for bounds in (p.cu_seqlens, p.bounds_k))
    for (start, end), (start_k, end_k) in zip(*pairs, strict=True):
        if start < end and start_k < end_k:
            yield _Sequence(slice(start, end), slice(start_k, end_k), (slice(None), slice(start, end)))


def _scores(p: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[H, N, M], -inf where a query does not see a key; who sees whom; and the slope of the cap."""
    scores = (_heads_first(q) * p.scale) @ _of_groups(k, p).mT
    slope = seen = None
    if p.softcap:
        tanh = (scores / p.softcap).tanh()
        scores, slope = tanh * p.softcap, 1 - tanh.square()
    if p.window_left >= 0 or p.window_right >= 0:
        queries, keys = scores.shape[-2:]
        # from a query's own place, the last query's being that of the last key
        distance = torch.arange(keys, device=q.device) - torch.arange(keys - queries, keys, device=q.device)[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if p.window_left >= 0:
            seen &= distance >= -p.window_left
        if p.window_right >= 0:
            seen &= distance <= p.window_right
        scores = scores.masked_fill_(~seen, -torch.inf)
    return scores, seen, slope


def _rotated(x: Tensor, tables: _rotary.Tables | None, interleaved: bool, back: bool = False) -> Tensor:
    """x [N, H, D], turned or turned back if there are tables."""
    return x if tables is None else _rotary.turned(x, *tables, interleaved, back=back)


def _of_groups(x: Tensor, p: Attention) -> Tensor:
    """Keys or values [M, H_kv, D] -> [H, M, D] in the accumulator's dtype: each head's own, or its group's."""
    return _heads_first(x).repeat_interleave(p.q.shape[-2] // x.shape[1], 0)


def _heads_first(x: Tensor) -> Tensor:
    """[N, H, D] -> [H, N, D] in the accumulator's dtype."""
    return x.transpose(0, 1).to(_accumulator(x))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
