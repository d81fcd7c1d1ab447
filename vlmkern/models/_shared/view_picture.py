"""A picture of how systems see one photograph, side by side: where they cut it, and what their towers get.

Drawn with Pillow from the plans alone, so that nothing is shown that is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from ...images import load_image
from .drawing import (
    INK,
    OVERLAP,
    OVERLAP_LEVEL,
    PALETTE,
    PAPER,
    RULE,
    SOFT_INK,
    THUMBNAIL,
    Colour,
    Size,
    draw_badge,
    font,
    hatched,
    join,
    lines_every,
    make_page,
    tile_colours,
    titled,
)
from .views import Box, View, ViewPlan

if TYPE_CHECKING:
    import os

    from ...images import ImageSource

__all__ = ["draw_views"]

PixelBox: TypeAlias = tuple[int, int, int, int]

PAGE_WIDTH = 1680
CELL = 506
"""Width of a panel; three of them fill a page."""

PHOTO_HEIGHT, VIEWS_HEIGHT = 460, 300
"""Room for the photograph and for the views under it."""

VIEW_GAP, WHOLE_GAP = 5, 16

PADDING: Colour = (240, 242, 244)
PADDING_LINES: Colour = (186, 192, 200)
PATCHES: Colour = (190, 200, 212)
TOKENS: Colour = (29, 120, 216)
LEAST_CELL = 8

_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def draw_views(
    image: ImageSource, plans: Sequence[ViewPlan], path: str | os.PathLike[str] | None = None
) -> Image.Image:
    """Draw how each plan cuts ``image``, in a panel of its own.

    A panel shows the photograph under the borders of its parts, with overlaps and padding; the views as the tower gets
    them, at one scale for all panels; and the counts. The last panel puts the counts side by side, over a legend.

    Args:
        image: anything :func:`vlmkern.images.load_image` takes.
        plans: one or more, of this picture's size.
        path: where to save the page too; the suffix chooses the format, PNG suits it best.

    Returns:
        RGB image, 1,680 pixels wide for two or more plans.

    Raises:
        ValueError: an unusable picture, or a plan of another size.
        TypeError: not a picture.
        OSError: ``path`` cannot be written.
    """
    photo = load_image(image)
    for plan in plans:
        if (plan.width, plan.height) != photo.size:
            raise ValueError(
                f"plans: got one of {plan.width}x{plan.height} for a picture of {photo.width}x{photo.height}"
            )
    columns = min(3, len(plans) + 1)
    summary = titled("Patches and image tokens", "", _summary(plans), CELL)
    scales = _scales(plans)
    rows = []
    for at in range(0, len(plans) + 1, columns):
        of_row = plans[at : at + columns]
        cells = _panels(photo, of_row, *scales) if of_row else []
        if at + columns > len(plans):
            cells.append(summary)
        rows.append(join(_levelled(cells), down=False))
    seen = f"{plans[0].model} sees" if len(plans) == 1 else f"{_WORDS.get(len(plans), len(plans))} systems see"
    caption = (
        f"{photo.width} x {photo.height} px:  {_span([plan.patches for plan in plans])} patches,  "
        f"{_span([plan.image_tokens for plan in plans])} image tokens."
    )
    width = PAGE_WIDTH if columns == 3 else 0
    drawn = make_page(f"How {seen} one photograph", join(rows, down=True), caption, width)
    if path is not None:
        drawn.save(path)
    return drawn


def _scales(plans: Sequence[ViewPlan]) -> tuple[float, float]:
    """Of the photograph and of the views, at which all panels have room for theirs."""
    extents = [(right - left, bottom - top) for left, top, right, bottom in map(_canvas, plans)]
    photo = min(min(CELL / across, PHOTO_HEIGHT / down) for across, down in extents)
    return photo, min(map(_views_scale, plans))


def _panels(photo: Image.Image, plans: Sequence[ViewPlan], scale: float, view_scale: float) -> list[Image.Image]:
    """Of one row of the page: what they show stands at the same heights."""
    photos = [_photo_with_parts(photo, plan, _canvas(plan), scale) for plan in plans]
    views = [_views_apart(photo, plan, view_scale) for plan in plans]
    below = max(picture.height for picture in photos) + 44
    bottom = below + max(picture.height for picture in views) + 20
    shrunk = f"1 : {1 / view_scale:.1f}" if view_scale < 1 else f"{view_scale:.1f} : 1"
    panels = []
    for plan, cut, apart in zip(plans, photos, views, strict=True):
        body = Image.new("RGB", (CELL, bottom + 52), PAPER)
        body.paste(cut, (0, 0))
        body.paste(apart, (0, below))
        ImageDraw.Draw(body).text((0, below - 26), f"what the tower gets, {shrunk}", SOFT_INK, font(15))
        _counts(body, plan, bottom)
        panels.append(titled(plan.model, plan.summary, body))
    return panels


def _canvas(plan: ViewPlan) -> Box:
    """What the parts cover, in the picture's pixels: the picture and its padding."""
    lefts, tops, rights, bottoms = zip(*(part.frame for part in plan.parts), strict=True)
    return min(0, *lefts), min(0, *tops), max(plan.width, *rights), max(plan.height, *bottoms)


