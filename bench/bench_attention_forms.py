"""Attention as decoders, packed towers and resamplers ask for it, against what transformers makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, forward, run_case

from vlmkern import ops

# queries, keys, heads, heads of keys, head dimension, what is asked beyond that
FORMS = {
    "qwen3_1_7b_prefill_1744": (1744, 1744, 16, 8, 128, {"causal": True}),
    "gemma2_2b_prefill_2048": (2048, 2048, 8, 4, 256, {"causal": True, "softcap": 50.0}),
    "qwen2_vl_image_rotary_3996": (3996, 3996, 16, 16, 80, {"rotary": 40}),
    "idefics2_resampler_64_3704": (64, 3704, 16, 4, 96, {}),
    "qwen3_1_7b_decode_1744": (1, 1744, 16, 8, 128, {}),
}


def rotated(x, cos, sin):
    """As transformers' towers do: in float32, by copies."""
    wide = x.float()
    first, second = wide.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (wide * cos.repeat(1, 2)[:, None] + turned * sin.repeat(1, 2)[:, None]).to(x.dtype)


def eager(q, k, v, causal=False, softcap=0.0, rotary=None):
    if rotary is not None:
        q, k = rotated(q, *rotary), rotated(k, *rotary)
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        scores = scores + torch.full(scores.shape[-2:], torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def sdpa(q, k, v, causal=False, rotary=None):
    if rotary is not None:
        q, k = rotated(q, *rotary), rotated(k, *rotary)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


PROVIDERS = {"eager": eager, "sdpa": sdpa, "compile": None, "vlmkern": ops.attention}
CASES = [(f, p) for f, (*_, options) in FORMS.items() for p in PROVIDERS if not ("softcap" in options and p == "sdpa")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, provider", CASES)
def bench_attention_forms(benchmark, form, provider, dtype):
    queries, keys, heads, heads_k, dim, options = FORMS[form]
    benchmark.group = f"attention fwd|{form}|{dtype}"
    q, kv = torch.randn(1, queries, heads, dim), torch.randn(2, 1, keys, heads_k, dim)
    q, k, v = (t.to(DTYPES[dtype]) for t in (q, *kv))
    if "rotary" in options:
        angles = 6 * torch.rand(queries, options["rotary"])
        options = {"rotary": (angles.cos(), angles.sin())}
    torch._dynamo.reset()
    function = torch.compile(eager, fullgraph=True) if provider == "compile" else PROVIDERS[provider]
    exact = forward(lambda *t: eager(*t, **options), [t.float() for t in (q, k, v)])()
    pairs = queries * (queries + 1) / 2 if options.get("causal") else queries * keys
    run_case(
        benchmark,
        provider,
        forward(lambda *t: function(*t, **options), [q, k, v]),
        exact,
        DTYPES[dtype],
        flops=4 * pairs * heads * dim,
        least_bytes=(2 * q.numel() + 2 * k.numel()) * q.element_size(),
        rounds=5,
    )
