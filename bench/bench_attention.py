"""Non-causal attention on views of a fused qkv projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, backward, forward, run_case

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


# shapes whose gradients are timed: the largest take a minute in some baselines
CASES = [(shape, "fwd") for shape in SHAPES] + [("siglip_so400m_1_tile", "bwd"), ("internvit_300m_1_tile", "bwd")]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, mode", CASES)
def bench_attention(benchmark, shape, mode, dtype, provider):
    tiles, tokens, heads, dim = SHAPES[shape]
    benchmark.group = f"attention {mode}|{shape}|{dtype}"
    q, k, v = torch.randn(tiles, tokens, 3, heads, dim).to(DTYPES[dtype]).unbind(2)
    run = forward if mode == "fwd" else backward
    exact = run(sdpa, [x.float() for x in (q, k, v)])()
    # gradients take five products of the forward's two
    products, tensors = (2, 4) if mode == "fwd" else (5, 8)
    run_case(
        benchmark,
        provider,
        run(PROVIDERS[provider], [q, k, v]),
        exact,
        DTYPES[dtype],
        flops=2 * products * tiles * heads * tokens**2 * dim,
        least_bytes=tensors * q.numel() * q.element_size(),
        rounds=5,
    )
