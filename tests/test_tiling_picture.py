"""The tiling picture: its size, its marks, and that no shape of photograph breaks it."""

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor  # noqa: E402
from vlmkern.models.jina_vlm.tiling import RELEASED_GEOMETRY  # noqa: E402
from vlmkern.models.jina_vlm.tiling_picture import PALETTE, draw_crop, draw_tiling  # noqa: E402


def grey(width, height, level=200):
    return Image.new("RGB", (width, height), (level, level, level))


def has_colour(page, colour):
    return bool((np.asarray(page) == np.array(colour, np.uint8)).all(axis=-1).any())


# 1x1, 1x1, 3x4, 4x3, 12x1, 1x12, 2x6, 5x2 and the longest strips that are accepted
@pytest.mark.parametrize(
    "size",
    [
        (64, 64),
        (378, 378),
        (1024, 768),
        (768, 1024),
        (300, 3600),
        (3600, 300),
        (1800, 600),
        (500, 1400),
        (2000, 100),
        (100, 2000),
        (1, 1),
        (200, 1),
        (1, 200),
    ],
)
def test_any_shape_gives_a_page(size):
    page = draw_tiling(grey(*size), JinaVLMImageProcessor())
    assert page.mode == "RGB"
    assert page.width >= 1000 and 400 <= page.height <= 2000


def test_every_tile_has_its_own_colour_on_the_page():
    page = draw_tiling(grey(1024, 768), JinaVLMImageProcessor())
    assert len(set(PALETTE)) == len(PALETTE) == 12
    for colour in PALETTE:
        assert has_colour(page, colour)


def test_more_tiles_than_the_palette_holds():
    processor = JinaVLMImageProcessor(max_crops=30)
    assert draw_tiling(grey(2400, 1400), processor).width >= 1000


@pytest.mark.parametrize("scale", [2, 5, 7, 18])
def test_dropped_windows_are_darker_than_kept_ones(scale):
    kept_rows, kept_cols = (2, 10), (0, 12)
    drawn = draw_crop(grey(378, 378), RELEASED_GEOMETRY, kept_rows, kept_cols, PALETTE[0], scale)
    assert drawn.size == (27 * scale, 27 * scale)
    levels = np.asarray(drawn.convert("L"), dtype=float)
    window, border = 2 * scale, 4
    top, bottom, right = 2 * window, 12 * window, 12 * window
    kept = levels[top + border : bottom - border, border : right - border]
    dropped = [
        levels[border : top - border],
        levels[bottom + border : -border],
        levels[:, right + border : -border],
    ]
    assert kept.min() >= 199
    for part in dropped:
        assert part.size == 0 or part.mean() < 0.6 * kept.mean()


def test_a_crop_that_keeps_all_windows_is_nowhere_darker():
    drawn = draw_crop(grey(378, 378), RELEASED_GEOMETRY, (0, 14), (0, 14), PALETTE[1], 7)
    assert np.asarray(drawn.convert("L"))[4:-4, 4:-4].min() >= 199


def test_the_page_darkens_just_the_share_that_is_dropped():
    processor = JinaVLMImageProcessor()
    dark = {}
    for size in ((378, 378), (1024, 768)):
        page = np.asarray(draw_tiling(grey(*size), processor).convert("L"), dtype=int)
        # right half, above the legend: nothing but the tiles drawn apart
        tiles = page[180:740, 860:1600]
        dark[size] = (tiles < 120).mean()
    assert dark[(378, 378)] < 0.02
    assert 0.2 < dark[(1024, 768)] < 0.5


def test_overlaps_are_tinted_on_a_white_photograph():
    page = np.asarray(draw_tiling(Image.new("RGB", (900, 300), "white"), JinaVLMImageProcessor()), dtype=int)
    photograph = page[190:400, 60:800]
    yellow = (photograph[..., 0] == 255) & (photograph[..., 2] < 230)
    # two of the overlaps of 112 px on a canvas of 910 px
    assert yellow.mean() == pytest.approx(2 * 112 / 910, abs=0.05)


def test_saved_file_holds_the_returned_page(tmp_path):
    path = tmp_path / "tiling.png"
    page = draw_tiling(grey(640, 480), JinaVLMImageProcessor(), path)
    with Image.open(path) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(page))


def test_arrays_and_other_modes_are_taken():
    processor = JinaVLMImageProcessor()
    array = np.full((480, 640, 3), 90, np.uint8)
    page = draw_tiling(array, processor)
    assert np.array_equal(np.asarray(page), np.asarray(draw_tiling(Image.fromarray(array), processor)))
    assert draw_tiling(Image.new("L", (640, 480), 90), processor).tobytes() == page.tobytes()


def test_too_long_a_strip_is_refused():
    with pytest.raises(ValueError, match="aspect ratio"):
        draw_tiling(grey(2010, 10), JinaVLMImageProcessor())


def test_the_photograph_is_not_changed():
    photograph = grey(640, 480)
    before = photograph.tobytes()
    draw_tiling(photograph, JinaVLMImageProcessor())
    assert photograph.tobytes() == before


def test_do_resize_and_other_geometries_are_followed():
    processor = JinaVLMImageProcessor(do_resize=True, max_crops=4, patch_size=14, base_size=336, overlap_margins=(2, 2))
    page = draw_tiling(grey(1024, 768), processor)
    assert has_colour(page, PALETTE[3]) and not has_colour(page, PALETTE[4])


def test_the_bundled_photograph():
    from importlib.resources import files

    with Image.open(files("vlmkern") / "data" / "raccoon.jpg") as photograph:
        assert photograph.size == (1024, 768) and photograph.mode == "RGB"
        page = draw_tiling(photograph, JinaVLMImageProcessor())
    assert page.width >= 1000
