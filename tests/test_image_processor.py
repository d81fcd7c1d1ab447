"""The image processor against stored outputs of the released model's scheme, and against what it promises.

The source images are stored as PNG. Of the 1920x1080 one only the pixels that the compared patches read are
kept, the others are black.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmkern.images import ImageError
from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor
from vlmkern.models.jina_vlm.tiling import candidate_tilings

data_path = Path(__file__).parent / "data"

IM_START, IM_END, IM_PATCH, IM_COL = range(151936, 151940)


def ramp(width, height):
    """A picture whose every pixel says where it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 251, y % 241, (x * 7 + y * 13) % 239], axis=2).astype(np.uint8)


def unpatchify(crop):
    """[729, 588] back to [378, 378, 3]."""
    return crop.view(27, 27, 14, 14, 3).permute(0, 2, 1, 3, 4).reshape(378, 378, 3)


def to_levels(crop):
    return ((unpatchify(crop) + 1) / 2 * 255).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def stored():
    with np.load(data_path / "improc.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("do_resize", [False, True])
@pytest.mark.parametrize("size", ["64x64", "640x480", "1920x1080"])
def test_agrees_with_the_released_scheme(stored, size, do_resize):
    with Image.open(data_path / f"improc_{size}.png") as image:
        inputs = JinaVLMImageProcessor(do_resize).preprocess(image)
    truth = {
        key.rsplit("/", 1)[1]: value for key, value in stored.items() if key.startswith(f"{size}/{'AB'[do_resize]}/")
    }
    np.testing.assert_array_equal(inputs.tokens, truth["tokens"])
    np.testing.assert_array_equal(inputs.image_input_idx, truth["image_input_idx"])
    rows = np.broadcast_to(truth["image_masks_row_values"][:, None], inputs.image_masks.shape)
    np.testing.assert_array_equal(inputs.image_masks, rows)
    # without do_resize one uint8 level where a value falls on a rounding tie, and that rarely
    tolerance = 1e-2 if do_resize else 2 / 255 + 1e-6
    if "patch_sel" in truth:
        crop, patch = truth["patch_sel"].T
        error = np.abs(inputs.crops[crop, patch].numpy() - truth["patch_val"])
    else:
        expected = truth["thumbnail_levels"] / np.float32(255) * 2 - 1
        error = np.abs(inputs.crops.numpy() - expected[None])
    assert error.max() <= tolerance
    assert (error > 1e-5).mean() <= 5e-3


def check_description(processor, image):
    """What describe() promises is what preprocess() gives."""
    height, width = image.shape[:2]
    described = processor.describe(width, height)
    inputs = processor.preprocess(image)
    positions = inputs.image_input_idx
    assert inputs.crops.shape == (described["crops"], 729, 588) and inputs.crops.dtype == torch.float32
    assert inputs.image_masks.shape == (described["crops"], 729) and inputs.image_masks.dtype == torch.float32
    assert positions.shape == (described["crops"], 196) and positions.dtype == torch.int64
    assert inputs.tokens.shape == (described["total_tokens"],) and inputs.tokens.dtype == torch.int64
    assert positions.numel() == described["pooled_windows"]
    kept = positions[positions >= 0].sort().values
    assert kept.numel() == described["kept_windows"]
    # every patch token gets exactly one feature, and nothing else gets any
    assert torch.equal(kept, (inputs.tokens == IM_PATCH).nonzero()[:, 0])
    assert kept.numel() == described["patch_tokens"]
    assert torch.all(positions[positions < 0] == -10_000)
    assert described["crops"] == 1 + described["tiling"][0] * described["tiling"][1]
    return described, inputs


@pytest.mark.parametrize("tiling", candidate_tilings(12), ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_every_tiling(tiling):
    rows, cols = tiling
    image = ramp(266 * cols + 112, 266 * rows + 112)
    processor = JinaVLMImageProcessor()
    described, inputs = check_description(processor, image)
    assert described["tiling"] == [rows, cols]

    plan = processor.plan(image.shape[1], image.shape[0])
    grid_rows, grid_cols = plan.grid
    block = [IM_START, *([IM_PATCH] * grid_cols + [IM_COL]) * grid_rows, IM_END]
    thumbnail = [IM_START, *([IM_PATCH] * 14 + [IM_COL]) * 14, IM_END]
    assert inputs.tokens.tolist() == thumbnail + block

    # the picture already has the canvas' size: the tiles are its pixels, unchanged
    for crop, tile in zip(inputs.crops[1:], plan.tiles(), strict=True):
        left, top, right, bottom = tile.canvas_box
        assert np.array_equal(to_levels(crop), image[top:bottom, left:right])

    # the whole grid reads as one picture, left to right across tiles and top to bottom
    left_of = np.full((grid_rows, grid_cols), -1)
    top_of = np.full((grid_rows, grid_cols), -1)
    for target, tile in zip(inputs.image_input_idx[1:].view(-1, 14, 14), plan.tiles(), strict=True):
        for row in range(14):
            for col in range(14):
                index = int(target[row, col])
                assert (index >= 0) == tile.keeps(row, col)
                if index >= 0:
                    y, x = divmod(index - 213, grid_cols + 1)
                    left_of[y, x], top_of[y, x], _, _ = plan.window_box(tile, row, col)
    assert np.all(left_of == left_of[0]) and np.all(top_of == top_of[:, :1])
    assert set(np.diff(left_of[0])) <= {14, 28} and set(np.diff(top_of[:, 0])) <= {14, 28}
    # windows of 28 px with steps of at most 28 px: no pixel of the canvas is lost
    assert left_of[0, 0] == top_of[0, 0] == 0
    assert left_of[0, -1] == plan.canvas_width - 14 and top_of[-1, 0] == plan.canvas_height - 14


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.booleans())
def test_any_size_is_described_right(width, height, do_resize):
    if max(width, height) > 200 * min(width, height):
        return
    _, inputs = check_description(JinaVLMImageProcessor(do_resize), ramp(width, height))
    assert inputs.crops.isfinite().all() and inputs.crops.abs().max() <= 1


@pytest.mark.parametrize("do_resize", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (378, 378), (300, 200), (100, 2000)])
def test_a_single_tile_is_the_thumbnail(size, do_resize):
    crops = JinaVLMImageProcessor(do_resize).preprocess(ramp(*size)).crops
    assert crops.shape[0] == 2 and torch.equal(crops[0], crops[1])


