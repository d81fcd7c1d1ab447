"""What the pages that show how pictures are cut have in common: colours, type, badges, and pictures put together."""

from __future__ import annotations

import colorsys
import struct
from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

Colour: TypeAlias = tuple[int, int, int]
Size: TypeAlias = tuple[int, int]

MARGIN = 40
GAP = 40

PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 32, 38)
SOFT_INK: Colour = (98, 106, 116)
RULE: Colour = (222, 226, 230)
THUMBNAIL: Colour = (72, 80, 92)
OVERLAP: Colour = (255, 220, 90)
OVERLAP_LEVEL = 84

# in this order each differs plainly from its neighbours in a row, and from those below in rows of 3 or 4
_CODES = "e63946 1d78d8 2a9d4a f58220 9146c8 00a8b5 de3c96 96aa14 3c48be c85a14 14826e aa285a"
PALETTE: tuple[Colour, ...] = tuple(struct.iter_unpack("BBB", bytes.fromhex(_CODES)))


def tile_colours(count: int) -> list[Colour]:
    """As many that tell neighbours apart."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    # steps of the golden ratio keep any number of hues apart
    hues = (colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.8, 0.85) for index in range(count))
    return [(round(red * 255), round(green * 255), round(blue * 255)) for red, green, blue in hues]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, which is there everywhere."""
    return ImageFont.load_default(size=size)


def draw_badge(
    pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: Colour, height: int = 26
) -> None:
    """A number on a rounded square, its top left corner at ``corner``."""
    left, top = corner
    width = height if len(text) < 3 else round(1.46 * height)
    pen.rounded_rectangle((left, top, left + width, top + height), radius=6, fill=colour, outline=PAPER, width=1)
    pen.text((left + width / 2, top + height / 2), text, PAPER, font(round(0.62 * height)), anchor="mm")


def lines_every(image: Image.Image, step: tuple[float, float], level: int, box: tuple[int, int, int, int]) -> None:
    """White lines at multiples of ``step`` (across, down) inside ``box``, as opaque as ``level`` of 255."""
    mask = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(mask)
    left, top, right, bottom = box
    for index in range(1, int((right - left) / step[0]) + 1):
        pen.line((left + index * step[0], top, left + index * step[0], bottom - 1), fill=level)
    for index in range(1, int((bottom - top) / step[1]) + 1):
        pen.line((left, top + index * step[1], right - 1, top + index * step[1]), fill=level)
    image.paste(PAPER, mask=mask)


def hatched(size: Size, ground: Colour, lines: Colour, spacing: int) -> Image.Image:
    """A surface of diagonal lines."""
    # drawn at twice the size because Pillow's lines have no antialiasing
    width, height = 2 * size[0], 2 * size[1]
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for start in range(-height, width, 2 * spacing):
        pen.line((start, height, start + height, 0), fill=255, width=2)
    drawn = Image.new("RGB", size, ground)
    drawn.paste(lines, mask=mask.resize(size, Image.Resampling.BOX))
    return drawn


def titled(title: str, subtitle: str, picture: Image.Image, min_width: int = 0) -> Image.Image:
    """``picture`` under a title and a line that explains it."""
    large, small = font(21), font(15)
    pen = ImageDraw.Draw(picture)
    text_width = int(max(pen.textlength(title, large), pen.textlength(subtitle, small))) + 1
    head = 56 if subtitle else 34
    drawn = Image.new("RGB", (max(picture.width, text_width, min_width), head + picture.height), PAPER)
    pen = ImageDraw.Draw(drawn)
    pen.text((0, 0), title, INK, large)
    pen.text((0, 28), subtitle, SOFT_INK, small)
    drawn.paste(picture, (0, head))
    return drawn


def join(pictures: Sequence[Image.Image], down: bool, gap: int = GAP) -> Image.Image:
    """The pictures in one column, or in one row, ``gap`` pixels apart."""
    steps = [(picture.height if down else picture.width) + gap for picture in pictures]
    length, breadth = sum(steps) - gap, max(picture.width if down else picture.height for picture in pictures)
    drawn = Image.new("RGB", (breadth, length) if down else (length, breadth), PAPER)
    at = 0
    for picture, step in zip(pictures, steps, strict=True):
        drawn.paste(picture, (0, at) if down else (at, 0))
        at += step
    return drawn


def make_page(title: str, body: Image.Image, caption: str, min_width: int = 0) -> Image.Image:
    """``body`` between a heading and a closing line."""
    width = max(min_width, body.width + 2 * MARGIN)
    drawn = Image.new("RGB", (width, 110 + body.height + 80), PAPER)
    pen = ImageDraw.Draw(drawn)
    pen.text((MARGIN, 30), title, INK, font(34))
    pen.line((MARGIN, 86, width - MARGIN, 86), fill=RULE, width=2)
    drawn.paste(body, (MARGIN, 110))
    bottom = 110 + body.height + 20
    pen.line((MARGIN, bottom, width - MARGIN, bottom), fill=RULE, width=2)
    pen.text((MARGIN, bottom + 16), caption, INK, font(20))
    return drawn
