"""Non-causal attention on views of a fused qkv projection, forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, run_case

from vlmkern import ops

# tiles, tokens, heads, head dimension
SHAPES = {
    "siglip_so400m_1_tile": (1, 729, 16, 72),
    "siglip_so400m_2_tiles": (2, 729, 16, 72),
    "siglip_so400m_13_tiles": (13, 729, 16, 72),
    "internvit_300m_1_tile": (1, 1025, 16, 64),
    "qwen2_vl_image": (1, 3996, 16, 80),
}


def eager(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


PROVIDERS = {"eager": eager, "sdpa": sdpa, "onednn": sdpa, "vlmkern": ops.attention}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_attention_fwd(benchmark, shape, dtype, provider):
    tiles, tokens, heads, dim = SHAPES[shape]
    benchmark.group = f"attention fwd|{shape}|{dtype}"
    q, k, v = torch.randn(tiles, tokens, 3, heads, dim).to(DTYPES[dtype]).unbind(2)
    function, flops = PROVIDERS[provider], 4 * tiles * heads * tokens**2 * dim
    exact = sdpa(q.float(), k.float(), v.float())
    run_case(benchmark, provider, lambda: function(q, k, v), exact, DTYPES[dtype], flops=flops, rounds=5)
