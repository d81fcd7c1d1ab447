"""A prompt through the decoder, Qwen3-1.7B sizes with four layers, against transformers' Qwen3."""

from __future__ import annotations

import pytest
import torch
from bench_decode import LAYERS, VOCABULARY, make_model, make_transformers
from cases import DTYPES, run_case

import vlmkern

SHAPES = {"424_tokens": 424, "1744_tokens": 1744}  # one tile, twelve tiles
PROVIDERS = ("transformers_sdpa", "transformers_eager", "vlmkern")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def bench_prefill(benchmark, shape, dtype, provider):
    tokens = SHAPES[shape]
    benchmark.group = f"prefill|qwen3_1_7b_4_layers_{shape}|{dtype}"
    model = make_model(DTYPES[dtype])
    ids = torch.randint(0, VOCABULARY, (1, tokens))
    theirs = make_transformers(model, "eager" if provider == "transformers_eager" else "sdpa")
    exact = theirs.model(ids).last_hidden_state.float()
    decoder = model.model.language_model
    if provider == "vlmkern":
        vlmkern.pack(decoder)
    embeds = decoder.embedding(ids)
    call = (lambda: decoder(embeds)) if provider == "vlmkern" else (lambda: theirs.model(ids).last_hidden_state)
    text = model.config.text
    weights = sum(p.numel() for p in theirs.model.layers.parameters())
    attention = LAYERS * 2 * tokens**2 * text.num_heads * text.head_dim
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=2 * weights * tokens + attention,
        least_bytes=weights * DTYPES[dtype].itemsize,
        rounds=3,
    )
