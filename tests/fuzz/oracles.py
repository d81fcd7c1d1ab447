"""What the ops compute, written down from their docstrings alone.

Arguments come upcast: to float64 for the exact result, to float32 for what plain torch would give. `r` says what
becomes of values on the way: see `rounding`. Autograd differentiates everything here.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import Exact, Plain, sum_size

Arguments = dict[str, Any]
_TORCH_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C] times weight [E, C], plus bias [E]."""
    y = torch.einsum("...c,ec->...e", x, weight)
    return y if bias is None else y + bias


def activate(x: Tensor, activation: str) -> Tensor:
    """In float32 as torch has it: its gelu loses the tail that cancels in 1 + erf(x)."""
    if x.dtype == torch.float32 and activation not in ("none", "quick_gelu"):
        return F.silu(x) if activation == "silu" else F.gelu(x, approximate=_TORCH_GELU[activation])
    if activation == "silu":
        return x * torch.special.expit(x)
    if activation == "quick_gelu":
        return x * torch.special.expit(1.702 * x)
    if activation == "gelu":
        return x * torch.special.ndtr(x)
    if activation == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2
    return x


def linear(a: Arguments, r: Exact) -> tuple[Tensor, ...]:
    y = r.stored(product(a["x"], a["weight"], a["bias"]))
    # the library's approximations of gelu are right to 1e-5 of the result
    y = r.stored(r.computed(activate(y, a["activation"]), 64.0 if "gelu" in a["activation"] else 1.0))
    return (y if a["residual"] is None else r.stored(y + a["residual"]),)


def swiglu_mlp(a: Arguments, r: Exact) -> tuple[Tensor, ...]:
    up = r.stored(product(a["x"], a["w_up"], a["b_up"]))
    features = a["w_down"].shape[1]
    value, gate = up[..., :features], up[..., features:]
    hidden = r.stored(r.stored(activate(gate, "silu")) * value)
    return (r.stored(product(hidden, a["w_down"], a["b_down"])),)


