"""FLOPs counted by running the assembly, on the meta device, where operations have shapes and no values.

torch's FlopCounterMode counts what is dispatched; the formulas of vlmkern's ops are registered with it here, on first
use, because its module imports triton. A multiply-add is two FLOPs; softmax, norms and activations are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..dispatch.providers import Op, known
from ..models.jina_vlm import JinaVLM, JinaVLMConfig
from ..models.jina_vlm.cache import KVCache
from ..models.jina_vlm.tiling import TilePlan
from ..models.jina_vlm.vision import run_tower
from ..ops.attention import flops as attention
from ..ops.attention.problem import Attention
from ..ops.attention_pool import flops as attention_pool
from ..ops.linear import flops as linear
from ..ops.swiglu_mlp import flops as swiglu_mlp
from .formulas import most_square_grid

_LARGE_CACHE = 2**32


def count(call: Callable[[], Any]) -> int:
    """FLOPs of what `call` runs: torch's ops and vlmkern's, causal attention as half of the square."""
    from torch.utils.flop_counter import FlopCounterMode

    register_formulas()
    half = _of_problem(known(ops.attention.default), _half_squares)
    half._get_raw = True
    with FlopCounterMode(display=False, custom_mapping={ops.attention: half}) as counter:
        call()
    return counter.get_total_flops()


@functools.cache
def register_formulas() -> None:
    """Tells torch.utils.flop_counter what vlmkern's ops cost, for any FlopCounterMode from then on."""
    from torch.utils.flop_counter import register_flop_formula

    rooms = {"attention": attention, "attention_pool": attention_pool, "linear": linear, "swiglu_mlp": swiglu_mlp}
    for name, formulas in rooms.items():
        for op_name in (name, f"{name}_bwd", f"{name}_keep"):
            if not hasattr(formulas, op_name):
                continue
            op = getattr(ops, op_name)
            register_flop_formula(op, get_raw=True)(_of_problem(known(op.default), getattr(formulas, op_name)))


def _of_problem(op: Op, formula: Callable[[Any], int]) -> Callable[..., int]:
    # the last argument, the backend, changes no count, nor do results
    count = len(op.problem._fields)
    return lambda *args, **_: formula(op.problem(*args[:count]))


def measured_figures(tiles: int) -> dict[tuple[str, str], tuple[int, int]]:
    """(convention, quantity) -> (unpooled, pooled) of the table's figures that running the released assembly gives, for
    one image of `tiles` tiles and a thumbnail.

    Prompts are those of the processor's own plan ("released") or 182 tokens a crop ("exact", which no processor
    makes). FLOPs are counted on the meta device, bytes are those of caches that are allocated.
    """
    model = meta_model()
    rows, cols = most_square_grid(tiles)
    side = model.config.vision.image_size[0]
    plan = TilePlan(side * cols, side * rows, side * cols, side * rows, rows, cols)
    patches = plan.crops * model.config.vision.num_patches
    published = plan.crops * (model.config.vision.num_patches // 4)
    prefill = {tokens: prefill_flops(model, tokens) for tokens in (patches, published, plan.total_tokens)}
    kept = {tokens: cache_bytes(model.config, tokens) for tokens in prefill}
    tower = tower_flops(model, plan.crops)
    unpooled = tower + unpooled_connector_flops(model, plan.crops) + prefill[patches]
    pooled = tower + connector_flops(model, plan.crops) + prefill[plan.total_tokens]
    return {
        ("exact", "prefill_flops"): (prefill[patches], prefill[published]),
        ("exact", "kv_cache_bytes"): (kept[patches], kept[published]),
        ("released", "visual_tokens"): (patches, plan.total_tokens),
        ("released", "prefill_flops"): (prefill[patches], prefill[plan.total_tokens]),
        ("released", "kv_cache_bytes"): (kept[patches], kept[plan.total_tokens]),
        ("released", "total_flops"): (unpooled, pooled),
    }


def meta_model(config: JinaVLMConfig | None = None) -> JinaVLM:
    """The assembly with weights that have shapes only."""
    with torch.device("meta"):
        return JinaVLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def tower_flops(model: JinaVLM, crops: int, layers: int | None = None) -> int:
    """Patch embedding and tower blocks over `crops` crops: the first `layers`, or those whose output is used."""
    vision = model.model.vision_model
    pixels = torch.empty(crops, vision.config.num_patches, vision.config.patch_dim, device="meta")
    if layers is None:
        return count(lambda: run_tower(vision, pixels))

    def run() -> None:
        x = vision.patch_embed(pixels.to(vision.pos_embed.dtype))
        for block in vision.layers[:layers]:
            x = block(x)

    return count(run)


@torch.no_grad()
def connector_flops(model: JinaVLM, crops: int) -> int:
    """Pooling and projection of every window of `crops` crops."""
    vision = model.model.vision_model
    features = _features(model, crops)
    mask = torch.ones(features[0].shape[:2], device="meta")
    return count(lambda: vision.vl_connector(features, mask))


@torch.no_grad()
def unpooled_connector_flops(model: JinaVLM, crops: int) -> int:
    """A connector without pooling, the reference that the reduction is measured against: the same projector on one
    hidden state of every patch."""
    return count(lambda: model.model.vision_model.vl_connector.projector(_features(model, crops)[0]))


@torch.no_grad()
def prefill_flops(model: JinaVLM, tokens: int) -> int:
    """The decoder over a prompt of `tokens` embeddings, without the embedding table and the head."""
    return count(lambda: model.model.language_model(_embeds(model, tokens)))


@torch.no_grad()
def decode_flops(model: JinaVLM, cached: int) -> int:
    """The decoder for one more token after `cached`."""
    cache = KVCache(model.config.text, 1, cached + 1, torch.bfloat16, "meta")
    cache.begin(1, cached)
    return count(lambda: model.model.language_model(_embeds(model, 1), cache=cache))


def cache_bytes(config: JinaVLMConfig, tokens: int) -> int:
    """Bytes that a bfloat16 cache for `tokens` tokens allocates. The memory is not written, so it costs nothing; caches
    that machines may refuse (from 40,000 released tokens on) are allocated on the meta device."""
    cache = KVCache(config.text, 1, tokens, torch.bfloat16, "meta")
    return cache.nbytes if cache.nbytes > _LARGE_CACHE else KVCache(config.text, 1, tokens, torch.bfloat16).nbytes


def _half_squares(p: Attention) -> int:
    """The op's formula, but 2 * S^2 * D a head for causal attention of S tokens: published figures leave out the other
    half of the diagonal."""
    flops = attention.attention(p)
    batch, tokens, heads, head_dim = p.q.shape if p.cu_seqlens is None else (0, 0, 0, 0)
    square = p.window_right == 0 and p.window_left < 0 and p.k.shape[1] == tokens > 1
    return flops - 2 * batch * tokens * heads * head_dim if square else flops


def _features(model: JinaVLM, crops: int) -> list[Tensor]:
    config = model.config.vision
    shape = (crops, config.num_patches, config.hidden_size)
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in config.feature_layers]


def _embeds(model: JinaVLM, tokens: int) -> Tensor:
    return torch.empty(1, tokens, model.config.text.hidden_size, dtype=torch.bfloat16, device="meta")
