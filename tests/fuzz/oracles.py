"""What the ops compute, written down from their docstrings alone, for any floating dtype.

Arguments come upcast: to float64 for the exact result, to float32 for what plain torch would give. `rounded` is what
happens to values that are stored on the way: nothing for the exact result, a cast to the tensors' dtype and back for
plain torch. Autograd differentiates both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Round = Callable[[Tensor], Tensor]
Arguments = dict[str, Any]
_TORCH_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C] times weight [E, C], plus bias [E]."""
    y = torch.einsum("...c,ec->...e", x, weight)
    return y if bias is None else y + bias


def activate(x: Tensor, activation: str) -> Tensor:
    """In float32 as torch has it: its gelu loses the tail that cancels in 1 + erf(x)."""
    if x.dtype == torch.float32 and activation != "none":
        return F.silu(x) if activation == "silu" else F.gelu(x, approximate=_TORCH_GELU[activation])
    if activation == "silu":
        return x * torch.special.expit(x)
    if activation == "gelu":
        return x * torch.special.ndtr(x)
    if activation == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2
    return x


def linear(a: Arguments, rounded: Round) -> tuple[Tensor, ...]:
    y = rounded(product(a["x"], a["weight"], a["bias"]))
    y = rounded(activate(y, a["activation"]))
    return (y if a["residual"] is None else rounded(y + a["residual"]),)


def swiglu_mlp(a: Arguments, rounded: Round) -> tuple[Tensor, ...]:
    up = rounded(product(a["x"], a["w_up"], a["b_up"]))
    features = a["w_down"].shape[1]
    value, gate = up[..., :features], up[..., features:]
    hidden = rounded(rounded(activate(gate, "silu")) * value)
    return (rounded(product(hidden, a["w_down"], a["b_down"])),)


def add_layer_norm(a: Arguments, rounded: Round, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The statistics are those of the sum as rounded to `dtype`; gradients pass through that rounding."""
    exact_sum = a["x"] if a["residual"] is None else a["x"] + a["residual"]
    stored = exact_sum.detach().to(dtype).to(exact_sum.dtype)
    summed = exact_sum + (stored - exact_sum.detach())
    mean = summed.mean(-1, keepdim=True)
    centred = summed - mean
    variance = (centred * centred).mean(-1, keepdim=True)
    normed = centred / torch.sqrt(variance + a["eps"])
    if a["weight"] is not None:
        normed = normed * a["weight"]
    if a["bias"] is not None:
        normed = normed + a["bias"]
    return rounded(normed), exact_sum


def attention(a: Arguments, rounded: Round) -> tuple[Tensor, ...]:
    """The output and the log-sum-exp of the scores, [B, H, N] or [H, T]."""
    q, k, v, scale = a["q"], a["k"], a["v"], a["scale"]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if a["cu_seqlens"] is None:
        parts = [_softmax_attention(q[b], k[b], v[b], scale, rounded) for b in range(q.shape[0])]
        if not parts:
            return q * 0, q.new_zeros(q.shape[0], q.shape[2], q.shape[1])
        outs, lses = zip(*parts, strict=True)
        return torch.stack(outs), torch.stack(lses)
    bounds = a["cu_seqlens"].tolist()
    parts = [
        _softmax_attention(q[start:end], k[start:end], v[start:end], scale, rounded)
        for start, end in itertools.pairwise(bounds)
    ]
    if not parts:
        return q * 0, q.new_zeros(q.shape[1], q.shape[0])
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, rounded: Round) -> tuple[Tensor, Tensor]:
    """One segment, [N, H, D]."""
    if q.numel() == 0:
        return q * 0, q.new_zeros(q.shape[1], q.shape[0])
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    highest = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("hqk,khd->qhd", rounded(weights / total), v)
    return rounded(out), (highest + total.log())[..., 0]


def attention_pool(a: Arguments, rounded: Round) -> tuple[Tensor, ...]:
    windows = _windows(a)
    if a["keep"] is not None:
        windows = windows[a["keep"]]
    heads, keys = a["num_heads"], a["w_q"].shape[0]
    query = rounded(product(rounded(windows.mean(1)), a["w_q"], a["b_q"]))
    projected = rounded(product(windows, a["w_kv"], a["b_kv"]))
    key, value = projected[..., :keys], projected[..., keys:]
    count, slots = windows.shape[:2]
    query = query.reshape(count, heads, keys // heads)
    key = key.reshape(count, slots, heads, keys // heads)
    value = value.reshape(count, slots, heads, value.shape[-1] // heads)
    scores = torch.einsum("whd,wjhd->whj", query, key) / math.sqrt(keys // heads)
    weights = torch.softmax(scores, -1)
    context = rounded(torch.einsum("whj,wjhd->whd", weights, value)).reshape(count, -1)
    out = rounded(product(context, a["w_o"], a["b_o"]))
    if a["keep"] is None:
        tiles = a["features"][0].shape[0]
        out = out.reshape(tiles, _count(a["grid"], a["window"]), out.shape[-1])
    return (out,)


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
