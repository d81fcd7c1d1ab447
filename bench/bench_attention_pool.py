"""Attention pooling of two hidden states at released sizes: the released form and the paper's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, PROVIDERS, backward, compiled, forward, run_case
from torch import nn

import vlmkern
from vlmkern import ops

# tiles, heads, key dimension, value dimension
SHAPES = {
    "jina_vlm_1_tile": (1, 16, 72, 72),
    "jina_vlm_4_tiles": (4, 16, 72, 72),
    "jina_vlm_paper_1_tile": (1, 1, 1152, 2304),
    "jina_vlm_paper_4_tiles": (4, 1, 1152, 2304),
}
WIDTH, GRID = 1152, (27, 27)


class Eager(nn.Module):
    """Concatenate, pad, cut into windows, attend: as the model's eager code does."""

    def __init__(self, heads, key_dim, value_dim, width=WIDTH, grid=GRID):
        super().__init__()
        self.heads, self.grid = heads, grid
        self.q = nn.Linear(2 * width, heads * key_dim, bias=False)
        self.kv = nn.Linear(2 * width, heads * (key_dim + value_dim), bias=False)
        self.out = nn.Linear(heads * value_dim, width, bias=False)

    def forward(self, features):
        x = torch.cat(list(features), -1).unflatten(1, self.grid)
        rows, cols = self.grid
        x = F.pad(x, (0, 0, 0, cols % 2, 0, rows % 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        tiles, windows = len(x), x.shape[1] * x.shape[3]
        x = x.transpose(2, 3).reshape(-1, 4, x.shape[-1])
        q = self.q(x.mean(1, keepdim=True))
        k, v = self.kv(x).split([self.q.out_features, self.out.in_features], -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(attended).view(tiles, windows, -1)


CASES = [(shape, "fwd") for shape in SHAPES] + [("jina_vlm_1_tile", "bwd")]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, mode", CASES)
def bench_attention_pool(benchmark, shape, mode, dtype, provider):
    tiles, heads, key_dim, value_dim = SHAPES[shape]
    benchmark.group = f"attention_pool {mode}|{shape}|{dtype}"
    features = list(torch.randn(2, tiles, 729, WIDTH).to(DTYPES[dtype]).unbind(0))
    module = Eager(heads, key_dim, value_dim).to(DTYPES[dtype]).float()
    weights = [module.q.weight, module.kv.weight, module.out.weight]

    def run(function):
        return forward(function, features) if mode == "fwd" else backward(function, features, weights)

    features = [f.float() for f in features]
    exact = run(lambda *f: module(f))()
    module.to(DTYPES[dtype])
    features = [f.to(DTYPES[dtype]) for f in features]
    q, kv, out = weights
    if provider == "vlmkern":
        if mode == "fwd":
            vlmkern.pack(module)
        call = run(lambda *f: ops.attention_pool(f, q, None, kv, None, out, None, grid=GRID, num_heads=heads))
    else:
        function = compiled(module, mode) if provider == "compile" else module
        call = run(lambda *f: function(f))
    # the formula's count (keys and values of every slot), whatever a provider makes of it
    flops = 2 * 196 * tiles * (q.numel() + 4 * kv.numel() + out.numel())
    moved = 2 * features[0].numel() + 196 * tiles * WIDTH + sum(weight.numel() for weight in weights)
    scale = 1 if mode == "fwd" else 2
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=scale * flops,
        least_bytes=scale * moved * features[0].element_size(),
        rounds=5,
    )
