"""jina-vlm's views of a picture, the thumbnail and the overlapping tiles of its plan, beside those of other systems."""

from __future__ import annotations

from .._shared.sizes import checked_picture
from .._shared.views import View, ViewPlan
from .tiling import Tile, TilingGeometry, plan_tiles


def plan_views(width: int, height: int, *, max_crops: int = 12) -> ViewPlan:
    """Plan the crops of a picture of ``width`` x ``height`` pixels.

    Args:
        width, height: the picture, pixels.
        max_crops: most tiles that it is cut into, the thumbnail not counted.

    Raises:
        ValueError: an argument that is no positive integer, more than 256 tiles, or one side more than 200 times the
            other.
    """
    plan = plan_tiles(*checked_picture(width, height), TilingGeometry(max_crops=max_crops))
    side, patches = plan.geometry.base_size, plan.geometry.patches_per_side
    window = plan.geometry.pooling[0] * plan.geometry.patch_size

    def view(tile: Tile | None) -> View:
        frame = (0, 0, plan.width, plan.height) if tile is None else tile.source_box
        place = None if tile is None else (tile.row, tile.col)
        return View(frame, (side, side), (side, side), (patches, patches), place, window)

    tiles = f"1 tile of {side} px" if plan.crops == 2 else f"{plan.rows} x {plan.cols} overlapping tiles"
    return ViewPlan(
        "jina-vlm",
        plan.width,
        plan.height,
        (view(None), *map(view, plan.tiles())),
        # the frame and column tokens around the image tokens are learned rows, not text
        image_tokens=plan.total_tokens,
        marker_tokens=0,
        summary=f"{tiles}, thumbnail",
    )
