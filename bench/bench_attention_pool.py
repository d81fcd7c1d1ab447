"""Attention pooling of two hidden states at released sizes, forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, compiled, run_case

from vlmkern import ops

# tiles, heads, key dimension, value dimension
SHAPES = {"jina_vlm_1_tile": (1, 16, 72, 72), "jina_vlm_paper_1_tile": (1, 1, 1152, 2304)}
WIDTH, GRID = 1152, (27, 27)


def eager(features, w_q, w_kv, w_o, heads):
    """Concatenate, pad, cut into windows, attend: as the model's eager code does."""
    tiles, _, width = features[0].shape
    x = torch.cat(list(features), -1).view(tiles, *GRID, 2 * width)
    x = F.pad(x, (0, 0, 0, 1, 0, 1)).view(tiles, 14, 2, 14, 2, 2 * width).transpose(2, 3).reshape(-1, 4, 2 * width)
    q = F.linear(x.mean(1, keepdim=True), w_q)
    k, v = F.linear(x, w_kv).split([w_q.shape[0], w_o.shape[1]], -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(attended, w_o).view(tiles, 196, -1)


def vlmkern(features, w_q, w_kv, w_o, heads):
    return ops.attention_pool(features, w_q, None, w_kv, None, w_o, None, grid=GRID, num_heads=heads)


PROVIDERS = {"eager": lambda: eager, "compile": lambda: compiled(eager), "vlmkern": lambda: vlmkern}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_attention_pool_fwd(benchmark, shape, dtype, provider):
    tiles, heads, key_dim, value_dim = SHAPES[shape]
    benchmark.group = f"attention_pool fwd {shape} {dtype}"
    features = torch.randn(2, tiles, 729, WIDTH).to(DTYPES[dtype])
    key_size, value_size = heads * key_dim, heads * value_dim
    w_q, w_kv, w_o = (
        (torch.randn(rows, columns) * columns**-0.5).to(DTYPES[dtype])
        for rows, columns in ((key_size, 2 * WIDTH), (key_size + value_size, 2 * WIDTH), (WIDTH, value_size))
    )
    function, exact = (
        PROVIDERS[provider](),
        eager(features.float(), w_q.float(), w_kv.float(), w_o.float(), heads),
    )
    windows = 196 * tiles
    flops = 2 * windows * (w_q.numel() + 4 * w_kv.numel() + w_o.numel())
    inputs = list(features.unbind(0))
    run_case(benchmark, lambda: function(inputs, w_q, w_kv, w_o, heads), exact, DTYPES[dtype], flops=flops)
