"""A picture of how the image processor cuts a photograph: tiles, overlaps, kept and dropped windows, tokens.

Drawn with Pillow from the processor's own plan (overlap-and-resize, Molmo section 2; jina-vlm section 3).
"""

from __future__ import annotations

import colorsys
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from ...images import load_image

if TYPE_CHECKING:
    import os

    from ...images import ImageSource
    from .image_processor import JinaVLMImageProcessor
    from .tiling import Span, TilePlan, TilingGeometry

__all__ = ["draw_crop", "draw_tiling"]

Colour: TypeAlias = tuple[int, int, int]
Size: TypeAlias = tuple[int, int]
# title, subtitle, picture
Block: TypeAlias = tuple[str, str, Image.Image]

PAGE_WIDTH = 1680
MARGIN = 40
GAP = 40
TILE_GAP = 8
INNER_WIDTH = PAGE_WIDTH - 2 * MARGIN
HALF_WIDTH = (INNER_WIDTH - GAP) // 2
NOTE_WIDTH = 340

PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 32, 38)
SOFT_INK: Colour = (98, 106, 116)
RULE: Colour = (222, 226, 230)
THUMBNAIL: Colour = (72, 80, 92)
OVERLAP: Colour = (255, 220, 90)
OVERLAP_LEVEL = 84
SHADOW: Colour = (12, 14, 18)
HATCHING: Colour = (150, 156, 164)

# in this order each differs plainly from its neighbours in a row, and from those below in rows of 3 or 4
_CODES = "e63946 1d78d8 2a9d4a f58220 9146c8 00a8b5 de3c96 96aa14 3c48be c85a14 14826e aa285a"
PALETTE: tuple[Colour, ...] = tuple(struct.iter_unpack("BBB", bytes.fromhex(_CODES)))


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
    height, width = (size * scale for size in geometry.pooling)
    if min(height, width) >= 6:
        _window_lines(clear, (width, height), 88)
    drawn = _darkened(clear, max(4, scale))
    left, right = _edges(kept_cols, geometry.pooling[1], scale, side)
    top, bottom = _edges(kept_rows, geometry.pooling[0], scale, side)
    drawn.paste(clear.crop((left, top, right, bottom)), (left, top))

    pen = ImageDraw.Draw(drawn)
    if (right - left, bottom - top) != (side, side):
        pen.rectangle((left, top, right - 1, bottom - 1), outline=PAPER, width=1 if scale < 6 else 2)
    pen.rectangle((0, 0, side - 1, side - 1), outline=colour, width=2 if scale < 6 else 3)
    return drawn