def _photo_with_parts(photo: Image.Image, plan: ViewPlan, canvas: Box, scale: float) -> Image.Image:
    def placed(box: Box) -> PixelBox:
        left, top = round((box[0] - canvas[0]) * scale), round((box[1] - canvas[1]) * scale)
        right, bottom = round((box[2] - canvas[0]) * scale), round((box[3] - canvas[1]) * scale)
        return left, top, max(left + 1, right), max(top + 1, bottom)

    drawn = hatched(placed(canvas)[2:], PADDING, PADDING_LINES, 8)
    left, top, right, bottom = placed((0, 0, photo.width, photo.height))
    drawn.paste(photo.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    boxes = [placed(part.frame) for part in plan.parts]
    overlapping = _tint_overlaps(drawn, boxes)
    if len(boxes) == 1:
        _token_lines(drawn, plan.parts[0], boxes[0])
    _borders(drawn, plan, boxes, inset=5 if overlapping else 0)
    return drawn


def _tint_overlaps(drawn: Image.Image, boxes: Sequence[PixelBox]) -> bool:
    """Tints what lies in more than one box; whether there is any."""
    cover = np.zeros((drawn.height, drawn.width), np.uint16)
    for left, top, right, bottom in boxes:
        cover[top:bottom, left:right] += 1
    shared = cover > 1
    drawn.paste(OVERLAP, mask=Image.fromarray(np.where(shared, OVERLAP_LEVEL, 0).astype(np.uint8)))
    return bool(shared.any())


def _borders(drawn: Image.Image, plan: ViewPlan, boxes: Sequence[PixelBox], inset: int) -> None:
    """Borders of the parts, every other one further in by ``inset``, so that none hides another's; then numbers."""
    pen = ImageDraw.Draw(drawn)
    palette = tile_colours(len(boxes))
    for part, (left, top, right, bottom), colour in zip(plan.parts, boxes, palette, strict=True):
        by = inset * (sum(part.place or ()) % 2)
        outline = left + by, top + by, right - 1 - by, bottom - 1 - by
        if outline[0] < outline[2] and outline[1] < outline[3]:
            pen.rectangle(outline, outline=colour, width=3 if min(right - left, bottom - top) >= 24 else 1)
    numbers = [str(index) for index, view in enumerate(plan.views) if view.place is not None]
    for number, (left, top, right, bottom), colour in zip(numbers, boxes, palette, strict=True):
        if len(boxes) == 1 and min(right - left, bottom - top) >= 40:
            draw_badge(pen, (left + 8, top + 8), number, colour)
        elif min(right - left, bottom - top) >= 60:
            draw_badge(pen, ((left + right) / 2 - 13, (top + bottom) / 2 - 13), number, colour)


def _token_lines(drawn: Image.Image, view: View, box: PixelBox) -> None:
    """The cells that become tokens, where they are large enough to be seen."""
    if view.token_side is None:
        return
    step = tuple((box[2 + axis] - box[axis]) * view.token_side / view.size[axis] for axis in (0, 1))
    if min(step) >= LEAST_CELL:
        lines_every(drawn, step, 88, box)


def _extent(plan: ViewPlan) -> tuple[Size, Size, Size, Size]:
    """Of the views apart: rows and columns of parts and their size, that of the whole beside them, and all gaps."""
    places = [part.place or (0, 0) for part in plan.parts]
    rows, cols = (max(place[axis] for place in places) + 1 for axis in (0, 1))
    whole = next((view.padded_size for view in plan.views if view.place is None), (0, 0))
    gaps = VIEW_GAP * (cols - 1) + (WHOLE_GAP if whole[0] else 0), VIEW_GAP * (rows - 1)
    return (rows, cols), plan.parts[0].padded_size, whole, gaps


def _views_scale(plan: ViewPlan) -> float:
    (rows, cols), part, whole, gaps = _extent(plan)
    across = max(1, CELL - gaps[0]) / (cols * part[0] + whole[0])
    down = max(1, VIEWS_HEIGHT - gaps[1]) / max(rows * part[1], whole[1])
    return min(across, down)


def _views_apart(photo: Image.Image, plan: ViewPlan, scale: float) -> Image.Image:
    (rows, cols), part, whole, _ = _extent(plan)

    def scaled(size: Size) -> Size:
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    step = tuple(side + VIEW_GAP for side in scaled(part))
    parts = cols * step[0] - VIEW_GAP, rows * step[1] - VIEW_GAP
    whole_left = parts[0] + WHOLE_GAP
    beside = scaled(whole) if whole[0] else (-WHOLE_GAP, 0)
    drawn = Image.new("RGB", (whole_left + beside[0], max(parts[1], beside[1])), PAPER)
    pen = ImageDraw.Draw(drawn)
    palette = iter(tile_colours(len(plan.parts)))
    for number, view in enumerate(plan.views):
        corner = (whole_left, 0) if view.place is None else (view.place[1] * step[0], view.place[0] * step[1])
        colour = THUMBNAIL if view.place is None else next(palette)
        drawn.paste(_view(photo, view, scaled(view.padded_size), colour), corner)
        if min(scaled(view.size)) >= 34:
            draw_badge(pen, (corner[0] + 5, corner[1] + 5), str(number), colour, height=20)
    return drawn


def _view(photo: Image.Image, view: View, size: Size, colour: Colour) -> Image.Image:
    """One view as the tower gets it, padding included."""
    drawn = hatched(size, PADDING, PADDING_LINES, 5)
    left, top, right, bottom = view.frame
    shown = max(left, 0), max(top, 0), min(right, photo.width), min(bottom, photo.height)
    if shown[0] < shown[2] and shown[1] < shown[3]:
        across = view.size[0] / view.padded_size[0] * size[0] / (right - left)
        down = view.size[1] / view.padded_size[1] * size[1] / (bottom - top)
        x, y = round((shown[0] - left) * across), round((shown[1] - top) * down)
        extent = max(1, round((shown[2] - left) * across) - x), max(1, round((shown[3] - top) * down) - y)
        # bilinear, because the box may be a part of a pixel in very small pictures
        drawn.paste(photo.resize(extent, Image.Resampling.BILINEAR, box=shown), (x, y))
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=colour, width=2 if min(size) >= 24 else 1)
    return drawn


