"""What one picture costs a released model: FLOPs by part, and the bytes of its keys and values.

The prompt is the picture and 64 tokens of text, and the language model's head computes the logits of the last token.
What a part computes is what transformers computes, with one exception: views are not padded to the largest, unless that
is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models._shared.section import shown
from .architectures import ARCHITECTURES, Architecture
from .pictures import plan_views, plan_with_options

__all__ = ["MODELS", "TEXT_TOKENS", "flops_by_part", "picture_efficiency"]

TEXT_TOKENS = 64
"""Of the prompt, beside the picture and its markers."""

MODELS = tuple(ARCHITECTURES)
"""Names of the released models, in the order of tables."""

VISION_PARTS = ("patch_embed", "encoder_proj", "encoder_attention", "encoder_mlp", "connector")
LANGUAGE_PARTS = ("language_proj", "language_attention", "language_mlp")


def picture_efficiency(model: str, width: int, height: int, *, padded: bool = False, **options: Any) -> dict[str, Any]:
    """FLOPs and KV bytes of one picture of ``width`` x ``height`` pixels in one of ``MODELS``.

    Args:
        model: one of ``MODELS``. towervideo-2b takes the picture for a frame of a video of ``frames=32``.
        width, height: the picture, pixels.
        padded: whether views are computed with the padding to the largest, as transformers does it (idefics2 alone).
        options: those that :func:`image_tokens` has for the model's system.

    Returns:
        ``model``, ``width``, ``height``, ``image_tokens``; ``flops`` by part (``VISION_PARTS`` and ``LANGUAGE_PARTS``,
        the head counted with the projections) and their sums ``vision_flops`` and ``language_flops``;
        ``kv_cache_bytes`` of the picture's tokens and the markers around them, in 2 bytes a value.

    Raises:
        ValueError: no such model, padding where there is none, or what :func:`image_tokens` refuses.
    """
    if not isinstance(model, str) or model not in ARCHITECTURES:
        raise ValueError(f"model: got {shown(model)}, expected one of {', '.join(MODELS)}")
    architecture = ARCHITECTURES[model]
    if architecture.plan is None:
        plan = plan_views(architecture.system, width, height, **options)
    else:
        plan = plan_with_options(model, architecture.plan, width, height, options)
    views = [view.patch_count for view in plan.views]
    if padded:
        if plan.padded_patches is None:
            raise ValueError(f"{model}: got padded=True, expected False: its views are all of one size")
        views = [plan.padded_patches // len(views)] * len(views)
    tokens = plan.image_tokens + plan.marker_tokens
    flops = flops_by_part(architecture, views, tokens + TEXT_TOKENS)
    return {
        "model": model,
        "width": plan.width,
        "height": plan.height,
        "image_tokens": plan.image_tokens,
        "flops": flops,
        "vision_flops": sum(flops[part] for part in VISION_PARTS),
        "language_flops": sum(flops[part] for part in LANGUAGE_PARTS),
        "kv_cache_bytes": architecture.decoder.kv_bytes(tokens),
    }


def flops_by_part(architecture: Architecture, views: Sequence[int], prompt_tokens: int) -> dict[str, int]:
    """FLOPs of views of so many patches each, and of a prefill of ``prompt_tokens`` tokens."""
    encoder, connector, decoder = architecture.encoder, architecture.connector, architecture.decoder
    return {
        "patch_embed": encoder.patch_embed(views),
        "encoder_proj": encoder.projections(views),
        "encoder_attention": encoder.attention(views),
        "encoder_mlp": encoder.mlps(views),
        "connector": connector.flops(views),
        "language_proj": decoder.projections(prompt_tokens) + decoder.head(),
        "language_attention": decoder.attention(prompt_tokens),
        "language_mlp": decoder.mlps(prompt_tokens),
    }
