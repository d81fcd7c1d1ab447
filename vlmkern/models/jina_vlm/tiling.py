"""Geometry of overlap-and-resize tiling: which tiles an image is cut into, and which pooled windows survive.

The scheme is Molmo's (Deitke et al. 2024, section 2) with the SigLIP sizes of jina-vlm (Koukounas et al.
2025, section 3). Only integers and a few float32 quotients are needed, so counting tokens and drawing tiles
need no pixels.

A *patch* is 14 x 14 pixels, a *crop* is 27 x 27 patches (378 px), a *window* is one 2 x 2 group of patches
that is pooled into one token. Sizes are in pixels and ordered (height, width) unless a name says otherwise;
boxes are (left, top, right, bottom), as in Pillow.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from .._shared import sizes
from .._shared.section import shown
from .._shared.sizes import checked_int

MAX_TILES = 256
"""Upper bound of ``max_crops``: one strip of 256 tiles almost fills the decoder's 40,960 positions."""

MAX_PIXELS = 1 << 26
"""Most pixels of all crops of an image, 36 times those of 12 tiles as released: they are held in memory as float32."""

MAX_ID = (1 << 31) - 1
"""Highest token id: that of 32-bit tables."""

Box: TypeAlias = tuple[int, int, int, int]
FloatBox: TypeAlias = tuple[float, float, float, float]
Span: TypeAlias = tuple[int, int]


def checked_pair(name: str, value: object, low: int) -> Span:
    """``value`` as two ints of at least ``low``; ValueError naming the argument otherwise."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of integers, got {shown(value)}")
    return checked_int(f"{name}[0]", value[0], low), checked_int(f"{name}[1]", value[1], low)


@dataclass(frozen=True)
class TilingGeometry:
    """The fixed sizes behind every tiling; the defaults are the released ones.

    Args:
        patch_size: side of a patch, pixels.
        base_size: side of a crop, pixels; a multiple of ``patch_size``.
        overlap_margins: patches that a tile shares with the tile before it and with the tile after it.
        pooling: rows and columns of patches in one pooled window.
        max_crops: most tiles an image is cut into, the thumbnail not counted.

    Raises:
        ValueError: an argument of a wrong type or size, named.
    """

    patch_size: int = 14
    base_size: int = 378
    overlap_margins: Span = (4, 4)
    pooling: Span = (2, 2)
    max_crops: int = 12

    def __post_init__(self) -> None:
        checked = {
            "patch_size": checked_int("patch_size", self.patch_size, 1),
            "base_size": checked_int("base_size", self.base_size, 1),
            "overlap_margins": checked_pair("overlap_margins", self.overlap_margins, 0),
            "pooling": checked_pair("pooling", self.pooling, 1),
            "max_crops": checked_int("max_crops", self.max_crops, 1, MAX_TILES),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        pixels = (1 + self.max_crops) * self.base_size**2
        if pixels > MAX_PIXELS:
            raise ValueError(
                f"base_size must be small enough for {MAX_PIXELS} pixels in the thumbnail and max_crops "
                f"{self.max_crops} tiles, got {shown(self.base_size)}"
            )
        if self.base_size % self.patch_size:
            raise ValueError(f"base_size must be a multiple of patch_size {self.patch_size}, got {self.base_size}")
        if sum(self.overlap_margins) >= self.patches_per_side:
            raise ValueError(
                f"overlap_margins must leave room in a crop of {self.patches_per_side} patches, "
                f"got {self.overlap_margins}"
            )
        if any(margin % size for margin in self.overlap_margins for size in self.pooling):
            # a margin that cuts a window in two has no row of windows to start from
            raise ValueError(f"overlap_margins must be multiples of pooling {self.pooling}, got {self.overlap_margins}")

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a crop (27)."""
        return self.base_size // self.patch_size

    @property
    def patches_per_crop(self) -> int:
        """Patches in a crop (729)."""
        return self.patches_per_side**2

    @property
    def window_grid(self) -> Span:
        """Rows and columns of pooled windows in a crop (14, 14); the 27th patch gets windows of its own."""
        rows, cols = self.pooling
        return -(-self.patches_per_side // rows), -(-self.patches_per_side // cols)

    @property
    def windows_per_crop(self) -> int:
        """Pooled windows in a crop (196)."""
        rows, cols = self.window_grid
        return rows * cols

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next (266)."""
        return self.base_size - self.margin

    @property
    def margin(self) -> int:
        """Pixels that neighbouring tiles share (112)."""
        return sum(self.overlap_margins) * self.patch_size

    @property
    def thumbnail_tokens(self) -> int:
        """Tokens of the thumbnail's block: start, rows that each end in a column token, end (212)."""
        rows, cols = self.window_grid
        return 2 + rows * (cols + 1)


RELEASED_GEOMETRY = TilingGeometry()


@lru_cache(maxsize=16)
def candidate_tilings(max_crops: int) -> tuple[Span, ...]:
    """All (rows, cols) with at most ``max_crops`` tiles, the smallest first; 35 of them for 12 tiles."""
    pairs = ((rows, cols) for rows in range(1, max_crops + 1) for cols in range(1, max_crops // rows + 1))
    return tuple(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])))


