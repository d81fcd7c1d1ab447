"""Attention in float64, written down once more: for every argument of `ops.attention`, and nothing of its code."""

from __future__ import annotations

import itertools

import torch


def exact(q, k, v, *, scale=None, cu_seqlens=None, cu_seqlens_k=None, max_seqlen=None, max_seqlen_k=None, **options):
    """The result, [B, N, H, D] or [T, H, D], and the log-sum-exp of the scores, [B, H, N] or [H, T]."""
    q, k, v = (t.double() for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rotary = options.pop("rotary", None)
    rotary_k = options.pop("rotary_k", None) or rotary
    interleaved = options.pop("interleaved", False)
    if cu_seqlens is None:
        parts = [
            _one(*turned(q[b], k[b], b, rotary, rotary_k, interleaved), v[b], scale, **options) for b in range(len(q))
        ]
        out, lse = zip(*parts, strict=True) if parts else ((q,), (q.new_empty(0, q.shape[2], q.shape[1]),))
        return (torch.stack(out), torch.stack(lse)) if parts else (out[0], lse[0])
    q, k = turned(q, k, None, rotary, rotary_k, interleaved)
    pairs = (itertools.pairwise(t.tolist()) for t in (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k))
    parts = [_one(q[a:b], k[c:d], v[c:d], scale, **options) for (a, b), (c, d) in zip(*pairs, strict=True)]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse, 1)


def turned(q, k, image, rotary, rotary_k, interleaved):
    """Both as rotary turns them: channels of a pair are the parts of a complex number."""
    if rotary is None:
        return q, k
    pairs = []
    for x, (cos, sin) in ((q, rotary), (k, rotary_k)):
        if len(x) == 0:  # torch makes no complex numbers of nothing
            pairs.append(x)
            continue
        half = x.shape[-1] // 2
        angle = torch.complex(cos.double(), sin.double())[..., :half]
        if angle.dim() == 3:
            angle = angle[image]
        grouped = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
        product = torch.view_as_real(torch.complex(grouped[..., 0], grouped[..., 1]) * angle[:, None])
        pairs.append((product if interleaved else product.transpose(-1, -2)).flatten(-2))
    return pairs


def _one(q, k, v, scale, causal=False, window=(-1, -1), softcap=0.0):
    """One sequence, [N, H, D] and [M, H_kv, D]."""
    groups = q.unflatten(1, (k.shape[1], -1)) if k.shape[1] else q.unsqueeze(2)
    scores = torch.einsum("nghd,mgd->ghnm", groups, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    n, m = scores.shape[-2:]
    places = torch.arange(n).add(m - n)
    behind = torch.arange(m).expand(n, m) - places[:, None]
    hidden = torch.zeros(n, m, dtype=torch.bool)
    if causal:
        hidden |= behind > 0
    if window[0] >= 0:
        hidden |= -behind > window[0]
    if window[1] >= 0:
        hidden |= behind > window[1]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1) if m else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = torch.where(hidden, 0.0, (scores - lse[..., None]).exp())
    out = torch.einsum("ghnm,mgd->nghd", weights, v)
    return out.flatten(1, 2), lse.flatten(0, 1)