def _blocks(photo: Image.Image, plan: TilePlan) -> tuple[list[Block], list[Block]]:
    """The two large pictures, and the four small ones."""
    geometry = plan.geometry
    canvas = photo.resize((plan.canvas_width, plan.canvas_height), Image.Resampling.BILINEAR)
    colours = _tile_colours(plan.rows * plan.cols)
    box = _large_box(plan)
    side_rows, side_cols = geometry.window_grid
    scale = max(1, 270 // geometry.patches_per_side)
    thumbnail = draw_crop(photo, geometry, (0, side_rows), (0, side_cols), THUMBNAIL, scale)
    _badge(ImageDraw.Draw(thumbnail), (6, 6), "0", THUMBNAIL)
    rows, cols = plan.grid
    joined = _token_grid(canvas, plan, colours)
    large = [
        (
            "The photograph and its tiles",
            f"{plan.width} x {plan.height} px, {_tiles(plan)}",
            _photo_with_tiles(photo, plan, colours, box),
        ),
        (
            "Each tile with its windows",
            f"{geometry.base_size} x {geometry.base_size} px, {side_rows} x {side_cols} windows",
            _tiles_apart(canvas, plan, colours, box),
        ),
    ]
    small = [
        ("The thumbnail", "the whole picture, all windows kept", thumbnail),
        (f"The tile grid, {rows} x {cols} tokens", "kept windows of all tiles, joined", joined),
        ("Legend", "", _legend(plan)),
        ("Numbers", "", _numbers(plan)),
    ]
    return large, small


def _large_box(plan: TilePlan) -> Size:
    """Room for each large picture: the page's width if wide, a narrow column if tall, else half a page."""
    shape = _shape(plan)
    if shape == "wide":
        return INNER_WIDTH, 500
    if shape == "tall":
        return 400, min(1100, max(700, plan.rows * (7 * plan.geometry.patches_per_side + TILE_GAP)))
    return HALF_WIDTH, HALF_WIDTH


def _shape(plan: TilePlan) -> str:
    """How the page is laid out: "tall", "wide" or "even"."""
    if plan.rows >= 2 * plan.cols or plan.height >= 6 * plan.width:
        return "tall"
    return "wide" if plan.cols >= 6 or plan.width >= 6 * plan.height else "even"


def _photo_with_tiles(photo: Image.Image, plan: TilePlan, colours: Sequence[Colour], box: Size) -> Image.Image:
    scale = min(box[0] / photo.width, box[1] / photo.height)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    drawn = photo.resize(size, Image.Resampling.LANCZOS)
    across, down = size[0] / plan.canvas_width, size[1] / plan.canvas_height

    shared = Image.new("L", size, 0)
    pen = ImageDraw.Draw(shared)
    stride, margin = plan.geometry.stride, plan.geometry.margin
    for start in range(stride, stride * plan.cols, stride):
        pen.rectangle((start * across, 0, (start + margin) * across - 1, size[1]), fill=OVERLAP_LEVEL)
    for start in range(stride, stride * plan.rows, stride):
        pen.rectangle((0, start * down, size[0], (start + margin) * down - 1), fill=OVERLAP_LEVEL)
    drawn.paste(OVERLAP, mask=shared)

    pen = ImageDraw.Draw(drawn)
    for number, (tile, colour) in enumerate(zip(plan.tiles(), colours, strict=True), 1):
        # every other border lies further in, so that neighbours do not hide each other's lines
        inset = 5 * ((tile.row + tile.col) % 2)
        left, right = (round(x * across) for x in tile.canvas_box[::2])
        top, bottom = (round(y * down) for y in tile.canvas_box[1::2])
        outline = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
        if outline[0] < outline[2] and outline[1] < outline[3]:
            pen.rectangle(outline, outline=colour, width=3)
        if min(right - left, bottom - top) >= 60:
            _badge(pen, ((left + right) / 2 - 13, (top + bottom) / 2 - 13), str(number), colour)
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
        crop = canvas.crop(tile.canvas_box)
        left, top = tile.col * step, tile.row * step
        drawn.paste(draw_crop(crop, plan.geometry, tile.kept_rows, tile.kept_cols, colour, scale), (left, top))
        if scale >= 3:
            _badge(pen, (left + 6, top + 6), str(number), colour)
    return drawn


def _token_grid(canvas: Image.Image, plan: TilePlan, colours: Sequence[Colour]) -> Image.Image:
    rows, cols = plan.grid
    cell = max(2, min(18, 372 // cols, 272 // rows))
    drawn = Image.new("RGB", (cols * cell, rows * cell), PAPER)
    pen = ImageDraw.Draw(drawn)
    for tile, colour in zip(plan.tiles(), colours, strict=True):
        (_, height), (_, width) = tile.kept_rows, tile.kept_cols
        # about the mean colour of each window; the half windows at the far edges are taken for whole ones
        windows = canvas.crop(plan.kept_box(tile)).resize((width, height), Image.Resampling.BOX)
        left, top = tile.grid_col * cell, tile.grid_row * cell
        drawn.paste(windows.resize((width * cell, height * cell), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left, top, left + width * cell - 1, top + height * cell - 1), outline=colour, width=2)
    return drawn


def _legend(plan: TilePlan) -> Image.Image:
    geometry = plan.geometry
    rows, cols = (size * geometry.patch_size for size in geometry.pooling)
    plain = Image.new("RGB", (46, 46), (146, 170, 150))
    entries: list[tuple[Image.Image, str, str]] = []
    tile = plain.copy()
    pen = ImageDraw.Draw(tile)
    pen.rectangle((0, 0, 45, 45), outline=PALETTE[0], width=3)
    _badge(pen, (10, 10), "1", PALETTE[0])
    entries.append((tile, "tile", "number = its place among the crops"))
    if plan.rows * plan.cols > 1:
        shared = Image.blend(plain, Image.new("RGB", plain.size, OVERLAP), OVERLAP_LEVEL / 255)
        entries.append((shared, "overlap", f"{geometry.margin} px that neighbouring tiles share"))
    kept = plain.copy()
    _window_lines(kept, (18, 18), 120)
    entries.append((kept, "kept window", f"{cols} x {rows} px, pooled to one image token"))
    if plan.patch_tokens < plan.crops * geometry.windows_per_crop:
        entries.append((_darkened(kept, 7), "dropped window", "a neighbour covers it, no token"))
    if any(geometry.patches_per_side % size for size in geometry.pooling):
        cut = kept.copy()
        ImageDraw.Draw(cut).rectangle((26, 0, 45, 45), fill=PAPER)
        entries.append((cut, "edge window", "cut by the crop, filled up with zeros"))

    drawn = Image.new("RGB", (NOTE_WIDTH, len(entries) * 56 - 10), PAPER)
    pen = ImageDraw.Draw(drawn)
    for index, (picture, name, meaning) in enumerate(entries):
        top = index * 56
        drawn.paste(picture, (0, top))
        pen.text((62, top + 2), name, INK, _font(17))
        pen.text((62, top + 25), meaning, SOFT_INK, _font(15))
    return drawn


def _numbers(plan: TilePlan) -> Image.Image:
    counts = plan.describe()
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
    drawn = Image.new("RGB", (NOTE_WIDTH, len(lines) * 34), PAPER)
    pen = ImageDraw.Draw(drawn)
    for index, (name, value) in enumerate(lines):
        top = index * 34
        last = index == len(lines) - 1
        pen.text((0, top + 6), name, INK if last else SOFT_INK, _font(17))
        pen.text((NOTE_WIDTH - 1, top + 6), value, INK, _font(17), anchor="ra")
        if not last:
            pen.line((0, top + 33, NOTE_WIDTH - 1, top + 33), fill=RULE)
    return drawn


def _page(plan: TilePlan, large: list[Block], small: list[Block]) -> Image.Image:
    shape = _shape(plan)
    if shape == "tall":
        cells = [_titled(block, NOTE_WIDTH) for block in small]
        notes = _join([_join(cells[:2], down=False), _join(cells[2:], down=False)], down=True)
        body = _join([*map(_titled, large), notes], down=False)
    else:
        cells = [_titled(block) for block in small]
        spare = INNER_WIDTH - sum(cell.width for cell in cells)
        notes = _join(cells, down=False, gap=max(GAP, spare // (len(cells) - 1)))
        pictures = [_titled(block, 0 if shape == "wide" else HALF_WIDTH) for block in large]
        body = _join([_join(pictures, down=shape == "wide"), notes], down=True)

    counts = plan.describe()
    caption = (
        f"{plan.width} x {plan.height} px:  {_tiles(plan)} and a thumbnail, {plan.crops:,} crops.  "
        f"{counts['kept_windows']:,} of {counts['pooled_windows']:,} windows kept.  "
        f"{plan.total_tokens:,} tokens."
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


def _titled(block: Block, min_width: int = 0) -> Image.Image:
    title, subtitle, picture = block
    large, small = _font(21), _font(15)
    pen = ImageDraw.Draw(picture)
    text_width = int(max(pen.textlength(title, large), pen.textlength(subtitle, small))) + 1
    head = 56 if subtitle else 34
    drawn = Image.new("RGB", (max(picture.width, text_width, min_width), head + picture.height), PAPER)
    pen = ImageDraw.Draw(drawn)
    pen.text((0, 0), title, INK, large)
    pen.text((0, 28), subtitle, SOFT_INK, small)
    drawn.paste(picture, (0, head))
    return drawn


def _join(pictures: Sequence[Image.Image], down: bool, gap: int = GAP) -> Image.Image:
    """The pictures in one column, or in one row, ``gap`` pixels apart."""
    steps = [(picture.height if down else picture.width) + gap for picture in pictures]
    length, breadth = sum(steps) - gap, max(picture.width if down else picture.height for picture in pictures)
    drawn = Image.new("RGB", (breadth, length) if down else (length, breadth), PAPER)
    at = 0
    for picture, step in zip(pictures, steps, strict=True):
        drawn.paste(picture, (0, at) if down else (at, 0))
        at += step
    return drawn


def _edges(kept: Span, pooling: int, scale: int, side: int) -> Span:
    start, count = kept
    return start * pooling * scale, min((start + count) * pooling * scale, side)


def _darkened(image: Image.Image, spacing: int) -> Image.Image:
    # the hatching is drawn at twice the size because Pillow's lines have no antialiasing
    width, height = 2 * image.width, 2 * image.height
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for start in range(-height, width, 2 * spacing):
        pen.line((start, height, start + height, 0), fill=85, width=2)
    drawn = Image.blend(image, Image.new("RGB", image.size, SHADOW), 0.72)
    drawn.paste(HATCHING, mask=mask.resize(image.size, Image.Resampling.BOX))
    return drawn


def _window_lines(image: Image.Image, window: Size, level: int) -> None:
    lines = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(lines)
    for x in range(window[0], image.width, window[0]):
        pen.line((x, 0, x, image.height), fill=level)
    for y in range(window[1], image.height, window[1]):
        pen.line((0, y, image.width, y), fill=level)
    image.paste(PAPER, mask=lines)


def _tiles(plan: TilePlan) -> str:
    return f"{plan.rows} x {plan.cols} tiles" if plan.rows * plan.cols > 1 else "1 tile"


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
