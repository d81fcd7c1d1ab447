"""Computes tower and decoder of the fixtures again, with transformers in float64: python tests/data/verify.py

Prints, for each stored array that SigLIP or Qwen3 have, the largest difference relative to the array's largest value.
Needs torch and transformers; of vlmkern nothing is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

DIRECTORY = Path(__file__).parent
# float64 results were rounded to float32 when they were stored
LIMIT = 1e-6

Weights = dict[str, Tensor]


def main() -> None:
    config = json.loads((DIRECTORY / "tiny378.config.json").read_text(encoding="utf-8"))
    weights = {name: tensor.double() for name, tensor in load_file(DIRECTORY / "tiny378.safetensors").items()}
    tower, decoder = siglip(config["vision_config"], weights), qwen3(config["text_config"], weights)
    worst = 0.0
    for case in ("tiny378_640x480", "tiny378_64x64", "tiny378_text"):
        with np.load(DIRECTORY / f"{case}.npz") as archive:
            stored = {name: torch.from_numpy(archive[name]) for name in archive}
        computed = decoder_stages(decoder, stored)
        if "crops_uint8" in stored:
            computed |= tower_stages(tower, stored["crops_uint8"], config["vision_config"]["vit_layers"])
        for name, value in computed.items():
            error = difference(stored, name, value)
            if error is not None:
                print(f"{case:16} {name:21} {error:.1e}")
                worst = max(worst, error)
    raise SystemExit(f"the largest difference is {worst:.1e}, expected at most {LIMIT:g}" if worst > LIMIT else 0)


def siglip(config: dict[str, Any], weights: Weights) -> torch.nn.Module:
    block, patch = config["block_config"], config["patch_size"]
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=config["hidden_size"],
            intermediate_size=block["ffn_config"]["size"],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=block["attn_config"]["n_heads"],
            image_size=config["input_size"][0],
            patch_size=patch,
            layer_norm_eps=block["lnorm_config"]["eps"],
            vision_use_head=False,
        )
    ).double()
    root, renamed = "model.vision_model.", {}
    conv = weights[f"{root}patch_embed.proj.weight"].view(-1, patch, patch, config["n_channels"]).permute(0, 3, 1, 2)
    renamed["embeddings.patch_embedding.weight"] = conv
    renamed["embeddings.patch_embedding.bias"] = weights[f"{root}patch_embed.proj.bias"]
    renamed["embeddings.position_embedding.weight"] = weights[f"{root}pos_embed"]
    for kind in ("weight", "bias"):
        renamed[f"post_layernorm.{kind}"] = weights[f"{root}post_lnorm.{kind}"]
    for layer in range(config["n_layers"]):
        source, target = f"{root}layers.{layer}.", f"encoder.layers.{layer}."
        for theirs, part in zip("qkv", weights[f"{source}attn.qkv_w.weight"].chunk(3), strict=True):
            renamed[f"{target}self_attn.{theirs}_proj.weight"] = part
            renamed[f"{target}self_attn.{theirs}_proj.bias"] = weights[f"{source}attn.{theirs}_b"]
        for theirs, ours in (
            ("self_attn.out_proj", "attn.out"),
            ("layer_norm1", "attn_lnorm"),
            ("layer_norm2", "ffn_lnorm"),
            ("mlp.fc1", "ffn.up"),
            ("mlp.fc2", "ffn.down"),
        ):
            for kind in ("weight", "bias"):
                renamed[f"{target}{theirs}.{kind}"] = weights[f"{source}{ours}.{kind}"]
    # between versions the body moved into the model itself
    body = getattr(model, "vision_model", model)
    body.load_state_dict(renamed)
    return model.eval()


def qwen3(config: dict[str, Any], weights: Weights) -> torch.nn.Module:
    block = config["block_config"]
    attention = block["attn_config"]
    heads = {"num_attention_heads": attention["n_heads"], "num_key_value_heads": attention["n_kv_heads"]}
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=block["ffn_config"]["size"],
            num_hidden_layers=config["n_layers"],
            **heads,
            head_dim=attention["head_dim"],
            attention_bias=True,
            rms_norm_eps=block["lnorm_config"]["eps"],
            rope_theta=config["rope_theta"],
            max_position_embeddings=config["max_sequence_length"],
            tie_word_embeddings=False,
        )
    ).double()
    root = "model.language_model."
    renamed = {
        "model.embed_tokens.weight": weights[f"{root}embedding.embedding"],
        "model.norm.weight": weights[f"{root}ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    sizes = [attention["head_dim"] * attention[key] for key in ("n_heads", "n_kv_heads", "n_kv_heads")]
    for layer in range(config["n_layers"]):
        source, target = f"{root}layers.{layer}.", f"model.layers.{layer}."
        for theirs, part in zip("qkv", weights[f"{source}attn.qkv_w.weight"].split(sizes), strict=True):
            renamed[f"{target}self_attn.{theirs}_proj.weight"] = part
            renamed[f"{target}self_attn.{theirs}_proj.bias"] = weights[f"{source}attn.{theirs}_b"]
        renamed[f"{target}self_attn.o_proj.bias"] = torch.zeros(config["hidden_size"], dtype=torch.float64)
        up, gate = weights[f"{source}ffn.up.weight"].chunk(2)
        renamed |= {f"{target}mlp.up_proj.weight": up, f"{target}mlp.gate_proj.weight": gate}
        for theirs, ours in (
            ("self_attn.o_proj", "attn.out"),
            ("self_attn.q_norm", "attn.q_lnorm"),
            ("self_attn.k_norm", "attn.k_lnorm"),
            ("input_layernorm", "attn_lnorm"),
            ("post_attention_layernorm", "ffn_lnorm"),
            ("mlp.down_proj", "ffn.down"),
        ):
            renamed[f"{target}{theirs}.weight"] = weights[f"{source}{ours}.weight"]
    model.load_state_dict(renamed)
    return model.eval()


@torch.no_grad()
def tower_stages(model: torch.nn.Module, levels: Tensor, features: list[int]) -> dict[str, Tensor]:
    side = int(levels.shape[2] ** 0.5)
    # what was stored is float32, and so is what the model family computes from pixels
    crops = (levels.float() / 255 * 2 - 1).double().flatten(0, 1)
    patches = crops.view(len(crops), side, side, 14, 14, 3).permute(0, 5, 1, 3, 2, 4)
    states = model(patches.reshape(len(crops), 3, 14 * side, 14 * side), output_hidden_states=True).hidden_states
    blocks = len(states) - 1
    # features count from the post-norm's output at the end of the blocks' outputs
    a, b = (states[1 + feature % (blocks + 1)] for feature in features)
    return {"patch_embed_plus_pos": states[0], "layer0": states[1], "hs_a": a, "hs_b": b}


@torch.no_grad()
def decoder_stages(model: torch.nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the embeddings on, where every row of them is stored; of unpadded sequences."""
    if "embeds" not in stored or not bool(stored["attention_mask"].all()):
        return {}
    embeds = stored["embeds"].double()
    result = model(inputs_embeds=embeds, output_hidden_states=True)
    greedy = model.generate(
        inputs_embeds=embeds, max_new_tokens=stored["greedy_tokens"].shape[1], do_sample=False, eos_token_id=None
    )
    if not torch.equal(greedy, stored["greedy_tokens"]):
        raise SystemExit(f"greedy tokens: got {greedy.tolist()}, expected {stored['greedy_tokens'].tolist()}")
    return {
        "layer0_out": result.hidden_states[1],
        "final_hidden": result.hidden_states[-1],
        "logits": result.logits,
    }


def difference(stored: dict[str, Tensor], name: str, value: Tensor) -> float | None:
    """Relative to the stored array's largest value; None where nothing of it is stored."""
    for key, expected in stored.items():
        base, _, every = key.partition("@")
        if base == name:
            rows = value.reshape(-1, value.shape[-1])[:: int(every or 1)]
            expected = expected.double().reshape(rows.shape)
            return float((rows - expected).abs().max() / expected.abs().max())
    return None


if __name__ == "__main__":
    main()
