"""A picture of how the image processor cuts a photograph: tiles, overlaps, kept and dropped windows, tokens.

Drawn with Pillow from the processor's own plan (overlap-and-resize, Molmo section 2; jina-vlm section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image, ImageDraw

from ...images import load_image
from .._shared.drawing import (
    GAP,
    INK,
    MARGIN,
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
    join,
    make_page,
    tile_colours,
    titled,
)

if TYPE_CHECKING:
    import os

    from ...images import ImageSource
    from .image_processor import JinaVLMImageProcessor
    from .tiling import Span, TilePlan, TilingGeometry

__all__ = ["draw_crop", "draw_tiling"]

# title, subtitle, picture
Block: TypeAlias = tuple[str, str, Image.Image]

PAGE_WIDTH = 1680
TILE_GAP = 8
INNER_WIDTH = PAGE_WIDTH - 2 * MARGIN
HALF_WIDTH = (INNER_WIDTH - GAP) // 2
NOTE_WIDTH = 340

SHADOW: Colour = (12, 14, 18)
HATCHING: Colour = (150, 156, 164)


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
    colours = tile_colours(plan.rows * plan.cols)
    box = _large_box(plan)
    side_rows, side_cols = geometry.window_grid
    scale = max(1, 270 // geometry.patches_per_side)
    thumbnail = draw_crop(photo, geometry, (0, side_rows), (0, side_cols), THUMBNAIL, scale)
    draw_badge(ImageDraw.Draw(thumbnail), (6, 6), "0", THUMBNAIL)
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
            draw_badge(pen, ((left + right) / 2 - 13, (top + bottom) / 2 - 13), str(number), colour)
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
            draw_badge(pen, (left + 6, top + 6), str(number), colour)
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
    draw_badge(pen, (10, 10), "1", PALETTE[0])
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
        pen.text((62, top + 2), name, INK, font(17))
        pen.text((62, top + 25), meaning, SOFT_INK, font(15))
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
        pen.text((0, top + 6), name, INK if last else SOFT_INK, font(17))
        pen.text((NOTE_WIDTH - 1, top + 6), value, INK, font(17), anchor="ra")
        if not last:
            pen.line((0, top + 33, NOTE_WIDTH - 1, top + 33), fill=RULE)
    return drawn


def _page(plan: TilePlan, large: list[Block], small: list[Block]) -> Image.Image:
    shape = _shape(plan)
    if shape == "tall":
        cells = [titled(*block, NOTE_WIDTH) for block in small]
        notes = join([join(cells[:2], down=False), join(cells[2:], down=False)], down=True)
        body = join([*(titled(*block) for block in large), notes], down=False)
    else:
        cells = [titled(*block) for block in small]
        spare = INNER_WIDTH - sum(cell.width for cell in cells)
        notes = join(cells, down=False, gap=max(GAP, spare // (len(cells) - 1)))
        pictures = [titled(*block, 0 if shape == "wide" else HALF_WIDTH) for block in large]
        body = join([join(pictures, down=shape == "wide"), notes], down=True)

    counts = plan.describe()
    caption = (
        f"{plan.width} x {plan.height} px:  {_tiles(plan)} and a thumbnail, {plan.crops:,} crops.  "
        f"{counts['kept_windows']:,} of {counts['pooled_windows']:,} windows kept.  "
        f"{plan.total_tokens:,} tokens."
    )
    return make_page("From a photograph to image tokens", body, caption, PAGE_WIDTH)


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
