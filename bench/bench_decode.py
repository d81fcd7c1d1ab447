"""One decoded token behind 1,744 cached ones, Qwen3-1.7B sizes with four layers, against transformers' Qwen3."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import DTYPES, run_case

from vlmkern.models.jina_vlm.config import JinaVLMConfig
from vlmkern.models.jina_vlm.model import JinaVLM

CACHED, LAYERS, VOCABULARY = 1744, 4, 32768
PROVIDERS = ("transformers_sdpa", "transformers_eager", "vlmkern")


def make_model(dtype):
    config = JinaVLMConfig()
    text = dataclasses.replace(config.text, num_layers=LAYERS, vocab_size=VOCABULARY)
    vision = dataclasses.replace(config.vision, num_layers=1, feature_layers=(0, 1), mlp_size=64)
    return JinaVLM.random(dataclasses.replace(config, text=text, vision=vision), dtype=dtype)


def make_transformers(model, implementation):
    transformers = pytest.importorskip("transformers")
    text = model.config.text
    config = transformers.Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.mlp_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        rope_theta=text.rope_theta,
        tie_word_embeddings=False,
        attn_implementation=implementation,
    )
    theirs, ours = transformers.Qwen3ForCausalLM(config).to(model.dtype).eval(), model.model.language_model
    theirs.model.embed_tokens.weight.data = ours.embedding.embedding.data
    theirs.lm_head.weight.data = model.lm_head.weight.data
    theirs.model.norm.weight.data = ours.ln_f.weight.data
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        q, k, v = mine.attn.qkv_w.weight.data.split(mine.attn.sizes)
        up, gate = mine.ffn.up.weight.data.chunk(2)
        for target, weight in (
            (other.input_layernorm, mine.attn_lnorm.weight.data),
            (other.post_attention_layernorm, mine.ffn_lnorm.weight.data),
            (other.self_attn.q_proj, q),
            (other.self_attn.k_proj, k),
            (other.self_attn.v_proj, v),
            (other.self_attn.o_proj, mine.attn.out.weight.data),
            (other.self_attn.q_norm, mine.attn.q_lnorm.weight.data),
            (other.self_attn.k_norm, mine.attn.k_lnorm.weight.data),
            (other.mlp.up_proj, up),
            (other.mlp.gate_proj, gate),
            (other.mlp.down_proj, mine.ffn.down.weight.data),
        ):
            target.weight.data = weight
    return theirs


def our_step(model, prompt, token):
    cache = model.new_cache(1, CACHED + 1)
    model._hidden(prompt, cache=cache)

    def step():
        cache.length = CACHED
        return model(token, cache=cache)[:, -1]

    return step


def their_step(theirs, prompt, token):
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config)
    theirs.model(prompt, past_key_values=cache)

    def step():
        logits = theirs(token, past_key_values=cache).logits[:, -1]
        cache.crop(-1)
        return logits

    return step


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def bench_decode(benchmark, dtype, provider):
    benchmark.group = f"decode|qwen3_1_7b_4_layers_{CACHED}_cached|{dtype}"
    model = make_model(DTYPES[dtype])
    prompt, token = torch.randint(0, VOCABULARY, (1, CACHED)), torch.tensor([[17]])
    theirs = make_transformers(model, "eager" if provider == "transformers_eager" else "sdpa")
    exact = their_step(theirs, prompt, token)().float()
    step = our_step(model, prompt, token) if provider == "vlmkern" else their_step(theirs, prompt, token)
    weights = sum(p.numel() for p in theirs.parameters()) - theirs.model.embed_tokens.weight.numel()
    run_case(
        benchmark,
        provider,
        step,
        exact,
        DTYPES[dtype],
        flops=2 * weights,
        least_bytes=weights * DTYPES[dtype].itemsize,
    )