def choose_tiling(height: int, width: int, geometry: TilingGeometry = RELEASED_GEOMETRY) -> Span:
    """The (rows, cols) of tiles that an image of ``height`` x ``width`` pixels is resized to.

    The tiling that needs the least enlarging wins; where every one shrinks the image, the one that shrinks it
    least. A side shorter than the margins (112 px) gives one tile whatever the other side is.

    Float32 is part of the definition: quotients that differ only beyond it are ties, and ties go to the
    smaller tiling.
    """
    candidates = candidate_tilings(geometry.max_crops)
    scales = [
        min(
            _float32_quotient(geometry.stride * rows, height - geometry.margin),
            _float32_quotient(geometry.stride * cols, width - geometry.margin),
        )
        for rows, cols in candidates
    ]
    enlarging = [scale for scale in scales if scale >= 1]
    return candidates[scales.index(min(enlarging) if enlarging else max(scales))]


def _float32_quotient(numerator: int, denominator: int) -> float:
    """numerator / denominator rounded as one float32 division does; infinite where the denominator is 0."""
    if denominator == 0:
        return math.inf
    # rounding a float64 quotient of two exact float32 values once more is innocuous: 53 >= 2 * 24 + 2
    return struct.unpack("f", struct.pack("f", numerator / denominator))[0]


def checked_size(height: int, width: int) -> Span:
    """(height, width) as ints; ValueError for sides below 1 or an aspect ratio above 200."""
    height, width = checked_int("height", height, 1, sizes.MAX_SIDE), checked_int("width", width, 1, sizes.MAX_SIDE)
    sizes.checked_aspect(height, width)
    return height, width


def smart_resize(
    height: int, width: int, *, factor: int = 14, min_pixels: int = 3136, max_pixels: int = 1_003_520
) -> Span:
    """Size nearest to ``height`` x ``width`` with sides in whole patches and an area within the limits.

    Qwen2-VL's rule (Wang et al. 2024, section 2.1) with the ViT's own patch as the unit.

    Returns:
        (height, width) in pixels, multiples of ``factor``.

    Raises:
        ValueError: an aspect ratio above 200, or a side below 1.
    """
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return sizes.smart_resize(*checked_size(height, width), factor=factor, **limits)