def add_layer_norm(a: Arguments, r: Exact, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The statistics are those of the sum as rounded to `dtype`; gradients pass through that rounding. As plain torch,
    it is torch's own layer norm, which keeps its statistics, and sums of gradients, in that dtype."""
    if isinstance(r, Plain):
        x, residual, weight, bias = (
            None if a[name] is None else a[name].to(dtype) for name in ("x", "residual", "weight", "bias")
        )
        summed = x if residual is None else x + residual
        return F.layer_norm(summed, summed.shape[-1:], weight, bias, a["eps"]), summed
    summed, exact_sum = _rounded_sum(a, dtype)
    mean = r.computed(summed.mean(-1, keepdim=True), 8 * sum_size(summed))
    centred = summed - mean
    variance = (centred * centred).mean(-1, keepdim=True)
    normed = centred / torch.sqrt(variance + a["eps"])
    if a["weight"] is not None:
        normed = normed * a["weight"]
    if a["bias"] is not None:
        normed = normed + a["bias"]
    return r.stored(normed), exact_sum


def rms_norm(a: Arguments, r: Exact, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The mean square is that of the sum as rounded to `dtype`; what follows is rounded once."""
    summed, exact_sum = _rounded_sum(a, dtype)
    square = r.computed((summed * summed).mean(-1, keepdim=True), sum_size(summed))
    normed = summed / torch.sqrt(square + a["eps"]) * (a["weight"] + a["offset"])
    return r.stored(turned(r.computed(normed), a["cos"], a["sin"], a["interleaved"])), exact_sum


def turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """x [..., N, H, D], by a rotation matrix for each pair of channels; x without tables."""
    if cos is None or x.numel() == 0:
        return x
    half = x.shape[-1] // 2
    cos, sin = (t[..., :half].to(x.dtype) for t in (cos, sin))
    matrix = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
    pairs = torch.einsum("...npij,...nhpj->...nhpi", matrix, pairs)
    return (pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2)


def _rounded_sum(a: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounded to `dtype`, which gradients pass through, and exact."""
    exact = a["x"] if a["residual"] is None else a["x"] + a["residual"]
    return exact + (exact.detach().to(dtype).to(exact.dtype) - exact.detach()), exact


def attention(a: Arguments, r: Exact) -> tuple[Tensor, ...]:
    """The output and the log-sum-exp of the scores, [B, H, N] or [H, T]."""
    (q, k), v = (r.stored(x) for x in turned_pair(a)), a["v"]
    if a["cu_seqlens"] is None:
        parts = [_softmax_attention(q[b], k[b], v[b], a, r) for b in range(q.shape[0])]
        if not parts:
            return q * 0, q.new_zeros(q.shape[0], q.shape[2], q.shape[1])
        outs, lses = zip(*parts, strict=True)
        return torch.stack(outs), torch.stack(lses)
    parts = [_softmax_attention(q[i], k[j], v[j], a, r) for i, j in _segments(a)]
    if not parts:
        return q * 0, q.new_zeros(q.shape[1], q.shape[0])
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


def turned_pair(a: Arguments) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned if they are to be."""
    tables = a["cos"], a["sin"]
    tables_k = tables if a["cos_k"] is None else (a["cos_k"], a["sin_k"])
    return turned(a["q"], *tables, a["interleaved"]), turned(a["k"], *tables_k, a["interleaved"])


def _segments(a: Arguments) -> list[tuple[slice, slice]]:
    """Of queries and keys."""
    bounds_k = a["cu_seqlens"] if a["cu_seqlens_k"] is None else a["cu_seqlens_k"]
    spans = ([slice(*pair) for pair in itertools.pairwise(t.tolist())] for t in (a["cu_seqlens"], bounds_k))
    return list(zip(*spans, strict=True))


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, a: Arguments, r: Exact) -> tuple[Tensor, Tensor]:
    """One segment, q [N, H, D] and k and v [M, H_kv, D]."""
    if q.numel() == 0 or k.numel() == 0:
        # of both, so that both have gradients
        lse = q.new_full((q.shape[1], q.shape[0]), 0.0 if q.numel() == 0 else -torch.inf)
        return q * 0 + (k.sum() + v.sum()) * 0, lse
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if a["scale"] is None else a["scale"]
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if a["softcap"]:
        capped = scores / a["softcap"]
        # as far as approximations of tanh are from it, and 1 - tanh^2, which may be all rounding, from the slope
        slope = (capped - capped.detach()).nan_to_num(0, 0, 0) * (r.computed(torch.ones_like(capped), 8.0) - 1)
        scores = a["softcap"] * (r.computed(torch.tanh(capped), 4.0) + slope)
    places = torch.arange(k.shape[0]) - torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
    seen = torch.ones_like(places, dtype=torch.bool)
    if a["window_left"] >= 0:
        seen &= places >= -a["window_left"]
    if a["window_right"] >= 0:
        seen &= places <= a["window_right"]
    some = seen.any(-1, keepdim=True)
    # rows of nothing are computed as if they saw all, and thrown away: no gradient of theirs is NaN
    scores = scores.masked_fill(~(seen | ~some), -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    lse = highest + total.log()
    # backwards make the weights again from the log-sum-exp, with its rounding
    total = r.computed(total, 1 + lse.detach().abs())
    out = torch.einsum("hqk,khd->qhd", r.stored(r.computed(weights / total)), v)
    out, lse = out.where(some[:, :, None], 0), lse[..., 0].where(some[:, 0], -torch.inf)
    return r.stored(out), lse


def attention_range(a: Arguments) -> tuple[Tensor, Tensor]:
    """Bounds of each element of attention's result: the smallest and the largest value that it may be a mean of, and 0
    where queries may see nothing."""
    q, v = a["q"], a["v"].repeat_interleave(a["q"].shape[-2] // max(1, a["v"].shape[-2]), -2)
    nothing = a["window_left"] >= 0 or a["window_right"] >= 0
    pairs = list(zip(q, v, strict=True)) if a["cu_seqlens"] is None else [(q[i], v[j]) for i, j in _segments(a)]
    low, high = torch.zeros_like(q), torch.zeros_like(q)
    for i, (of_q, of_v) in enumerate(pairs):
        if of_q.numel() == 0 or of_v.numel() == 0:
            continue
        at = i if a["cu_seqlens"] is None else _segments(a)[i][0]
        low[at], high[at] = of_v.amin(0, keepdim=True), of_v.amax(0, keepdim=True)
    return (low.clamp(max=0), high.clamp(min=0)) if nothing else (low, high)


def attention_score_bound(a: Arguments) -> float:
    """No finite score is larger than this."""
    (q, k), scale = (a[name].detach().nan_to_num(0, 0, 0) for name in "qk"), a["scale"]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else abs(scale)
    return float(scale * q.norm(dim=-1).max() * k.norm(dim=-1).max()) if q.numel() and k.numel() else 0.0


def attention_pool(a: Arguments, r: Exact) -> tuple[Tensor, ...]:
    query, key, value = _pool_projections(a, r)
    scores = torch.einsum("whd,wjhd->whj", query, key)
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    # as a constant: weights that do not add up to one have gradients by their scores that do not add up to nothing
    total = total + (r.computed(total) - total).detach()
    weights = r.computed(weights / total)
    context = r.stored(torch.einsum("whj,wjhd->whd", weights, value)).flatten(1)
    out = r.stored(product(context, a["w_o"], a["b_o"]))
    if a["keep"] is None:
        tiles = a["features"][0].shape[0]
        out = out.reshape(tiles, _count(a["grid"], a["window"]), out.shape[-1])
    return (out,)


def attention_pool_score_bound(a: Arguments) -> float:
    """No finite score is larger than this."""
    query, key, _ = (t.detach().nan_to_num(0, 0, 0) for t in _pool_projections(a, Exact()))
    return float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) if query.numel() else 0.0


def _pool_projections(a: Arguments, r: Exact) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries [W, H, Dk], keys [W, slots, H, Dk] and values [W, slots, H, Dv] of the windows that are wanted."""
    windows = _windows(a)
    if a["keep"] is not None:
        windows = windows[a["keep"]]
    heads, keys, values = a["num_heads"], a["w_q"].shape[0], a["w_o"].shape[1]
    count, slots = windows.shape[:2]
    query = r.stored(product(r.stored(windows.mean(1)), a["w_q"], a["b_q"]))
    projected = r.stored(product(windows, a["w_kv"], a["b_kv"]))
    query = query.reshape(count, heads, keys // heads) / math.sqrt(keys // heads)
    key = projected[..., :keys].reshape(count, slots, heads, keys // heads)
    return query, key, projected[..., keys:].reshape(count, slots, heads, values // heads)


def _count(grid: list[int], window: list[int]) -> int:
    return math.ceil(grid[0] / window[0]) * math.ceil(grid[1] / window[1])


def _windows(a: Arguments) -> Tensor:
    """The slots of every window, [T * M, slots, L*C], zeros beyond the grid."""
    x, mask = torch.cat(a["features"], -1), a["mask"]
    if mask is not None:
        nothing = torch.zeros((), dtype=x.dtype)
        x = x + torch.where((mask == 0)[..., None], a["pad_embed"][0], nothing)
        x = x + torch.where(((mask < 1) & (mask != 0))[..., None], a["pad_embed"][1], nothing)
    (rows, cols), (high, wide) = a["grid"], a["window"]
    tiles, _, width = x.shape
    down, across = math.ceil(rows / high), math.ceil(cols / wide)
    x = x.reshape(tiles, rows, cols, width)
    x = torch.cat([x, x.new_zeros(tiles, rows, across * wide - cols, width)], 2)
    x = torch.cat([x, x.new_zeros(tiles, down * high - rows, across * wide, width)], 1)
    x = x.reshape(tiles, down, high, across, wide, width).transpose(2, 3)
    return x.reshape(tiles * down * across, high * wide, width)
