"""Sizes of pictures: whole numbers checked by name, and the resizing to whole patches that several models share."""

from __future__ import annotations

import math
import operator

from .section import shown

MAX_ASPECT_RATIO = 200
"""Pictures longer than this times their short side are refused: they would be stretched beyond recognition."""

MAX_SIDE = (1 << 31) - 1
"""Of a picture, pixels: sizes are kept as 32-bit integers in Pillow and in files."""

MAX_TILES = 256
"""Most tiles that an option may ask for; the public checkpoints go up to 40."""


def checked_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as an int within [low, high]; ValueError naming the argument otherwise."""
    wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {wanted}, got {shown(number)}")
    return number


def checked_bool(name: str, value: object) -> bool:
    """``value`` if it is True or False; ValueError naming the argument otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def checked_picture(width: object, height: object) -> tuple[int, int]:
    """(width, height) as ints; ValueError naming the side that is no picture's."""
    return checked_int("width", width, 1, MAX_SIDE), checked_int("height", height, 1, MAX_SIDE)


def checked_aspect(height: int, width: int) -> None:
    """ValueError if one side is more than 200 times the other."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"an image of {width}x{height} pixels has an aspect ratio of "
            f"{max(height, width) / min(height, width):.0f}, the limit is {MAX_ASPECT_RATIO}"
        )


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size nearest to ``height`` x ``width`` with sides in multiples of ``factor`` and an area within the limits.

    Source: Qwen2-VL (Wang et al. 2024, section 2.1), ``smart_resize`` of its public image processor.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: one side more than 200 times the other.
    """
    checked_aspect(height, width)
    # round() takes halves to the even neighbour, which is what the trained models saw
    rows, cols = round(height / factor), round(width / factor)
    area = rows * cols * factor * factor
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        cols = max(1, math.floor(width / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, cols = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, cols * factor
