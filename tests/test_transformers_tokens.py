"""Counts of views, patches and tokens against the public processors' own functions, over sizes of every shape."""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vlmkern.efficiency import image_tokens
from vlmkern.models.idefics2 import tiling as idefics2
from vlmkern.models.internvl import tiling as internvl
from vlmkern.models.qwen2_vl import tiling as qwen2_vl
from vlmkern.models.towervision import tiling as towervision

pytest.importorskip("transformers")

# sides at which rules change, and those beside them: 1 px, patches, tiles, limits
EDGES = (1, 2, 3, 13, 14, 27, 28, 29, 42, 56, 70, 223, 224, 377, 378, 379, 383, 384, 385, 447, 448, 449, 767, 768, 979)
EDGES += (980, 981, 1024, 1152, 1344, 1999, 2304, 4096, 8191, 20000)


def sizes(count=700):
    """Every third pair of edges, and sizes of 1 to 10^8 pixels in shapes up to 300 : 1, the same in every run."""
    rng = random.Random(20)
    pairs = [(w, h) for w in EDGES for h in EDGES if (w + h) % 3 == 0]
    while len(pairs) < count:
        area, ratio = 10 ** rng.uniform(0, 8), 10 ** rng.uniform(-2.5, 2.5)
        pairs.append((max(1, round((area * ratio) ** 0.5)), max(1, round((area / ratio) ** 0.5))))
    # squares on both sides of half of the pixels of 2 x 2 and 3 x 3 tiles, and quotients just below a whole number
    ties = [(side, side) for side in (633, 634, 950, 951)] + [(47, 423), (188, 423), (49, 1323), (196, 1323)]
    return [(1024, 768), (1240, 1754), (3840, 2160), (448, 448), (224, 224), *ties, *pairs]


SIZES = sizes()


def public(*places):
    """The first of `places`, "module:name", that this transformers has and can import."""
    for place in places:
        module, name = place.split(":")
        try:
            return getattr(importlib.import_module(f"transformers.{module}"), name)
        except (ImportError, AttributeError):
            continue
    pytest.skip(f"this transformers has none of {', '.join(places)} that can be imported here")


