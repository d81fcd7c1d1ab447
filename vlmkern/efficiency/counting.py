"""FLOPs counted by running the assembly, on the meta device, where operations have shapes and no values.

torch's FlopCounterMode counts what is dispatched; the formulas of vlmkern's ops are registered with it here, on first
use, because its module imports triton. A multiply-add is two FLOPs; softmax, norms and activations are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._ops import ops
from ..models.jina_vlm import JinaVLM, JinaVLMConfig
from ..models.jina_vlm.cache import KVCache
from ..models.jina_vlm.tiling import TilePlan
from ..models.jina_vlm.vision import run_tower
from ..ops._windows import windows_per_tile
from .formulas import most_square_grid

_LARGE_CACHE = 2**32


def count(call: Callable[[], Any]) -> int:
    """FLOPs of what `call` runs: torch's ops and vlmkern's, causal attention as the half square that it needs."""
    from torch.utils.flop_counter import FlopCounterMode

    register_formulas()
    causal = _CausalAttention()
    with FlopCounterMode(display=False) as counter, causal:
        call()
    return counter.get_total_flops() + causal.flops


@functools.cache
def register_formulas() -> None:
    """Tells torch.utils.flop_counter what vlmkern's ops cost, for any FlopCounterMode from then on."""
    from torch.utils.flop_counter import register_flop_formula

    for op, formula in (
        (ops.attention, _attention),
        (ops.attention_bwd, _attention_bwd),
        (ops.attention_pool, _attention_pool),
        (ops.attention_pool_bwd, _attention_pool_bwd),
        (ops.swiglu_mlp, _swiglu_mlp),
        (ops.swiglu_mlp_bwd, _swiglu_mlp_bwd),
        (ops.linear, _linear),
        (ops.linear_bwd, _linear_bwd),
    ):
        register_flop_formula(op, get_raw=True)(_of_arguments(op.default, formula))


def _of_arguments(op: torch._ops.OpOverload, formula: Callable[..., int]) -> Callable[..., int]:
    # the last one, the backend, changes no count
    count = len(op._schema.arguments) - 1
    return lambda *args, **kwargs: formula(*args[:count], **kwargs)


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


class _CausalAttention(TorchFunctionMode):
    """Counts causal attention of S tokens as 2 * S^2 * D a head. FlopCounterMode would count the whole square, which
    no implementation worth the name computes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or not kwargs.get("is_causal"):
            return function(*args, **kwargs)
        q, k, v = args
        batch, heads, tokens, head_dim = q.shape
        self.flops += batch * heads * tokens * k.shape[2] * (head_dim + v.shape[3])
        return q.new_empty(*q.shape[:3], v.shape[3])


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, *_: Any, **__: Any) -> int:
    """Two products, each of N^2 * H * D multiply-adds an image."""
    *_, heads, head_dim = q.shape
    pairs = q.shape[0] * q.shape[1] ** 2 if cu_seqlens is None else int(cu_seqlens.diff().long().square().sum())
    return 4 * pairs * heads * head_dim


def _attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any, **_: Any
) -> int:
    """Five products: the scores again, and those of the four gradients dP, dV, dQ, dK."""
    return _attention(q, k, v, *args[:2]) // 2 * 5


def _attention_pool(
    features: list[Tensor],
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    grid: list[int],
    num_heads: int,
    window: list[int],
    pad_embed: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    **_: Any,
) -> int:
    """The formula's own form: keys and values of every slot, zero slots too, query and output of every window; scores
    inside windows are left out, as in the paper (5e-5 of the rest). What a backend saves by absorbing weights is not
    seen here."""
    windows = features[0].shape[0] * windows_per_tile(grid, window) if keep is None else len(keep)
    return 2 * windows * (window[0] * window[1] * w_kv.numel() + w_q.numel() + w_o.numel())


def _attention_pool_bwd(grad: Tensor, features: list[Tensor], *args: Any, **_: Any) -> int:
    """Everything again but the output layer, and of each product's two gradients those that are wanted."""
    w_q, _, w_kv, _, w_o, grid, _, window, _pad_embed, _, keep, wanted = args
    windows = features[0].shape[0] * windows_per_tile(grid, window) if keep is None else len(keep)
    slots = windows * window[0] * window[1]
    inputs, (of_q, _, of_kv, _, of_o, _, of_pad) = wanted[: len(features)], wanted[len(features) :]
    products = (1 + of_kv + (any(inputs) or of_pad)) * slots * w_kv.numel()
    products += (1 + of_q + (any(inputs) or of_pad)) * windows * w_q.numel()
    return 2 * (products + (1 + of_o) * windows * w_o.numel())


def _swiglu_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[:-1].numel() * (w_up.numel() + w_down.numel())


def _swiglu_mlp_bwd(
    grad: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, wanted: list[bool], **_: Any
) -> int:
    """The up-projection again and the gradient by its result, then what is wanted."""
    of_x, of_up, of_down, of_b_up, _ = wanted
    again = of_x or of_up or of_down or of_b_up
    products = (again + of_x + of_up) * w_up.numel() + (again + of_down) * w_down.numel()
    return 2 * x.shape[:-1].numel() * products


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[:-1].numel() * weight.numel()


def _linear_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, wanted: list[bool], **_: Any
) -> int:
    """The product again where an activation follows it, then what is wanted."""
    of_x, of_weight, of_bias, _ = wanted
    again = activation != "none" and (of_x or of_weight or of_bias)
    return 2 * x.shape[:-1].numel() * weight.numel() * (again + of_x + of_weight)


def _features(model: JinaVLM, crops: int) -> list[Tensor]:
    config = model.config.vision
    shape = (crops, config.num_patches, config.hidden_size)
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in config.feature_layers]


def _embeds(model: JinaVLM, tokens: int) -> Tensor:
    return torch.empty(1, tokens, model.config.text.hidden_size, dtype=torch.bfloat16, device="meta")
