"""Idefics2's splitting: four quadrants and the whole picture, each at its own size, 64 tokens each.

Source: Laurençon et al. 2024, sections 3.3 and 3.4; ``split_images`` and ``get_resize_output_image_size`` of the
public processor, which pads the views of a batch to the largest.
"""

from __future__ import annotations

from .._shared.sizes import checked_bool, checked_picture
from .._shared.views import Box, Size, View, ViewPlan

PATCH = 14
SHORTEST_SIDE, LONGEST_SIDE = 378, 980
"""Of a view, pixels."""

LATENTS = 64
"""Tokens that the resampler makes of a view, whatever its size."""


def resized(width: int, height: int) -> Size:
    """(width, height) of a view, whose width may be 0: no side above 980 pixels, then none below 378."""
    aspect_ratio = width / height
    if width >= height and width > LONGEST_SIDE:
        width, height = LONGEST_SIDE, int(LONGEST_SIDE / aspect_ratio)
    elif height > width and height > LONGEST_SIDE:
        width, height = int(LONGEST_SIDE * aspect_ratio), LONGEST_SIDE
    return max(width, SHORTEST_SIDE), max(height, SHORTEST_SIDE)


def plan_views(width: int, height: int, *, split: bool = True) -> ViewPlan:
    """Plan the views of a picture of ``width`` x ``height`` pixels.

    Args:
        width, height: the picture, pixels.
        split: whether it is cut into quadrants too, as after instruction tuning.

    Raises:
        ValueError: a side that is no positive integer, or too low to be split; ``split`` not a bool.
    """
    width, height = checked_picture(width, height)
    whole = (0, 0, width, height)
    frames: list[Box] = [whole]
    if checked_bool("split", split):
        if height < 2:
            # the processor divides by the height of the upper quadrants; those of no width it takes
            raise ValueError(
                f"an image of {width}x{height} pixels cannot be split into quadrants, expected a height of at least 2 "
                "(or split=False)"
            )
        across, down = width // 2, height // 2
        frames = [
            (0, 0, across, down),
            (across, 0, width, down),
            (0, down, across, height),
            (across, down, width, height),
            whole,
        ]
    sizes = [resized(int(right - left), int(bottom - top)) for left, top, right, bottom in frames]
    padded = max(size[0] for size in sizes), max(size[1] for size in sizes)
    views = tuple(
        View(
            frame,
            size,
            padded,
            patches=(size[1] // PATCH, size[0] // PATCH),
            place=None if split and frame is whole else divmod(index, 2),
        )
        for index, (frame, size) in enumerate(zip(frames, sizes, strict=True))
    )
    return ViewPlan(
        "idefics2",
        width,
        height,
        views,
        image_tokens=LATENTS * len(views),
        # one <fake_token_around_image> before each view and one after the last
        marker_tokens=len(views) + 1,
        summary="4 quadrants and the whole picture" if split else "whole, its aspect ratio kept",
        padded_patches=len(views) * (padded[0] // PATCH) * (padded[1] // PATCH),
    )
