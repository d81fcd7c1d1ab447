"""Tiling geometry: known token counts, the float32 rule that picks a tiling, and what a drawing needs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor
from vlmkern.models.jina_vlm.tiling import (
    TilingGeometry,
    candidate_tilings,
    choose_tiling,
    kept_spans,
    plan_tiles,
    smart_resize,
)

# width, height, rows, cols, kept grid, total tokens
TABLE = [
    (64, 64, 1, 1, (14, 14), 424),
    (224, 224, 1, 1, (14, 14), 424),
    (378, 378, 1, 1, (14, 14), 424),
    (100, 2000, 1, 1, (14, 14), 424),
    (2000, 100, 1, 1, (14, 14), 424),
    (900, 300, 1, 3, (14, 34), 704),
    (512, 512, 2, 2, (24, 24), 814),
    (640, 480, 2, 2, (24, 24), 814),
    (800, 600, 2, 3, (24, 34), 1054),
    (1024, 1024, 3, 3, (34, 34), 1404),
    (1024, 768, 3, 4, (34, 44), 1744),
    (1176, 910, 3, 4, (34, 44), 1744),
    (1280, 720, 3, 4, (34, 44), 1744),
    (1920, 1080, 3, 4, (34, 44), 1744),
    (4000, 3000, 3, 4, (34, 44), 1744),
    (3000, 4000, 4, 3, (44, 34), 1754),
]


@pytest.mark.parametrize("do_resize", [False, True])
@pytest.mark.parametrize(("width", "height", "rows", "cols", "grid", "total"), TABLE)
def test_token_counts_of_known_sizes(width, height, rows, cols, grid, total, do_resize):
    kept = 196 + grid[0] * grid[1]
    crops = rows * cols + 1
    assert JinaVLMImageProcessor(do_resize).describe(width, height) == {
        "width": width,
        "height": height,
        "tiling": [rows, cols],
        "crops": crops,
        "pooled_windows": crops * 196,
        "kept_windows": kept,
        "patch_tokens": kept,
        "total_tokens": total,
    }


def test_description_is_plain_json():
    described = JinaVLMImageProcessor().describe(np.int64(640), np.int32(480))
    assert json.loads(json.dumps(described)) == described
    assert list(described) == [
        "width", "height", "tiling", "crops", "pooled_windows", "kept_windows", "patch_tokens", "total_tokens"
    ]  # fmt: skip


def test_there_are_35_tilings():
    tilings = candidate_tilings(12)
    assert len(tilings) == len(set(tilings)) == 35
    assert tilings[:6] == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4))
    assert max(plan_tiles(266 * c + 112, 266 * r + 112).total_tokens for r, c in tilings) == 2074


def reference_tiling(height, width, max_crops=12):
    """The selection rule in float32 arrays."""
    pairs = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops + 1) if i * j <= max_crops]
    pairs = np.array(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])))
    with np.errstate(divide="ignore"):
        scale = ((pairs * 266).astype(np.float32) / np.array([height - 112, width - 112], np.float32)).min(axis=1)
    best = scale.argmax() if (scale < 1).all() else np.where(scale < 1, np.inf, scale).argmin()
    return tuple(pairs[best].tolist())


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 4, 12, 13]))
def test_choice_of_tiling_is_that_of_float32(height, width, max_crops):
    geometry = TilingGeometry(max_crops=max_crops)
    assert choose_tiling(height, width, geometry) == reference_tiling(height, width, max_crops)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (112, 112, (1, 1)),
        (111, 5000, (1, 1)),
        (112, 1000, (1, 4)),
        (113, 1000, (1, 4)),
        (1000, 112, (4, 1)),
        (1, 1, (1, 1)),
        (5000, 113, (12, 1)),
        # a float64 quotient would tell these sides from a whole ratio and take one more column
        (10_958_167, 10_958_168, (3, 3)),
        (4_152_921, 10_382_135, (2, 5)),
    ],
)
def test_choice_at_the_edges(height, width, expected):
    assert choose_tiling(height, width) == expected == reference_tiling(height, width)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000))
def test_smart_resize_stays_in_its_limits(height, width):
    if max(width, height) > 200 * min(width, height):
        return
    new_height, new_width = smart_resize(height, width)
    assert new_height % 14 == new_width % 14 == 0 and min(new_height, new_width) >= 14
    assert 3136 <= new_height * new_width <= 1_003_520


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (70, 70)),
        ((480, 640), (476, 644)),
        ((1080, 1920), (742, 1330)),
        ((1, 1), (56, 56)),
        # halves of a patch go to the even count
        ((63, 77), (56, 84)),
        ((91, 105), (84, 112)),
    ],
)
def test_smart_resize_values(size, expected):
    assert smart_resize(*size) == expected


def test_kept_windows_of_a_tile():
    assert kept_spans(1, 27, (4, 4), 2) == ((0, 14),)
    assert kept_spans(2, 27, (4, 4), 2) == ((0, 12), (2, 12))
    assert kept_spans(4, 27, (4, 4), 2) == ((0, 12), (2, 10), (2, 10), (2, 12))


def test_plan_can_be_drawn():
    plan = plan_tiles(800, 600)
    tiles = plan.tiles()
    assert [(tile.row, tile.col) for tile in tiles] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert tiles[4].canvas_box == (266, 266, 644, 644)
    assert (plan.canvas_width, plan.canvas_height) == (910, 644)
    assert tiles[0].source_box == pytest.approx((0, 0, 378 * 800 / 910, 378 * 600 / 644))
    assert tiles[-1].source_box[2:] == pytest.approx((800, 600))
    # neighbours share 112 px
    assert tiles[0].canvas_box[2] - tiles[1].canvas_box[0] == 112
    assert plan.window_box(tiles[0], 13, 0) == (0, 364, 28, 378)
    assert [plan.kept_box(tile) for tile in tiles[:3]] == [
        (0, 0, 336, 336),
        (322, 0, 602, 336),
        (588, 0, 910, 336),
    ]
    assert (tiles[4].grid_row, tiles[4].grid_col) == (12, 12)
    assert tiles[1].kept_cols == (2, 10) and tiles[1].keeps(0, 2) and not tiles[1].keeps(0, 1)


def test_plan_in_source_pixels_ignores_the_first_resize():
    plan = plan_tiles(1920, 1080, do_resize=True)
    assert (plan.work_width, plan.work_height) == (1330, 742)
    assert plan.tiles()[-1].source_box[2:] == pytest.approx((1920, 1080))


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2.5, 4), ("4", 4), (True, 4)])
def test_sizes_that_no_image_has(size):
    with pytest.raises(ValueError, match=r"width|height"):
        JinaVLMImageProcessor().describe(*size)


def test_max_crops_limits_the_tiles():
    for max_crops, tiling in [(1, [1, 1]), (4, [2, 2]), (20, [4, 5])]:
        assert JinaVLMImageProcessor(max_crops=max_crops).describe(4000, 3000)["tiling"] == tiling
