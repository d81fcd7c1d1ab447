"""What the tests of `vlmkern.ops.attention_pool` share: weights, the formula with loops, and a small problem."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmkern import ops


@dataclass
class Weights:
    w_q: Tensor
    b_q: Tensor | None
    w_kv: Tensor
    b_kv: Tensor | None
    w_o: Tensor
    b_o: Tensor | None
    pad_embed: Tensor
    heads: int

    @classmethod
    def make(cls, channels, heads, key_dim, value_dim, out, *, bias=True, dtype=torch.float32):
        def normal(*shape):
            return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

        key_size, value_size = heads * key_dim, heads * value_dim
        return cls(
            normal(key_size, channels),
            normal(key_size) if bias else None,
            normal(key_size + value_size, channels),
            normal(key_size + value_size) if bias else None,
            normal(out, value_size),
            normal(out) if bias else None,
            torch.randn(2, channels).to(dtype),
            heads,
        )

    def to(self, dtype):
        return Weights(*(t if t is None else t.to(dtype) for t in list(vars(self).values())[:-1]), self.heads)

    @property
    def projections(self):
        return self.w_q, self.b_q, self.w_kv, self.b_kv, self.w_o, self.b_o


def slow_pool(features, w: Weights, grid, window=(2, 2), mask=None):
    """The definition, one window at a time, one slot at a time."""
    x = torch.cat(list(features), dim=-1)
    tiles, _, channels = x.shape
    rows, cols = grid
    down, across = math.ceil(rows / window[0]), math.ceil(cols / window[1])
    key_size = w.w_q.shape[0]
    key_dim = key_size // w.heads
    zero = x.new_zeros(1)
    result = []
    for t in range(tiles):
        for i in range(down * across):
            slots = []
            for r in range(window[0]):
                for c in range(window[1]):
                    row, col = i // across * window[0] + r, i % across * window[1] + c
                    if row >= rows or col >= cols:
                        slots.append(x.new_zeros(channels))
                        continue
                    slot = x[t, row * cols + col]
                    if mask is not None:
                        value = mask[t, row * cols + col].item()
                        if value == 0:
                            slot = slot + w.pad_embed[0]
                        elif value < 1:
                            slot = slot + w.pad_embed[1]
                    slots.append(slot)
            slots = torch.stack(slots)
            q = slots.mean(0) @ w.w_q.T + (zero if w.b_q is None else w.b_q)
            kv = slots @ w.w_kv.T + (zero if w.b_kv is None else w.b_kv)
            k, v = kv[:, :key_size], kv[:, key_size:]
            heads = []
            for qh, kh, vh in zip(q.chunk(w.heads), k.chunk(w.heads, 1), v.chunk(w.heads, 1), strict=True):
                heads.append(torch.softmax(kh @ qh * key_dim**-0.5, 0) @ vh)
            result.append(torch.cat(heads) @ w.w_o.T + (zero if w.b_o is None else w.b_o))
    return torch.stack(result).view(tiles, down * across, -1)


def random_mask(tiles, patches):
    return torch.tensor([1.0, 0.0, 0.37, 0.999, -1.0])[torch.randint(0, 5, (tiles, patches))]


def problem(dtype=torch.float64, requires_grad=True):
    """Small sizes with every option in use."""
    w = Weights.make(8, 2, 3, 5, 6, dtype=dtype)
    features = [torch.randn(2, 15, 4, dtype=dtype) for _ in range(2)]
    mask = random_mask(2, 15)
    tensors = [*features, *w.projections, w.pad_embed]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)

    def run(f0, f1, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed, keep=None):
        return ops.attention_pool(
            [f0, f1],
            w_q,
            b_q,
            w_kv,
            b_kv,
            w_o,
            b_o,
            grid=(3, 5),
            num_heads=2,
            pad_embed=pad_embed,
            mask=mask,
            keep=keep,
        )

    return run, tensors, mask