def picture(width, height):
    """Of the shape alone: one byte, however large."""
    return np.broadcast_to(np.uint8(0), (3, height, width))


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 100 * 784, "max_pixels": 16384 * 784}, {"max_pixels": 784}])
def test_qwen2_vl_equals_smart_resize(limits):
    smart_resize = public(
        "models.qwen2_vl.image_processing_pil_qwen2_vl:smart_resize",
        "models.qwen2_vl.image_processing_qwen2_vl:smart_resize",
    )
    bounds = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280} | limits
    refused = 0
    for width, height in SIZES:
        try:
            resized_height, resized_width = smart_resize(height, width, factor=28, **bounds)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="aspect ratio"):
                image_tokens("qwen2-vl", width, height, **limits)
            continue
        patches = (resized_height // 14) * (resized_width // 14)
        assert image_tokens("qwen2-vl", width, height, **limits) == {
            "model": "qwen2-vl",
            "width": width,
            "height": height,
            "views": 1,
            "patches": patches,
            "image_tokens": patches // 4,
        }
        (view,) = qwen2_vl.plan_views(width, height, **limits).views
        assert view.size == (resized_width, resized_height)
    assert 0 < refused < len(SIZES) / 3


@pytest.mark.parametrize("max_tiles", [1, 2, 6, 12, 36, 40])
def test_internvl_equals_the_tiled_canvas(max_tiles):
    canvas = public(
        "models.got_ocr2.image_processing_pil_got_ocr2:get_optimal_tiled_canvas",
        "models.got_ocr2.image_processing_got_ocr2:get_optimal_tiled_canvas",
    )
    for width, height in SIZES:
        cols, rows = canvas((height, width), (448, 448), 1, max_tiles)
        views = rows * cols + (rows * cols > 1)
        counts = image_tokens("internvl2.5", width, height, max_tiles=max_tiles)
        assert internvl.choose_grid(width, height, max_tiles) == (rows, cols), (width, height)
        assert (counts["views"], counts["patches"], counts["image_tokens"]) == (views, 1024 * views, 256 * views)


def idefics2_processor():
    return public(
        "models.idefics2.image_processing_pil_idefics2:Idefics2ImageProcessorPil",
        "models.idefics2.image_processing_idefics2:Idefics2ImageProcessor",
    )()


def idefics2_sizes(processor, width, height, split):
    """(height, width) of each view by the processor's own splitting and resizing rule."""
    resized = public(
        "models.idefics2.image_processing_pil_idefics2:get_resize_output_image_size",
        "models.idefics2.image_processing_idefics2:get_resize_output_image_size",
    )
    views = [picture(width, height)]
    if hasattr(processor, "split_images"):
        views = processor.split_images(views[0]) if split else views
        limits = SimpleNamespace(**dict(processor.size))
        return [resized(view, limits) for view in views]
    views = processor.split_image(views[0], "channels_first") if split else views
    return [resized(view, processor.size, "channels_first") for view in views]


@pytest.mark.parametrize("split", [True, False])
def test_idefics2_equals_the_splitting_and_resizing(split):
    processor = idefics2_processor()
    for width, height in SIZES:
        if split and height < 2:
            with pytest.raises(ValueError, match="cannot be split"):
                image_tokens("idefics2", width, height)
            continue
        found = idefics2_sizes(processor, width, height, split)
        largest = [max(sides) // 14 for sides in zip(*found, strict=True)]
        counts = image_tokens("idefics2", width, height, split=split)
        assert counts["views"] == len(found) == (5 if split else 1)
        assert counts["patches"] == sum((h // 14) * (w // 14) for h, w in found), (width, height)
        assert counts["padded_patches"] == len(found) * largest[0] * largest[1]
        assert counts["image_tokens"] == 64 * len(found)
        plan = idefics2.plan_views(width, height, split=split)
        assert [(view.size[1], view.size[0]) for view in plan.views] == found


@pytest.mark.parametrize("size", [(640, 480), (30, 200), (1500, 300), (2, 3), (1, 50)])
def test_idefics2_equals_the_mask_of_patches(size):
    """The processor's pixel mask, unfolded as the model does it, marks the patches that count."""
    pictures = Image.effect_noise(size, 90).convert("RGB")
    out = idefics2_processor()(images=pictures, do_image_splitting=True, return_tensors="pt")
    mask = out["pixel_attention_mask"][0]
    whole = mask.unfold(1, 14, 14).unfold(2, 14, 14).sum(dim=(-1, -2)) == 14 * 14
    counts = image_tokens("idefics2", *size)
    assert counts["patches"] == int(whole.sum()) and counts["padded_patches"] == whole.numel()
    assert counts["views"] == len(mask)


@pytest.mark.parametrize("size", [(50, 1), (1, 1)])
def test_idefics2_refuses_what_the_processor_cannot_split(size):
    processor, pictures = idefics2_processor(), Image.new("RGB", size)
    with pytest.raises(ZeroDivisionError):
        processor(images=pictures, do_image_splitting=True, return_tensors="pt", input_data_format="channels_last")
    with pytest.raises(ValueError, match=r"cannot be split.*split=False"):
        image_tokens("idefics2", *size)
    assert image_tokens("idefics2", *size, split=False)["image_tokens"] == 64


def released_grids(max_tiles):
    grids = [(r, c) for n in range(1, max_tiles + 1) for r in range(1, n + 1) for c in range(1, n + 1) if r * c == n]
    return [[384 * rows, 384 * cols] for rows, cols in grids]


def test_towervision_grids_are_those_of_the_released_configuration():
    listed = "1x1 1x2 2x1 1x3 3x1 1x4 2x2 4x1 1x5 5x1 1x6 2x3 3x2 6x1"
    assert " ".join(f"{rows}x{cols}" for rows, cols in towervision.candidate_grids(6)) == listed


@pytest.mark.parametrize("max_tiles", [1, 4, 6, 9])
def test_towervision_equals_the_packed_features(max_tiles):
    """Tiles as `image_size_to_num_patches` counts them, tokens as `pack_image_features` makes them of real tensors."""
    num_patches = public("models.llava_next.modeling_llava_next:image_size_to_num_patches")
    model = public("models.llava_next.modeling_llava_next:LlavaNextModel")
    vision = SimpleNamespace(image_size=384, patch_size=14)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=released_grids(max_tiles))
    newline = torch.zeros(1)
    for width, height in SIZES:
        views = num_patches((height, width), config.image_grid_pinpoints, 384)
        features = torch.zeros(1).expand(views, 729, 1)
        packed, _ = model.pack_image_features(
            SimpleNamespace(config=config), [features], torch.tensor([[height, width]]), "full", newline
        )
        counts = image_tokens("towervision", width, height, max_tiles=max_tiles)
        assert (counts["views"], counts["patches"]) == (views, 729 * views), (width, height)
        assert counts["image_tokens"] == len(packed[0]), (width, height)


def test_towervision_places_the_picture_as_the_processor_does():
    processor = public(
        "models.llava_next.image_processing_pil_llava_next:LlavaNextImageProcessorPil",
        "models.llava_next.image_processing_llava_next:LlavaNextImageProcessor",
    )()
    resize = public("image_processing_utils:get_patch_output_size")
    grids = released_grids(6)
    for width, height in SIZES:
        best = public("image_processing_utils:select_best_resolution")((height, width), grids)
        content = resize(picture(width, height), best, "channels_first")
        rows, cols = best[0] // 384, best[1] // 384
        assert towervision.resized(width, height, rows, cols) == content[::-1]
        if not hasattr(processor, "_get_padding_size"):
            continue
        (top, bottom), (left, right) = processor._get_padding_size(content, best)
        across, down = width / content[1], height / content[0]
        frames = [view.frame for view in towervision.plan_views(width, height).parts]
        assert frames[0][:2] == pytest.approx((-left * across, -top * down))
        assert frames[-1][2:] == pytest.approx((width + right * across, height + bottom * down))


def test_towervideo_equals_the_pooled_frames():
    model = public("models.llava_onevision.modeling_llava_onevision:LlavaOnevisionModel")
    vision = SimpleNamespace(image_size=384, patch_size=14)
    pooled = model.apply_pooling(SimpleNamespace(config=SimpleNamespace(vision_config=vision)), torch.zeros(32, 729, 1))
    plan = towervision.plan_frames(1024, 768)
    assert plan.image_tokens == pooled.shape[0] * pooled.shape[1] + 1 == 6273
    assert plan.patches == 32 * 729
