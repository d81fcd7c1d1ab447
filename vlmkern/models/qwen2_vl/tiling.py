"""Qwen2-VL's dynamic resolution: the picture whole, resized to whole cells of 28 x 28 pixels, one token a cell.

Source: Wang et al. 2024, section 2.1; ``smart_resize`` and ``get_number_of_image_patches`` of the public processor,
whose default limits these are. The paper's own were 100 to 16,384 cells (section 3.3.1).
"""

from __future__ import annotations

from .._shared.sizes import checked_int, checked_picture, smart_resize
from .._shared.views import View, ViewPlan

PATCH = 14
MERGE = 2
"""Patches along one side of a cell that the merger joins to one token."""

_MARKERS = 2  # <|vision_start|> and <|vision_end|>


def plan_views(width: int, height: int, *, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280) -> ViewPlan:
    """Plan the one view of a picture of ``width`` x ``height`` pixels.

    Args:
        width, height: the picture, pixels.
        min_pixels, max_pixels: limits of the area that it is resized to.

    Raises:
        ValueError: an argument that is no positive integer, or one side more than 200 times the other.
    """
    width, height = checked_picture(width, height)
    limits = {
        "min_pixels": checked_int("min_pixels", min_pixels, 1),
        "max_pixels": checked_int("max_pixels", max_pixels, 1),
    }
    resized_height, resized_width = smart_resize(height, width, factor=PATCH * MERGE, **limits)
    size = resized_width, resized_height
    patches = resized_height // PATCH, resized_width // PATCH
    cells = patches[0] // MERGE, patches[1] // MERGE
    view = View((0, 0, width, height), size, size, patches, token_side=PATCH * MERGE)
    return ViewPlan(
        "qwen2-vl",
        width,
        height,
        (view,),
        image_tokens=cells[0] * cells[1],
        marker_tokens=_MARKERS,
        summary=f"whole, resized to {resized_width} x {resized_height} px",
    )
