"""What a vision tower gets to see of one picture: its views, and the tokens that become of them.

A *view* is one input of the tower: a tile, a quadrant, a thumbnail, or the picture itself. A plan says where each lies
on the picture; counts and drawings are both read from it. Sizes are (width, height) and boxes (left, top, right,
bottom), as in Pillow; grids are (rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Box: TypeAlias = tuple[float, float, float, float]
Size: TypeAlias = tuple[int, int]
Grid: TypeAlias = tuple[int, int]


class View(NamedTuple):
    """One input of the tower.

    Attributes:
        frame: what it shows, in the picture's pixels; where it reaches beyond the picture, it is padded.
        size: what the frame is resized to, pixels.
        padded_size: ``size``, and what is added on the right and at the bottom to match the batch's largest view.
        patches: the grid of patches that the tower encodes.
        place: row and column among the views that the picture is cut into; None for a view of the whole picture
            beside such parts.
        token_side: pixels along one side of the square cell that one image token is made of; None if of no one place.
    """

    frame: Box
    size: Size
    padded_size: Size
    patches: Grid
    place: Grid | None = (0, 0)
    token_side: int | None = None

    @property
    def patch_count(self) -> int:
        """Patches that the tower encodes, without those added to match the batch's largest view."""
        rows, cols = self.patches
        return rows * cols


@dataclass(frozen=True)
class ViewPlan:
    """How one system sees a picture of ``width`` x ``height`` pixels; made by the system's ``plan_views``.

    Attributes:
        model: the system's name.
        views: in the order in which the tower gets them.
        image_tokens: rows that the language model reads for the picture, learned newline and column rows included.
        marker_tokens: text tokens that the processor puts around the image tokens.
        summary: the cut in a few words.
        padded_patches: what the tower computes where views are padded to the largest, None where none are.
    """

    model: str
    width: int
    height: int
    views: tuple[View, ...]
    image_tokens: int
    marker_tokens: int
    summary: str
    padded_patches: int | None = None

    @property
    def patches(self) -> int:
        """Patches that the tower encodes, without padding."""
        return sum(view.patch_count for view in self.views)

    @property
    def parts(self) -> list[View]:
        """The views that the picture is cut into."""
        return [view for view in self.views if view.place is not None]

    def describe(self) -> dict[str, str | int]:
        """The counts as plain numbers: what ``vlmkern tokens --model`` prints."""
        counts: dict[str, str | int] = {
            "model": self.model,
            "width": self.width,
            "height": self.height,
            "views": len(self.views),
            "patches": self.patches,
            "image_tokens": self.image_tokens,
        }
        if self.padded_patches is not None:
            counts["padded_patches"] = self.padded_patches
        return counts


def split_frame(frame: Box, rows: int, cols: int) -> list[Box]:
    """``frame`` cut into ``rows`` x ``cols`` equal boxes, row by row; neighbours share their edges exactly."""
    left, top, right, bottom = frame
    xs = [left + (right - left) * col / cols for col in range(cols)] + [right]
    ys = [top + (bottom - top) * row / rows for row in range(rows)] + [bottom]
    return [(xs[col], ys[row], xs[col + 1], ys[row + 1]) for row in range(rows) for col in range(cols)]


def tiles_named(rows: int, cols: int) -> str:
    """``1 tile``, ``2 x 1 tiles``."""
    return "1 tile" if rows * cols == 1 else f"{rows} x {cols} tiles"