def test_masks_mark_the_last_tile_only():
    masks = JinaVLMImageProcessor().preprocess(ramp(900, 300)).image_masks
    assert torch.all(masks[:-1] == 1) and torch.all(masks[-1] == -1)


def test_grey_levels_are_exact():
    image = np.zeros((378, 378, 3), np.uint8)
    image[:256, :, :] = np.arange(256, dtype=np.uint8)[:, None, None]
    crop = unpatchify(JinaVLMImageProcessor().preprocess(image).crops[0])
    expected = torch.arange(256).float() / 255 * 2 - 1
    assert torch.equal(crop[:256], expected[:, None, None].expand(256, 378, 3))
    # black must be -1 to the last bit: the model drops crops that are
    assert torch.all(crop[256:] == -1)


def test_patches_are_rows_then_columns_then_colours():
    image = ramp(378, 378)
    crop = JinaVLMImageProcessor().preprocess(image).crops[0]
    for row, col, y, x, channel in [(0, 0, 0, 0, 0), (3, 26, 13, 2, 1), (26, 5, 7, 11, 2)]:
        level = image[row * 14 + y, col * 14 + x, channel]
        assert crop[row * 27 + col, (y * 14 + x) * 3 + channel].item() == pytest.approx(level / 255 * 2 - 1, abs=1e-6)


def test_resizing_rounds_halves_to_even_levels():
    for first, second, expected in [(0, 1, 0), (1, 2, 2), (2, 3, 2), (254, 255, 254)]:
        image = np.empty((378, 756, 3), np.uint8)
        image[:, 0::2], image[:, 1::2] = first, second
        thumbnail = to_levels(JinaVLMImageProcessor().preprocess(image).crops[0])
        assert np.all(thumbnail == expected)


def test_resizing_does_not_smooth():
    # shrunk four times, pixel 4k + 1.5 is read: lines at 4k fall through
    image = np.zeros((1512, 1512, 3), np.uint8)
    image[:, ::4] = 255
    thumbnail = to_levels(JinaVLMImageProcessor().preprocess(image).crops[0])
    assert np.all(thumbnail == 0)


def test_with_do_resize_only_the_first_resize_rounds():
    crops = JinaVLMImageProcessor(do_resize=True).preprocess(ramp(64, 64)).crops
    levels = (crops + 1) / 2 * 255
    assert (levels - levels.round()).abs().max() > 0.1


def test_every_source_gives_the_same_inputs(tmp_path):
    image = ramp(200, 150)
    path = tmp_path / "picture.png"
    Image.fromarray(image).save(path)
    frozen = image.copy()
    frozen.flags.writeable = False
    processor = JinaVLMImageProcessor()
    expected = processor.preprocess(image)
    for source in (Image.fromarray(image), torch.from_numpy(image), frozen, image[:, ::-1][:, ::-1], path):
        for ours, theirs in zip(processor.preprocess(source), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert np.array_equal(image, ramp(200, 150))


@pytest.mark.parametrize("do_resize", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (7, 1400), (3, 2), (112, 112), (113, 112)])
def test_tiny_and_thin_pictures_work(size, do_resize):
    image = np.full((size[1], size[0], 3), 200, np.uint8)
    _, inputs = check_description(JinaVLMImageProcessor(do_resize), image)
    assert inputs.crops.max() == inputs.crops.min() == pytest.approx(200 / 255 * 2 - 1, abs=1e-6)


