"""The page of five systems: that any picture gives one, and that what it shows is what is counted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlmkern.efficiency import SYSTEMS
from vlmkern.efficiency.pictures import plan_views
from vlmkern.models._shared.drawing import OVERLAP, OVERLAP_LEVEL, PALETTE, PAPER
from vlmkern.models._shared.view_picture import CELL, PADDING, draw_views


def grey(width, height, level=200):
    return Image.new("RGB", (width, height), (level, level, level))


def plans_of(width, height, systems=SYSTEMS, **options):
    return [plan_views(system, width, height, **options) for system in systems]


def page_of(width, height, systems=SYSTEMS, **options):
    return np.asarray(draw_views(grey(width, height), plans_of(width, height, systems, **options)))


def share(page, colour):
    return float((page == np.array(colour, np.uint8)).all(axis=-1).mean())


@pytest.mark.parametrize(
    "size", [(1024, 768), (768, 1024), (64, 64), (3000, 300), (300, 3000), (1, 2), (2, 2), (400, 2), (2, 400), (5, 999)]
)
def test_any_shape_gives_a_page(size):
    page = draw_views(grey(*size), plans_of(*size))
    assert page.mode == "RGB" and page.width == 1680 and 900 <= page.height <= 2400


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_system_gives_a_page_of_its_own(system):
    page = draw_views(grey(1024, 768), plans_of(1024, 768, [system]))
    assert 2 * CELL < page.width < 1680 and page.height > 600


def test_as_many_tiles_as_can_be_asked_for():
    for size in ((4000, 3000), (9000, 50)):
        page = page_of(*size, systems=["internvl2.5", "towervision"], max_tiles=256)
        assert page.shape[1] == 1680


def test_every_part_has_its_own_colour():
    page = page_of(1024, 768, ["internvl2.5"])
    assert all(share(page, colour) > 0 for colour in PALETTE)
    page = page_of(1024, 768, ["towervision"])
    assert all(share(page, colour) > 0 for colour in PALETTE[:6]) and share(page, PALETTE[6]) == 0


def test_padding_is_hatched_where_there_is_some():
    # 1024 x 768 on a canvas of 1152 x 768; a square on a square
    with_padding, without = (page_of(*size, ["towervision"]) for size in ((1024, 768), (768, 768)))
    assert share(with_padding, PADDING) > 20 * share(without, PADDING)
    # views of 1024 x 768 differ in size, those of 3840 x 2160 do not
    with_padding, without = (page_of(*size, ["idefics2"]) for size in ((1024, 768), (3840, 2160)))
    assert share(with_padding, PADDING) > 20 * share(without, PADDING)


def test_overlaps_are_tinted_and_only_those_of_jina_vlm():
    tint = tuple(round(200 + (colour - 200) * OVERLAP_LEVEL / 255) for colour in OVERLAP)
    for system in SYSTEMS:
        page = page_of(1024, 768, [system])
        assert (share(page, tint) > 0.01) == (system == "jina-vlm"), system


def test_parts_lie_over_the_picture_where_the_plan_says():
    """A picture black on the left of the middle and white on the right: quadrants meet on the edge."""
    photo = Image.new("RGB", (1000, 500))
    photo.paste(PAPER, (500, 0, 1000, 500))
    page = np.asarray(draw_views(photo, plans_of(1000, 500, ["idefics2"])))
    row = page[110 + 56 + 30, 40 : 40 + CELL]
    black = (row == 0).all(axis=-1)
    assert black[20:240].all() and not black[270:].any()
    borders = [place for place in range(CELL) if tuple(row[place]) in PALETTE[:2]]
    assert {tuple(row[place]) for place in borders} == set(PALETTE[:2])
    assert any(abs(place - CELL / 2) <= 3 for place in borders) and max(borders) >= CELL - 2


def test_the_page_is_saved_as_it_is_returned(tmp_path):
    path = tmp_path / "page.png"
    page = draw_views(grey(640, 480), plans_of(640, 480), path)
    with Image.open(path) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(page))


def test_the_photograph_is_not_changed():
    photo = grey(640, 480)
    before = photo.tobytes()
    draw_views(photo, plans_of(640, 480))
    assert photo.tobytes() == before


def test_a_plan_of_another_picture_is_refused():
    with pytest.raises(ValueError, match="plans: got one of 640x480 for a picture of 480x640"):
        draw_views(grey(480, 640), plans_of(640, 480))
