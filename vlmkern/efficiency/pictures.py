"""What one picture costs: how each system sees it, as counts in closed form.

The rules are in the rooms of the systems, `vlmkern/models/<system>`; here they are found by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..models._shared.section import shown
from ..models._shared.views import ViewPlan

__all__ = ["SYSTEMS", "image_tokens", "plan_views"]

_ROOMS = {
    "jina-vlm": "jina_vlm.views",
    "qwen2-vl": "qwen2_vl.tiling",
    "internvl2.5": "internvl.tiling",
    "idefics2": "idefics2.tiling",
    "towervision": "towervision.tiling",
}

SYSTEMS = tuple(_ROOMS)
"""Names of the systems, in the order of tables."""


def image_tokens(model: str, width: int, height: int, **options: Any) -> dict[str, str | int]:
    """Counts of one picture of ``width`` x ``height`` pixels, equal to what the system's public processor makes.

    Args:
        model: one of ``SYSTEMS``.
        width, height: the picture, pixels.
        options: jina-vlm ``max_crops=12``; qwen2-vl ``min_pixels=56*56, max_pixels=28*28*1280``; internvl2.5
            ``max_tiles=12``; idefics2 ``split=True``; towervision ``max_tiles=6``.

    Returns:
        ``model``, ``width``, ``height``; ``views``: pictures that the tower sees (tiles, quadrants, thumbnail);
        ``patches`` that it encodes, without padding; ``image_tokens``: rows that the language model reads for the
        picture, learned newline and column rows included, text markers around them not. For idefics2 also
        ``padded_patches``: with the padding to the largest view, as transformers computes it for the picture alone.

    Raises:
        ValueError: no such model or option, a value that it cannot have, a side below 1, or a picture that the
            processor refuses; the message names the model.
    """
    return plan_views(model, width, height, **options).describe()


def plan_views(model: str, width: int, height: int, **options: Any) -> ViewPlan:
    """The views of one picture; arguments and errors are those of :func:`image_tokens`."""
    if not isinstance(model, str) or model not in _ROOMS:
        raise ValueError(f"model: got {shown(model)}, expected one of {', '.join(SYSTEMS)}")
    plan: Callable[..., ViewPlan] = import_module(f"..models.{_ROOMS[model]}", __package__).plan_views
    return plan_with_options(model, plan, width, height, options)


def plan_with_options(
    name: str, plan: Callable[..., ViewPlan], width: int, height: int, options: dict[str, Any]
) -> ViewPlan:
    """What ``plan`` gives; ``ValueError`` naming ``name`` for an option that it has not, or that it refuses."""
    taken = [p.name for p in inspect.signature(plan).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in taken:
            raise ValueError(f"{name}: got option {shown(option)}, expected one of {', '.join(taken)}")
    try:
        return plan(width, height, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