def _counts(body: Image.Image, plan: ViewPlan, top: int) -> None:
    pen = ImageDraw.Draw(body)
    figures = [
        (0, len(plan.views), "view" if len(plan.views) == 1 else "views"),
        (96, plan.patches, "patches"),
        (232, plan.image_tokens, "image tokens"),
    ]
    if plan.padded_patches is not None:
        figures.append((372, plan.padded_patches, "patches, padded"))
    for left, number, label in figures:
        pen.text((left, top), f"{number:,}", INK, font(26))
        pen.text((left, top + 32), label, SOFT_INK, font(15))


def _summary(plans: Sequence[ViewPlan]) -> Image.Image:
    bars, legend = _bars(plans), _legend(plans)
    return join([bars, titled("Legend", "", legend, CELL)], down=True, gap=28)


def _bars(plans: Sequence[ViewPlan]) -> Image.Image:
    """Patches and image tokens of each system, at one scale."""
    left, height = 118, 56
    drawn = Image.new("RGB", (CELL, len(plans) * height), PAPER)
    pen = ImageDraw.Draw(drawn)
    most = max(max(plan.patches, plan.padded_patches or 0, plan.image_tokens) for plan in plans)
    room = CELL - left - 128
    for index, plan in enumerate(plans):
        top = index * height
        pen.text((0, top + 12), plan.model, INK, font(17))
        patches, tokens = (max(1, round(room * count / most)) for count in (plan.patches, plan.image_tokens))
        end, label = patches, f"{plan.patches:,}"
        pen.rectangle((left, top + 2, left + patches, top + 19), fill=PATCHES)
        if plan.padded_patches is not None and plan.padded_patches > plan.patches:
            end, label = round(room * plan.padded_patches / most), f"{label} of {plan.padded_patches:,}"
            drawn.paste(hatched((max(1, end - patches), 18), PADDING, PADDING_LINES, 5), (left + patches + 1, top + 2))
        pen.text((left + end + 8, top + 1), label, SOFT_INK, font(15))
        pen.rectangle((left, top + 24, left + tokens, top + 41), fill=TOKENS)
        pen.text((left + tokens + 8, top + 23), f"{plan.image_tokens:,}", INK, font(15))
        if index < len(plans) - 1:
            pen.line((0, top + height - 7, CELL - 1, top + height - 7), fill=RULE)
    return drawn


