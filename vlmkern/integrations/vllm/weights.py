"""The released checkpoint's tensors under the names of the served model, all of them accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ...models.jina_vlm import CheckpointError, JinaVLM, JinaVLMConfig

# the decoder's tensors that keep their shape, by the part of the name after the layer
_RENAMED = {
    "attn_lnorm.weight": "input_layernorm.weight",
    "attn.q_lnorm.weight": "self_attn.q_norm.weight",
    "attn.k_lnorm.weight": "self_attn.k_norm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "ffn_lnorm.weight": "post_attention_layernorm.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
_BIASES = ("attn.q_b", "attn.k_b", "attn.v_b")
_TEXT = "model.language_model."
_VISION = "model.vision_model."
_TABLES = (f"{_TEXT}embedding.embedding", f"{_TEXT}embedding.new_embedding")
_LISTED = 20


def served(config: JinaVLMConfig, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensors to those of the served model.

    The decoder's fused matrices are split into the ones that transformers' Qwen3 has, since tensor parallelism,
    quantisation and adapters go by those; the two embedding tables become one. Vision blocks after the last hidden
    state that is used are left out.

    Args:
        weights: names and tensors of a released checkpoint, in any order.

    Yields:
        Names below `vision_model.` (as in the checkpoint) and `language_model.` (as in Qwen3) with their tensors;
        splits are views.

    Raises:
        CheckpointError: a tensor that is missing, unknown, of another shape, or a decoder bias that is not zero
            (Qwen3 has none). All missing ones are listed, at the end.
    """
    expected = _expected(config)
    waiting: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in weights:
        if name not in expected:
            raise CheckpointError(f"{name}: not a tensor of this model")
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(f"{name}: got shape {list(tensor.shape)}, expected {list(expected[name])}")
        seen.add(name)
        if name in _TABLES:
            waiting[name] = tensor
            if len(waiting) == len(_TABLES):
                yield "language_model.model.embed_tokens.weight", torch.cat([waiting.pop(part) for part in _TABLES])
        elif name.startswith(_VISION):
            if _needed(config, name.removeprefix(_VISION)):
                yield f"vision_model.{name.removeprefix(_VISION)}", tensor
        else:
            yield from _decoder(config, name, tensor)
    missing = [name for name in expected if name not in seen]
    if missing:
        rest = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise CheckpointError(f"{len(missing)} tensors are missing: {', '.join(missing[:_LISTED])}{rest}")


def last_block(config: JinaVLMConfig) -> int:
    """Index of the last vision block whose output, or whose norm, is used."""
    return min(max(config.vision.feature_slots), config.vision.num_layers - 1)


def uses_post_norm(config: JinaVLMConfig) -> bool:
    """Whether the norm after the last vision block is among the features."""
    return config.vision.num_layers in config.vision.feature_slots


def _expected(config: JinaVLMConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in JinaVLM(config).state_dict().items()}


def _needed(config: JinaVLMConfig, name: str) -> bool:
    part, *rest = name.split(".")
    if part == "layers":
        return int(rest[0]) <= last_block(config)
    return part != "post_lnorm" or uses_post_norm(config)


def _decoder(config: JinaVLMConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name == "lm_head.weight":
        yield "language_model.lm_head.weight", tensor
        return
    if name == f"{_TEXT}ln_f.weight":
        yield "language_model.model.norm.weight", tensor
        return
    _, layer, part = name.removeprefix(_TEXT).split(".", 2)
    prefix = f"language_model.model.layers.{layer}."
    if part in _BIASES:
        if tensor.count_nonzero():
            raise CheckpointError(f"{name}: got values other than zero, expected zeros: served decoders have no biases")
    elif part == "attn.qkv_w.weight":
        text = config.text
        q_size, kv_size = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        for projection, rows in zip("qkv", tensor.split((q_size, kv_size, kv_size)), strict=True):
            yield f"{prefix}self_attn.{projection}_proj.weight", rows
    elif part == "ffn.up.weight":
        # rows of the value first, then those of the gate
        for projection, rows in zip(("up", "gate"), tensor.chunk(2), strict=True):
            yield f"{prefix}mlp.{projection}_proj.weight", rows
    else:
        yield prefix + _RENAMED[part], tensor