def kept_spans(tiles: int, patches: int, margins: Span, pooling: int) -> tuple[Span, ...]:
    """Pooled windows that each tile along one axis contributes, as (start, count).

    A tile drops the windows that its neighbour covers better: the first ``margins[0]`` patches unless it is
    the first tile, the last ``margins[1]`` unless it is the last. Counts round up, so where windows and
    patches do not line up (27 patches, windows of 2) neighbours keep one patch twice rather than lose it.

    For the released sizes: (0, 14) alone, else (0, 12), then (2, 10) in the middle, and (2, 12) at the end.
    """
    spans = []
    for tile in range(tiles):
        before = 0 if tile == 0 else margins[0]
        after = 0 if tile == tiles - 1 else margins[1]
        spans.append((before // pooling, -(-(patches - before - after) // pooling)))
    return tuple(spans)


class Tile(NamedTuple):
    """One tile of a plan, with what is needed to draw it.

    ``kept_rows`` and ``kept_cols`` are (start, count) in the tile's own window grid; ``grid_row`` and
    ``grid_col`` say where the first kept window lies in the image's grid of kept windows.
    """

    row: int
    col: int
    canvas_box: Box
    source_box: FloatBox
    kept_rows: Span
    kept_cols: Span
    grid_row: int
    grid_col: int

    def keeps(self, window_row: int, window_col: int) -> bool:
        """Whether the window at this row and column of the tile becomes a token."""
        (row, rows), (col, cols) = self.kept_rows, self.kept_cols
        return row <= window_row < row + rows and col <= window_col < col + cols


@dataclass(frozen=True)
class TilePlan:
    """Everything that follows from an image's size; made by :func:`plan_tiles`.

    Attributes:
        width, height: the source image, pixels.
        work_width, work_height: the image that is tiled; differs from the source only with ``do_resize``.
        rows, cols: the tiling.
        kept_rows, kept_cols: (start, count) of kept windows for each row and each column of tiles.
    """

    width: int
    height: int
    work_width: int
    work_height: int
    rows: int
    cols: int
    geometry: TilingGeometry = RELEASED_GEOMETRY
    kept_rows: tuple[Span, ...] = field(init=False)
    kept_cols: tuple[Span, ...] = field(init=False)

    def __post_init__(self) -> None:
        patches, margins, (rows, cols) = (
            self.geometry.patches_per_side,
            self.geometry.overlap_margins,
            self.geometry.pooling,
        )
        object.__setattr__(self, "kept_rows", kept_spans(self.rows, patches, margins, rows))
        object.__setattr__(self, "kept_cols", kept_spans(self.cols, patches, margins, cols))

    @property
    def canvas_width(self) -> int:
        """Width that the image is resized to before it is cut into tiles, pixels."""
        return self.geometry.stride * self.cols + self.geometry.margin

    @property
    def canvas_height(self) -> int:
        """Height that the image is resized to before it is cut into tiles, pixels."""
        return self.geometry.stride * self.rows + self.geometry.margin

    @property
    def crops(self) -> int:
        """Crops that the vision tower sees: the thumbnail and every tile."""
        return 1 + self.rows * self.cols

    @property
    def grid(self) -> Span:
        """Rows and columns of the kept windows of all tiles, joined into one picture."""
        return sum(count for _, count in self.kept_rows), sum(count for _, count in self.kept_cols)

    @property
    def patch_tokens(self) -> int:
        """Tokens that carry an image feature: one per kept window, the thumbnail's included."""
        rows, cols = self.grid
        return self.geometry.windows_per_crop + rows * cols

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole block, start, end and column tokens included; the prompt's BOS is not."""
        rows, cols = self.grid
        return self.geometry.thumbnail_tokens + 2 + rows * (cols + 1)

    def tiles(self) -> list[Tile]:
        """The tiles in the order of the crops after the thumbnail: row by row."""
        base, stride = self.geometry.base_size, self.geometry.stride
        result = []
        grid_row = 0
        for row, kept_rows in enumerate(self.kept_rows):
            grid_col = 0
            for col, kept_cols in enumerate(self.kept_cols):
                left, top = stride * col, stride * row
                box = (left, top, left + base, top + base)
                result.append(Tile(row, col, box, self.to_source(box), kept_rows, kept_cols, grid_row, grid_col))
                grid_col += kept_cols[1]
            grid_row += kept_rows[1]
        return result

    def window_box(self, tile: Tile, window_row: int, window_col: int) -> Box:
        """Canvas box of one pooled window of a tile; the last row and column are cut at the tile's edge."""
        left, top, right, bottom = tile.canvas_box
        height, width = (size * self.geometry.patch_size for size in self.geometry.pooling)
        left, top = left + width * window_col, top + height * window_row
        return left, top, min(left + width, right), min(top + height, bottom)

    def kept_box(self, tile: Tile) -> Box:
        """Canvas box around the kept windows of a tile."""
        (row, rows), (col, cols) = tile.kept_rows, tile.kept_cols
        left, top, _, _ = self.window_box(tile, row, col)
        _, _, right, bottom = self.window_box(tile, row + rows - 1, col + cols - 1)
        return left, top, right, bottom

    def to_source(self, box: Box) -> FloatBox:
        """A canvas box in pixels of the source image; the aspect ratio is not kept."""
        across, down = self.width / self.canvas_width, self.height / self.canvas_height
        left, top, right, bottom = box
        return left * across, top * down, right * across, bottom * down

    def describe(self) -> dict[str, int | list[int]]:
        """The counts as plain numbers: what ``vlmkern tokens --json`` prints."""
        return {
            "width": self.width,
            "height": self.height,
            "tiling": [self.rows, self.cols],
            "crops": self.crops,
            "pooled_windows": self.crops * self.geometry.windows_per_crop,
            "kept_windows": self.patch_tokens,
            "patch_tokens": self.patch_tokens,
            "total_tokens": self.total_tokens,
        }


def plan_tiles(
    width: int,
    height: int,
    geometry: TilingGeometry = RELEASED_GEOMETRY,
    *,
    do_resize: bool = False,
    min_pixels: int = 3136,
    max_pixels: int = 1_003_520,
) -> TilePlan:
    """Plan the tiles of an image of ``width`` x ``height`` pixels.

    Args:
        width, height: the source image, pixels; any sides of at least 1.
        geometry: sizes of patches, crops, margins and windows.
        do_resize: whether :func:`smart_resize` comes first, with the two pixel limits.

    Raises:
        ValueError: a side below 1, or an aspect ratio above 200.
    """
    height, width = checked_size(height, width)
    work = (height, width)
    if do_resize:
        work = smart_resize(height, width, factor=geometry.patch_size, min_pixels=min_pixels, max_pixels=max_pixels)
    rows, cols = choose_tiling(*work, geometry)
    return TilePlan(width, height, work[1], work[0], rows, cols, geometry)
