"""tests/data/make.py gives the fixtures that are stored, from full arrays as far as the fixtures still hold them."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image
from support import DATA


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_data", DATA / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_stages_of_the_small_picture(make):
    stored = make.load(DATA / "tiny378_64x64.npz")
    full = {"image": np.zeros((64, 64, 3), np.uint8)}
    for name, array in stored.items():
        full |= {"crops": array.astype(np.float32) / 255 * 2 - 1} if name == "crops_uint8" else {name: array}
    assert_same(make.stages(full, ()), stored)
    full["crops"] = full["crops"] + np.float32(1e-3)
    with pytest.raises(ValueError, match="no 8-bit levels"):
        make.stages(full, ())


def test_rows_that_are_kept_of_the_large_picture(make):
    stored = make.load(DATA / "tiny378_640x480.npz")
    full = {}
    for name, array in stored.items():
        if name.endswith("@7"):
            whole = np.full((7 * len(array), array.shape[1]), np.nan, np.float32)
            whole[::7] = array
            full[name.removesuffix("@7")] = whole[None]
        elif name != "crops_uint8":
            full[name] = array
    del stored["crops_uint8"]
    assert_same(make.stages(full, make.THINNED), stored)


def test_pixels_that_are_kept_of_the_picture_stored_in_part(make):
    with Image.open(DATA / "improc_1920x1080.png") as image:
        stored = np.asarray(image).any(-1)
    patches = make.load(DATA / "improc.npz")["1920x1080/B/patch_sel"]
    np.testing.assert_array_equal(make.pixels_read(patches, stored.shape), stored)


def test_image_processing_of_the_small_picture(make):
    stored = {name: array for name, array in make.load(DATA / "improc.npz").items() if name.startswith("64x64/")}
    thumbnail = stored["64x64/A/thumbnail_levels"].astype(np.float32) / 255 * 2 - 1
    sparse = np.full((2, 729, 588), np.nan, np.float32)
    sparse[tuple(stored["64x64/B/patch_sel"].T)] = stored["64x64/B/patch_val"]
    full = {name: array for name, array in stored.items() if name.rsplit("/", 1)[1] not in ("patch_sel", "patch_val")}
    del full["64x64/A/thumbnail_levels"]
    full["64x64/A/crops"], full["64x64/B/crops"] = np.stack([thumbnail, thumbnail]), sparse
    made = make.image_processing(full)
    assert set(made) == set(stored)
    assert_same({name: made[name] for name in stored}, stored)


def test_pictures_lose_nothing(make, tmp_path):
    with Image.open(DATA / "tiny378_64x64.png") as image:
        pixels = np.asarray(image)
    make.save_picture(pixels, tmp_path / "again.png")
    with Image.open(tmp_path / "again.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