def _legend(plans: Sequence[ViewPlan]) -> Image.Image:
    plain = Image.new("RGB", (40, 40), (146, 170, 150))
    entries: list[tuple[Image.Image, str]] = []

    def framed(colour: Colour, number: str) -> Image.Image:
        drawn = plain.copy()
        pen = ImageDraw.Draw(drawn)
        pen.rectangle((0, 0, 39, 39), outline=colour, width=3)
        draw_badge(pen, (10, 10), number, colour, height=20)
        return drawn

    entries.append((framed(PALETTE[1], "1"), "part; number = its place among the views"))
    if any(view.place is None for plan in plans for view in plan.views):
        entries.append((framed(THUMBNAIL, "0"), "the whole picture, beside its parts"))
    if any(_overlapping(plan) for plan in plans):
        entries.append(
            (Image.blend(plain, Image.new("RGB", plain.size, OVERLAP), OVERLAP_LEVEL / 255), "shared by parts")
        )
    if any(_padded(plan) for plan in plans):
        entries.append((hatched(plain.size, PADDING, PADDING_LINES, 6), "padding: computed, shows nothing"))
    if any(len(plan.parts) == 1 and plan.parts[0].token_side for plan in plans):
        cells = plain.copy()
        lines_every(cells, (13, 13), 150, (0, 0, 40, 40))
        entries.append((cells, "cell that becomes one image token"))
    both = Image.new("RGB", (40, 40), PAPER)
    pen = ImageDraw.Draw(both)
    pen.rectangle((0, 2, 39, 17), fill=PATCHES)
    pen.rectangle((0, 22, 24, 37), fill=TOKENS)
    entries.append((both, "patches encoded, image tokens"))

    drawn = Image.new("RGB", (CELL, len(entries) * 48 - 8), PAPER)
    pen = ImageDraw.Draw(drawn)
    for index, (picture, meaning) in enumerate(entries):
        drawn.paste(picture, (0, index * 48))
        pen.text((56, index * 48 + 20), meaning, INK, font(16), anchor="lm")
    return drawn


def _overlapping(plan: ViewPlan) -> bool:
    left, top, right, bottom = _canvas(plan)
    covered = sum((r - x) * (b - y) for x, y, r, b in (part.frame for part in plan.parts))
    return covered > (right - left) * (bottom - top) * (1 + 1e-6)


def _padded(plan: ViewPlan) -> bool:
    slack = 1e-6 * max(plan.width, plan.height)
    left, top, right, bottom = _canvas(plan)
    beyond = min(left, top) < -slack or right > plan.width + slack or bottom > plan.height + slack
    return beyond or any(view.size != view.padded_size for view in plan.views)


def _levelled(cells: Sequence[Image.Image]) -> list[Image.Image]:
    """Each as wide as a panel."""
    levelled = []
    for cell in cells:
        drawn = Image.new("RGB", (CELL, cell.height), PAPER)
        drawn.paste(cell, (0, 0))
        levelled.append(drawn)
    return levelled


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
