"""A picture of how the image processor cuts a photograph: tiles, overlaps, kept and dropped windows, token grid.

Drawn with Pillow from the processor's own plan (overlap-and-resize, Molmo section 2; jina-vlm section 3).
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from vlmkern.images import load_image

if TYPE_CHECKING:
    import os

    from vlmkern.images import ImageSource
    from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor
    from vlmkern.models.jina_vlm.tiling import Span, TilePlan, TilingGeometry

__all__ = ["draw_crop", "draw_tiling"]

Colour: TypeAlias = tuple[int, int, int]
Size: TypeAlias = tuple[int, int]

PAGE_WIDTH = 1680
MARGIN = 40
GAP = 40
TILE_GAP = 8

PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 32, 38)
SOFT_INK: Colour = (98, 106, 116)
RULE: Colour = (222, 226, 230)
THUMBNAIL: Colour = (72, 80, 92)
OVERLAP: Colour = (255, 214, 64)
SHADOW: Colour = (12, 14, 18)

# in this order each differs plainly from the ones before and after it, and from those a row of 3 or 4 further on
PALETTE: tuple[Colour, ...] = (
    (230, 57, 70),
    (29, 120, 216),
    (42, 157, 74),
    (245, 130, 32),
    (145, 70, 200),
    (0, 168, 181),
    (222, 60, 150),
    (150, 170, 20),
    (60, 72, 190),
    (200, 90, 20),
    (20, 130, 110),
    (170, 40, 90),
)


def draw_tiling(
    image: ImageSource, image_processor: JinaVLMImageProcessor, path: str | os.PathLike[str] | None = None
) -> Image.Image:
    """Draw what ``image_processor`` makes of ``image``.

    The page shows the photograph under its tile grid with the overlaps tinted; each tile apart, as the vision
    tower gets it, with its windows, the dropped ones darkened and hatched; the thumbnail; the kept windows
    joined to the grid of image tokens; a legend; and the counts.

    Args:
        image: anything :func:`vlmkern.images.load_image` takes.
        image_processor: gives the plan; its settings decide the tiling.
        path: where to save the page too; the suffix chooses the format, PNG suits it best.

    Returns:
        RGB image, at least 1680 pixels wide.

    Raises:
        ValueError: an unusable picture, or one side more than 200 times the other.
        TypeError: not a picture.
        OSError: ``path`` cannot be written.
    """
    photo = load_image(image)
    plan = image_processor.plan(*photo.size)
    page = _page(plan, *_blocks(photo, plan))
    if path is not None:
        page.save(path)
    return page


def draw_crop(
    crop: Image.Image,
    geometry: TilingGeometry,
    kept_rows: Span,
    kept_cols: Span,
    colour: Colour = THUMBNAIL,
    scale: int = 7,
) -> Image.Image:
    """Draw one crop with its window grid; windows outside the kept ranges are darkened and hatched.

    Args:
        crop: the crop's pixels, any size.
        geometry: patches and windows of a crop.
        kept_rows, kept_cols: (start, count) of kept windows along each axis.
        colour: border of the crop and of its kept windows.
        scale: side of one patch in the drawing, pixels.

    Returns:
        RGB image with sides of ``scale`` pixels for each patch.
    """
    side = geometry.patches_per_side * scale
    clear = crop.resize((side, side), Image.Resampling.LANCZOS)
    drawn = Image.blend(clear, Image.new("RGB", clear.size, SHADOW), 0.72)
    drawn.paste((150, 156, 164), mask=_hatching(clear.size, max(4, scale)).point(lambda level: level // 3))
    left, right = _edges(kept_cols, geometry.pooling[1], scale, side)
    top, bottom = _edges(kept_rows, geometry.pooling[0], scale, side)
    drawn.paste(clear.crop((left, top, right, bottom)), (left, top))

    height, width = (size * scale for size in geometry.pooling)
    if min(height, width) >= 6:
        lines = Image.new("L", clear.size, 0)
        pen = ImageDraw.Draw(lines)
        for x in range(width, side, width):
            pen.line((x, 0, x, side), fill=88)
        for y in range(height, side, height):
            pen.line((0, y, side, y), fill=88)
        drawn.paste(PAPER, mask=lines)
    pen = ImageDraw.Draw(drawn)
    if (right - left, bottom - top) != (side, side):
        pen.rectangle((left, top, right - 1, bottom - 1), outline=PAPER, width=1 if scale < 6 else 2)
    pen.rectangle((0, 0, side - 1, side - 1), outline=colour, width=2 if scale < 6 else 3)
    return drawn


@dataclass(frozen=True)
class _Block:
    title: str
    subtitle: str
    picture: Image.Image


def _blocks(photo: Image.Image, plan: TilePlan) -> tuple[list[_Block], list[_Block]]:
    """The two large pictures, and the four small ones."""
    geometry = plan.geometry
    canvas = photo.resize((plan.canvas_width, plan.canvas_height), Image.Resampling.BILINEAR)
    colours = _tile_colours(plan.rows * plan.cols)
    box = _large_box(plan)
    side_rows, side_cols = geometry.window_grid
    thumbnail = draw_crop(photo, geometry, (0, side_rows), (0, side_cols), THUMBNAIL, 270 // geometry.patches_per_side)
    _badge(ImageDraw.Draw(thumbnail), (6, 6), "0", THUMBNAIL)
    rows, cols = plan.grid
    large = [
        _Block(
            "The photograph and its tiles",
            f"{plan.width} x {plan.height} px, {_count(plan.rows * plan.cols, 'tile')}",
            _photo_with_tiles(photo, plan, colours, box),
        ),
        _Block(
            "Each tile with its windows",
            f"{geometry.base_size} x {geometry.base_size} px, {side_rows} x {side_cols} windows",
            _tiles_apart(canvas, plan, colours, box),
        ),
    ]
    small = [
        _Block("The thumbnail", "the whole picture, all windows kept", thumbnail),
        _Block(f"The {rows} x {cols} image tokens", "kept windows of all tiles, joined", _token_grid(canvas, plan, colours)),
        _Block("Legend", "", _legend(plan)),
        _Block("Numbers", "", _numbers(plan)),
    ]
    return large, small


def _large_box(plan: TilePlan) -> Size:
    """Room for each of the two large pictures."""
    inner = PAGE_WIDTH - 2 * MARGIN
    if _is_wide(plan):
        return inner, 700
    # tiles of 7 pixels a patch, up to a page that still fits a screen
    height = plan.rows * (7 * plan.geometry.patches_per_side + TILE_GAP) - TILE_GAP
    if _is_tall(plan):
        return 360, min(1100, max(700, height))
    return (inner - GAP) // 2, min(1100, max(583, height))


def _is_wide(plan: TilePlan) -> bool:
    return plan.cols >= 6


def _is_tall(plan: TilePlan) -> bool:
    return plan.rows >= 2 * plan.cols


def _photo_with_tiles(photo: Image.Image, plan: TilePlan, colours: Sequence[Colour], box: Size) -> Image.Image:
    scale = min(box[0] / photo.width, box[1] / photo.height)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    drawn = photo.resize(size, Image.Resampling.LANCZOS)
    across, down = size[0] / plan.canvas_width, size[1] / plan.canvas_height

    shared = Image.new("L", size, 0)
    pen = ImageDraw.Draw(shared)
    stride, margin = plan.geometry.stride, plan.geometry.margin
    for col in range(1, plan.cols):
        pen.rectangle((stride * col * across, 0, (stride * col + margin) * across - 1, size[1]), fill=112)
    for row in range(1, plan.rows):
        pen.rectangle((0, stride * row * down, size[0], (stride * row + margin) * down - 1), fill=112)
    drawn.paste(OVERLAP, mask=shared)

    pen = ImageDraw.Draw(drawn)
    tiles = plan.tiles()
    for tile, colour in zip(tiles, colours, strict=True):
        # every other border lies further in, so that neighbours do not hide each other's lines
        inset = 5 * ((tile.row + tile.col) % 2)
        left, top, right, bottom = tile.canvas_box
        outline = (
            round(left * across) + inset,
            round(top * down) + inset,
            round(right * across) - 1 - inset,
            round(bottom * down) - 1 - inset,
        )
        if outline[0] < outline[2] and outline[1] < outline[3]:
            pen.rectangle(outline, outline=colour, width=3)
    for number, (tile, colour) in enumerate(zip(tiles, colours, strict=True), 1):
        left, top, right, bottom = tile.canvas_box
        centre = (left + right) / 2 * across, (top + bottom) / 2 * down
        if (right - left) * across >= 60 and (bottom - top) * down >= 60:
            _badge(pen, (centre[0] - 13, centre[1] - 13), str(number), colour)
    return drawn


def _tiles_apart(canvas: Image.Image, plan: TilePlan, colours: Sequence[Colour], box: Size) -> Image.Image:
    patches = plan.geometry.patches_per_side
    room = (
        (box[0] - TILE_GAP * (plan.cols - 1)) // (plan.cols * patches),
        (box[1] - TILE_GAP * (plan.rows - 1)) // (plan.rows * patches),
    )
    scale = max(1, min(room))
    step = scale * patches + TILE_GAP
    drawn = Image.new("RGB", (plan.cols * step - TILE_GAP, plan.rows * step - TILE_GAP), PAPER)
    pen = ImageDraw.Draw(drawn)
    for number, (tile, colour) in enumerate(zip(plan.tiles(), colours, strict=True), 1):
        crop = draw_crop(canvas.crop(tile.canvas_box), plan.geometry, tile.kept_rows, tile.kept_cols, colour, scale)
        left, top = tile.col * step, tile.row * step
        drawn.paste(crop, (left, top))
        if scale >= 3:
            _badge(pen, (left + 6, top + 6), str(number), colour)
    return drawn


def _token_grid(canvas: Image.Image, plan: TilePlan, colours: Sequence[Colour]) -> Image.Image:
    rows, cols = plan.grid
    cell = max(2, min(10, 372 // cols, 272 // rows))
    drawn = Image.new("RGB", (cols * cell, rows * cell), PAPER)
    pen = ImageDraw.Draw(drawn)
    for tile, colour in zip(plan.tiles(), colours, strict=True):
        (_, height), (_, width) = tile.kept_rows, tile.kept_cols
        # one colour a window: the mean of its pixels
        windows = canvas.crop(plan.kept_box(tile)).resize((width, height), Image.Resampling.BOX)
        left, top = tile.grid_col * cell, tile.grid_row * cell
        drawn.paste(windows.resize((width * cell, height * cell), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left, top, left + width * cell - 1, top + height * cell - 1), outline=colour, width=2)
    return drawn


def _legend(plan: TilePlan) -> Image.Image:
    geometry = plan.geometry
    rows, cols = (size * geometry.patch_size for size in geometry.pooling)
    plain = Image.new("RGB", (54, 54), (146, 170, 150))
    swatch, scale = (0, 2), 27 // geometry.patches_per_side or 1
    del swatch, scale
    entries: list[tuple[Image.Image, str, str]] = []
    tile = plain.copy()
    pen = ImageDraw.Draw(tile)
    pen.rectangle((0, 0, 53, 53), outline=PALETTE[0], width=3)
    _badge(pen, (14, 14), "1", PALETTE[0])
    entries.append((tile, "tile", "number = its place among the crops"))
    if plan.rows * plan.cols > 1:
        shared = Image.blend(plain, Image.new("RGB", plain.size, OVERLAP), 112 / 255)
        entries.append((shared, "overlap", f"{geometry.margin} px that neighbouring tiles share"))
    kept = plain.copy()
    _window_lines(kept)
    entries.append((kept, "kept window", f"{cols} x {rows} px, pooled to one image token"))
    if plan.patch_tokens < plan.crops * geometry.windows_per_crop:
        dropped = Image.blend(plain, Image.new("RGB", plain.size, SHADOW), 0.72)
        dropped.paste((150, 156, 164), mask=_hatching(dropped.size, 7).point(lambda level: level // 3))
        _window_lines(dropped)
        entries.append((dropped, "dropped window", "a neighbour covers it, no token"))

    drawn = Image.new("RGB", (400, len(entries) * 68 - 14), PAPER)
    pen = ImageDraw.Draw(drawn)
    for index, (picture, name, meaning) in enumerate(entries):
        top = index * 68
        drawn.paste(picture, (0, top))
        pen.text((70, top + 6), name, INK, _font(18))
        pen.text((70, top + 30), meaning, SOFT_INK, _font(15))
    return drawn


def _numbers(plan: TilePlan) -> Image.Image:
    counts = plan.describe()
    rows, cols = plan.grid
    lines = [
        ("photograph", f"{plan.width} x {plan.height} px"),
        ("resized to", f"{plan.canvas_width} x {plan.canvas_height} px"),
        ("tiling, rows x columns", f"{plan.rows} x {plan.cols}"),
        ("crops with thumbnail", f"{plan.crops:,}"),
        ("windows kept", f"{counts['kept_windows']:,} of {counts['pooled_windows']:,}"),
        ("image tokens", f"{plan.patch_tokens:,}"),
        ("frame and column tokens", f"{plan.total_tokens - plan.patch_tokens:,}"),
        ("tokens in the prompt", f"{plan.total_tokens:,}"),
    ]
    drawn = Image.new("RGB", (400, len(lines) * 34), PAPER)
    pen = ImageDraw.Draw(drawn)
    for index, (name, value) in enumerate(lines):
        top = index * 34
        last = index == len(lines) - 1
        pen.text((0, top + 6), name, INK if last else SOFT_INK, _font(17))
        pen.text((399, top + 6), value, INK, _font(17), anchor="ra")
        if not last:
            pen.line((0, top + 33, 399, top + 33), fill=RULE)
    return drawn


def _page(plan: TilePlan, large: list[_Block], small: list[_Block]) -> Image.Image:
    if _is_wide(plan):
        body = _column([*(_titled(block) for block in large), _row([_titled(block) for block in small])])
    elif _is_tall(plan):
        cells = [_titled(block) for block in small]
        body = _row([*(_titled(block) for block in large), _column([_row(cells[:2]), _row(cells[2:])])])
    else:
        body = _column([_row([_titled(block) for block in large]), _row([_titled(block) for block in small])])

    counts = plan.describe()
    caption = (
        f"{plan.width} x {plan.height} px:  {plan.rows} x {plan.cols} tiles and a thumbnail, {plan.crops:,} crops.  "
        f"{counts['kept_windows']:,} of {counts['pooled_windows']:,} windows kept.  {plan.total_tokens:,} tokens."
    )
    width = max(PAGE_WIDTH, body.width + 2 * MARGIN)
    page = Image.new("RGB", (width, 110 + body.height + 80), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 30), "From a photograph to image tokens", INK, _font(34))
    pen.line((MARGIN, 86, width - MARGIN, 86), fill=RULE, width=2)
    page.paste(body, (MARGIN, 110))
    bottom = 110 + body.height + 20
    pen.line((MARGIN, bottom, width - MARGIN, bottom), fill=RULE, width=2)
    pen.text((MARGIN, bottom + 16), caption, INK, _font(20))
    return page


def _titled(block: _Block) -> Image.Image:
    pen = ImageDraw.Draw(block.picture)
    title, subtitle = _font(21), _font(15)
    width = max(pen.textlength(block.title, title), pen.textlength(block.subtitle, subtitle))
    head = 56 if block.subtitle else 34
    drawn = Image.new("RGB", (max(block.picture.width, int(width) + 1), head + block.picture.height), PAPER)
    pen = ImageDraw.Draw(drawn)
    pen.text((0, 0), block.title, INK, title)
    if block.subtitle:
        pen.text((0, 28), block.subtitle, SOFT_INK, subtitle)
    drawn.paste(block.picture, (0, head))
    return drawn


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    drawn = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    left = 0
    for picture in pictures:
        drawn.paste(picture, (left, 0))
        left += picture.width + GAP
    return drawn


def _column(pictures: Sequence[Image.Image]) -> Image.Image:
    height = sum(picture.height for picture in pictures) + GAP * (len(pictures) - 1)
    drawn = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER)
    top = 0
    for picture in pictures:
        drawn.paste(picture, (0, top))
        top += picture.height + GAP
    return drawn


def _edges(kept: Span, pooling: int, scale: int, side: int) -> Span:
    start, count = kept
    return start * pooling * scale, min((start + count) * pooling * scale, side)


def _hatching(size: Size, spacing: int) -> Image.Image:
    """Diagonal lines as a mask, drawn at twice the size because Pillow's lines have no antialiasing."""
    width, height = 2 * size[0], 2 * size[1]
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for start in range(-height, width, 2 * spacing):
        pen.line((start, height, start + height, 0), fill=255, width=2)
    return mask.resize(size, Image.Resampling.BOX)


def _window_lines(swatch: Image.Image) -> None:
    lines = Image.new("L", swatch.size, 0)
    pen = ImageDraw.Draw(lines)
    for at in range(0, swatch.width + 1, 18):
        at = min(at, swatch.width - 1)
        pen.line((at, 0, at, swatch.height), fill=120)
        pen.line((0, at, swatch.width, at), fill=120)
    swatch.paste(PAPER, mask=lines)


def _badge(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: Colour) -> None:
    left, top = corner
    width = 26 if len(text) < 3 else 38
    pen.rounded_rectangle((left, top, left + width, top + 26), radius=6, fill=colour, outline=PAPER, width=1)
    pen.text((left + width / 2, top + 13), text, PAPER, _font(16), anchor="mm")


def _tile_colours(count: int) -> list[Colour]:
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    # steps of the golden ratio keep any number of hues apart
    hues = (colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.8, 0.85) for index in range(count))
    return [(round(red * 255), round(green * 255), round(blue * 255)) for red, green, blue in hues]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
