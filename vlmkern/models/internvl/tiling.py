"""InternVL 2.5's dynamic tiling: the grid of the nearest aspect ratio, tiles of 448 pixels, a thumbnail last.

Source: Chen et al. 2024, section 3.1; ``get_optimal_tiled_canvas`` and ``crop_image_to_patches`` of the public
processor, ``dynamic_preprocess`` of the authors' code. The aspect ratio is not kept.
"""

from __future__ import annotations

from functools import lru_cache

from .._shared.sizes import MAX_TILES, checked_int, checked_picture
from .._shared.views import Grid, View, ViewPlan, split_frame, tiles_named

TILE = 448
PATCHES = 32
"""Along one side of a tile."""

TOKENS = 16
"""Along one side of a tile, after the pixel-unshuffle by 2."""

_MARKERS = 2  # <img> and </img>


@lru_cache(maxsize=16)
def candidate_grids(max_tiles: int) -> tuple[Grid, ...]:
    """All (rows, cols) with at most ``max_tiles`` tiles, the smallest first, of one size the tallest first."""
    grids = [(rows, cols) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, max_tiles: int) -> Grid:
    """The (rows, cols) whose aspect ratio is nearest to the picture's.

    Of grids that are equally near, a larger one is taken while the picture has more than half of its pixels.
    """
    best, nearest = (1, 1), float("inf")
    for rows, cols in candidate_grids(max_tiles):
        distance = abs(width / height - cols / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * TILE * TILE * rows * cols):
            best, nearest = (rows, cols), distance
    return best


def plan_views(width: int, height: int, *, max_tiles: int = 12) -> ViewPlan:
    """Plan the tiles of a picture of ``width`` x ``height`` pixels, and the thumbnail if there are several.

    Args:
        width, height: the picture, pixels.
        max_tiles: most tiles that it is cut into, the thumbnail not counted.

    Raises:
        ValueError: an argument that is no positive integer, or more than 256 tiles.
    """
    width, height = checked_picture(width, height)
    max_tiles = checked_int("max_tiles", max_tiles, 1, MAX_TILES)
    rows, cols = choose_grid(width, height, max_tiles)
    whole = (0, 0, width, height)

    def view(frame: tuple[float, float, float, float], place: Grid | None) -> View:
        return View(frame, (TILE, TILE), (TILE, TILE), (PATCHES, PATCHES), place, TILE // TOKENS)

    views = [view(frame, divmod(index, cols)) for index, frame in enumerate(split_frame(whole, rows, cols))]
    summary = f"{tiles_named(rows, cols)} of {TILE} px"
    if len(views) > 1:
        views.append(view(whole, None))
        summary += ", thumbnail"
    return ViewPlan("internvl2.5", width, height, tuple(views), len(views) * TOKENS * TOKENS, _MARKERS, summary)
