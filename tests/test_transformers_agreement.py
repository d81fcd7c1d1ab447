"""The tower and the decoder against transformers' SigLIP and Qwen3 with the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlmkern.models.jina_vlm import JinaVLM, JinaVLMConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    tiny = JinaVLMConfig.tiny()
    # the patch count is fixed at 378 px in both; two feature slots: the last block and the post-norm's output
    return JinaVLM.random(
        dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, num_layers=6, feature_layers=(-1, -2, -5)))
    )


def copy_linear(target, weight, bias=None):
    target.weight.copy_(weight)
    if bias is not None:
        target.bias.copy_(bias)


@torch.no_grad()
def test_tower_equals_siglip(model):
    ours, config = model.model.vision_model, model.config.vision
    theirs = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=378,
            patch_size=14,
            vision_use_head=False,
        )
    ).eval()
    body = getattr(theirs, "vision_model", theirs)
    patch, channels = config.patch_size, config.num_channels
    conv = ours.patch_embed.proj.weight.view(-1, patch, patch, channels).permute(0, 3, 1, 2)
    copy_linear(body.embeddings.patch_embedding, conv, ours.patch_embed.proj.bias)
    body.embeddings.position_embedding.weight.copy_(ours.pos_embed)
    for mine, other in zip(ours.layers, body.encoder.layers, strict=True):
        copy_linear(other.layer_norm1, mine.attn_lnorm.weight, mine.attn_lnorm.bias)
        copy_linear(other.layer_norm2, mine.ffn_lnorm.weight, mine.ffn_lnorm.bias)
        projections = (other.self_attn.q_proj, other.self_attn.k_proj, other.self_attn.v_proj)
        biases = (mine.attn.q_b, mine.attn.k_b, mine.attn.v_b)
        for target, weight, bias in zip(projections, mine.attn.qkv_w.weight.chunk(3), biases, strict=True):
            copy_linear(target, weight, bias)
        copy_linear(other.self_attn.out_proj, mine.attn.out.weight, mine.attn.out.bias)
        copy_linear(other.mlp.fc1, mine.ffn.up.weight, mine.ffn.up.bias)
        copy_linear(other.mlp.fc2, mine.ffn.down.weight, mine.ffn.down.bias)
    copy_linear(body.post_layernorm, ours.post_lnorm.weight, ours.post_lnorm.bias)

    pixels = torch.rand(2, 3, 378, 378) * 2 - 1
    crops = pixels.view(2, 3, 27, 14, 27, 14).permute(0, 2, 4, 3, 5, 1).reshape(2, 729, 588)
    result = theirs(pixels, output_hidden_states=True)
    normed, last, third = ours(crops)
    torch.testing.assert_close(normed, result.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, result.hidden_states[6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(third, result.hidden_states[3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decoder_equals_qwen3(model):
    ours, config = model.model.language_model, model.config.text
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
            max_position_embeddings=config.max_length,
        )
    ).eval()
    theirs.model.embed_tokens.weight.copy_(ours.embedding.embedding)
    theirs.lm_head.weight.copy_(model.lm_head.weight)
    theirs.model.norm.weight.copy_(ours.ln_f.weight)
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        other.input_layernorm.weight.copy_(mine.attn_lnorm.weight)
        other.post_attention_layernorm.weight.copy_(mine.ffn_lnorm.weight)
        projections = (other.self_attn.q_proj, other.self_attn.k_proj, other.self_attn.v_proj)
        for target, weight in zip(projections, mine.attn.qkv_w.weight.split(mine.attn.sizes), strict=True):
            target.weight.copy_(weight)
        other.self_attn.o_proj.weight.copy_(mine.attn.out.weight)
        other.self_attn.q_norm.weight.copy_(mine.attn.q_lnorm.weight)
        other.self_attn.k_norm.weight.copy_(mine.attn.k_lnorm.weight)
        up, gate = mine.ffn.up.weight.chunk(2)
        other.mlp.up_proj.weight.copy_(up)
        other.mlp.gate_proj.weight.copy_(gate)
        other.mlp.down_proj.weight.copy_(mine.ffn.down.weight)

    ids = torch.randint(0, config.vocab_size, (2, 19))
    ids[1, :5] = 0
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    real = mask.bool()
    logits = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(model(ids, attention_mask=mask)[real], logits[real], rtol=1e-4, atol=1e-4)
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6), expected[:, 19:])
