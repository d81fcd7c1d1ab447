"""TowerVision's tiling, LLaVA-NeXT's "anyres": the picture on a canvas of 384-pixel tiles, a thumbnail first.

The aspect ratio is kept; what the canvas has beside the picture is black. After the tower, the rows or columns of
features that show nothing but padding are dropped again, and each row ends in a learned newline.

Source: the TowerVision paper, section 2.2 (up to 6 tiles; frames of a video are not tiled); ``select_best_resolution``,
``get_patch_output_size`` and ``unpad_image`` of the public LLaVA-NeXT code; the released TowerVideo is LLaVA-OneVision,
whose ``apply_pooling`` leaves 14 x 14 tokens of a frame.
"""

from __future__ import annotations

import math
from functools import lru_cache

from .._shared.sizes import MAX_TILES, checked_int, checked_picture
from .._shared.views import Box, Grid, Size, View, ViewPlan, split_frame, tiles_named

TILE = 384
PATCHES = 27
"""Along one side of a tile; the last 6 pixels are read by none."""

POOLED = 14
"""Tokens along one side of a video's frame."""


@lru_cache(maxsize=16)
def candidate_grids(max_tiles: int) -> tuple[Grid, ...]:
    """All (rows, cols) with at most ``max_tiles`` tiles, in the order of the released configuration."""
    grids = [(rows, cols) for rows in range(1, max_tiles + 1) for cols in range(1, max_tiles // rows + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def choose_grid(width: int, height: int, max_tiles: int) -> Grid:
    """The (rows, cols) that keeps the most of the picture's pixels, and of those the one that wastes the least."""

    def kept(grid: Grid) -> int:
        scale = min(TILE * grid[1] / width, TILE * grid[0] / height)
        return min(int(width * scale) * int(height * scale), width * height)

    # max() takes the first of equals, and the smallest come first
    return max(candidate_grids(max_tiles), key=kept)


def resized(width: int, height: int, rows: int, cols: int) -> Size:
    """(width, height) that the picture takes on a canvas of ``rows`` x ``cols`` tiles."""
    across, down = TILE * cols / width, TILE * rows / height
    if across < down:
        return TILE * cols, min(math.ceil(height * across), TILE * rows)
    return min(math.ceil(width * down), TILE * cols), TILE * rows


def kept_grid(width: int, height: int, rows: int, cols: int) -> Grid:
    """Rows and columns of features that are left of ``rows`` x ``cols`` tiles without those of padding alone."""
    down, across = PATCHES * rows, PATCHES * cols
    if width / height > across / down:
        # seven digits are part of the definition: quotients that come out just below a whole number count as it
        shown = int(round(height * (across / width), 7))
        return down - 2 * ((down - shown) // 2), across
    shown = int(round(width * (down / height), 7))
    return down, across - 2 * ((across - shown) // 2)


def plan_views(width: int, height: int, *, max_tiles: int = 6) -> ViewPlan:
    """Plan the thumbnail and the tiles of a picture of ``width`` x ``height`` pixels.

    Args:
        width, height: the picture, pixels.
        max_tiles: most tiles of the canvas, the thumbnail not counted.

    Raises:
        ValueError: an argument that is no positive integer, or more than 256 tiles.
    """
    width, height = checked_picture(width, height)
    max_tiles = checked_int("max_tiles", max_tiles, 1, MAX_TILES)
    rows, cols = choose_grid(width, height, max_tiles)
    views = [_view((0, 0, width, height), None), *_tiles(width, height, rows, cols)]
    kept_rows, kept_cols = kept_grid(width, height, rows, cols)
    return ViewPlan(
        "towervision",
        width,
        height,
        tuple(views),
        image_tokens=PATCHES * PATCHES + kept_rows * (kept_cols + 1),
        marker_tokens=0,
        summary=f"{tiles_named(rows, cols)} of {TILE} px, thumbnail",
    )


def plan_frames(width: int, height: int, *, frames: int = 32) -> ViewPlan:
    """Plan the frames of a video of ``width`` x ``height`` pixels, as TowerVideo sees it.

    Args:
        width, height: a frame, pixels.
        frames: how many are shown.

    Raises:
        ValueError: an argument that is no positive integer.
    """
    width, height = checked_picture(width, height)
    frames = checked_int("frames", frames, 1)
    return ViewPlan(
        "towervideo",
        width,
        height,
        (_view((0, 0, width, height), (0, 0), None),) * frames,
        # one newline a video
        image_tokens=frames * POOLED * POOLED + 1,
        marker_tokens=0,
        summary=f"{frames} frames of {TILE} px",
    )


def _tiles(width: int, height: int, rows: int, cols: int) -> list[View]:
    content_width, content_height = resized(width, height, rows, cols)
    # the odd pixel of padding goes to the right and to the bottom
    left, top = (TILE * cols - content_width) // 2, (TILE * rows - content_height) // 2
    across, down = width / content_width, height / content_height
    canvas = (
        -left * across,
        -top * down,
        (TILE * cols - left) * across,
        (TILE * rows - top) * down,
    )
    return [_view(frame, divmod(index, cols)) for index, frame in enumerate(split_frame(canvas, rows, cols))]


def _view(frame: Box, place: Grid | None, token_side: int | None = TILE // PATCHES) -> View:
    return View(frame, (TILE, TILE), (TILE, TILE), (PATCHES, PATCHES), place, token_side)