@pytest.mark.parametrize("do_resize", [False, True])
@pytest.mark.parametrize("size", [(1, 20_000), (201, 1), (1401, 7)])
def test_extreme_aspect_ratios_are_refused(size, do_resize):
    processor = JinaVLMImageProcessor(do_resize)
    with pytest.raises(ValueError, match=r"aspect ratio of \d+, the limit is 200"):
        processor.describe(*size)
    with pytest.raises(ValueError, match="aspect ratio"):
        processor.preprocess(np.zeros((size[1], size[0], 3), np.uint8))


def test_bad_pictures_raise_what_loading_raises(tmp_path):
    processor = JinaVLMImageProcessor()
    with pytest.raises(ImageError, match="no such file"):
        processor.preprocess(tmp_path / "missing.png")
    with pytest.raises(TypeError, match="uint8"):
        processor.preprocess(np.zeros((4, 4, 3)))
    with pytest.raises(ImageError, match="channels come last"):
        processor.preprocess(torch.zeros(3, 40, 50, dtype=torch.uint8))


def test_a_photograph_of_twelve_megapixels():
    image = np.broadcast_to(np.arange(4000, dtype=np.uint8)[None, :, None], (3000, 4000, 3))
    check_description(JinaVLMImageProcessor(), image)


def test_token_ids_are_arguments():
    ids = {"im_start_token_id": 300, "im_end_token_id": 301, "im_patch_token_id": 302, "im_col_token_id": 303}
    processor = JinaVLMImageProcessor(**ids, image_token_id=304, im_slice_token_id=305, bos_token_id=0)
    tokens = processor.preprocess(ramp(64, 64)).tokens.tolist()
    assert tokens == [300, *([302] * 14 + [303]) * 14, 301] * 2


def test_other_sizes_of_patch_and_crop():
    processor = JinaVLMImageProcessor(patch_size=7, base_size=70, overlap_margins=(2, 4), pooling=(2, 1), max_crops=6)
    image = ramp(3 * 28 + 42, 2 * 28 + 42)
    described = processor.describe(image.shape[1], image.shape[0])
    inputs = processor.preprocess(image)
    assert described["tiling"] == [2, 3]
    assert inputs.crops.shape == (7, 100, 147) and inputs.image_input_idx.shape == (7, 50)
    kept = inputs.image_input_idx[inputs.image_input_idx >= 0].sort().values
    assert torch.equal(kept, (inputs.tokens == IM_PATCH).nonzero()[:, 0])
    assert len(inputs.tokens) == described["total_tokens"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_resize", 1),
        ("max_crops", 0),
        ("max_crops", 257),
        ("max_crops", 2.0),
        ("max_crops", True),
        ("patch_size", 0),
        ("patch_size", "14"),
        ("base_size", 379),
        ("overlap_margins", 4),
        ("overlap_margins", (4, -2)),
        ("overlap_margins", (14, 14)),
        ("overlap_margins", (3, 4)),
        ("pooling", (2,)),
        ("pooling", (0, 2)),
        ("min_pixels", 0),
        ("max_pixels", 3135),
        ("im_start_token_id", -1),
        ("im_col_token_id", None),
        ("image_token_id", 151938),
        ("bos_token_id", 1.5),
        ("eos_token_id", -1),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        JinaVLMImageProcessor(**{name: value})


def test_from_dict_reads_what_matters():
    config = {
        "do_resize": True,
        "max_crops": 6,
        "base_input_size": [378, 378],
        "overlap_margins": [4, 4],
        "pooling_h": 2,
        "pooling_w": 2,
        "min_pixels": None,
        "max_pixels": 500_000,
        "bos_token_id": 7,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": None,
        "cropping_method": "overlap-and-resize",
        "antialias": False,
        "processor_class": "Whatever",
    }
    processor = JinaVLMImageProcessor.from_dict(config)
    assert (processor.do_resize, processor.max_crops, processor.max_pixels) == (True, 6, 500_000)
    assert (processor.min_pixels, processor.bos_token_id, processor.geometry.base_size) == (3136, 7, 378)
    assert JinaVLMImageProcessor.from_dict(config, max_crops=2).max_crops == 2
    assert not JinaVLMImageProcessor.from_dict({}).do_resize


@pytest.mark.parametrize(
    "config",
    [
        {"interpolation": "bicubic"},
        {"antialias": True},
        {"cropping_method": "resize"},
        {"normalization_method": "gaussian"},
        {"base_input_size": [378, 336]},
        {"max_crops": "12"},
        {"pooling_h": 0},
    ],
)
def test_from_dict_refuses_what_it_cannot_do(config):
    (key,) = config
    with pytest.raises(ValueError, match=key.replace("_h", "")):
        JinaVLMImageProcessor.from_dict(config)


def test_from_pretrained(tmp_path):
    assert not JinaVLMImageProcessor.from_pretrained(tmp_path).do_resize
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"do_resize": True, "max_crops": 9}))
    processor = JinaVLMImageProcessor.from_pretrained(tmp_path, max_crops=3)
    assert processor.do_resize and processor.max_crops == 3
    for content in ("{", "[1]", "\udc80"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
            JinaVLMImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        JinaVLMImageProcessor.from_pretrained(tmp_path / "nowhere")
