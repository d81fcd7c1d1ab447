"""Counts of one picture for five systems: known sizes, what is refused, and what holds for any size."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmkern.efficiency import SYSTEMS, image_tokens
from vlmkern.efficiency.pictures import plan_views
from vlmkern.models.jina_vlm import JinaVLMImageProcessor

# width, height: tokens and patches of each system, as the public processors give them
KNOWN = {
    (1024, 768): {
        "jina-vlm": (1744, 9477),
        "qwen2-vl": (999, 3996),
        "internvl2.5": (3328, 13312),
        "idefics2": (320, 7528),
        "towervision": (4725, 5103),
    },
    (1240, 1754): {
        "jina-vlm": (1754, 9477),
        "qwen2-vl": (1260, 5040),
        "internvl2.5": (1792, 7168),
        "idefics2": (320, 14342),
        "towervision": (4964, 5103),
    },
    (3840, 2160): {
        "jina-vlm": (1744, 9477),
        "qwen2-vl": (1222, 4888),
        "internvl2.5": (2304, 9216),
        "idefics2": (320, 13650),
        "towervision": (4501, 5103),
    },
    (448, 448): {
        "jina-vlm": (814, 3645),
        "qwen2-vl": (256, 1024),
        "internvl2.5": (256, 1024),
        "idefics2": (320, 3940),
        "towervision": (3699, 3645),
    },
    (224, 224): {
        "jina-vlm": (424, 1458),
        "qwen2-vl": (64, 256),
        "internvl2.5": (256, 1024),
        "idefics2": (320, 3645),
        "towervision": (1485, 1458),
    },
}

# with other options: those of the papers, and of many-tile settings
WITH_OPTIONS = [
    ("qwen2-vl", (1240, 1754), {"min_pixels": 100 * 784, "max_pixels": 16384 * 784}, 2772, 11088),
    ("qwen2-vl", (3840, 2160), {"min_pixels": 100 * 784, "max_pixels": 16384 * 784}, 10549, 42196),
    ("qwen2-vl", (224, 224), {"min_pixels": 100 * 784, "max_pixels": 16384 * 784}, 100, 400),
    ("internvl2.5", (1024, 768), {"max_tiles": 6}, 1792, 7168),
    ("internvl2.5", (1240, 1754), {"max_tiles": 36}, 9216, 36864),
    ("internvl2.5", (3840, 2160), {"max_tiles": 36}, 7424, 29696),
    ("idefics2", (1024, 768), {"split": False}, 64, 3640),
    ("idefics2", (3840, 2160), {"split": False}, 64, 2730),
    ("towervision", (1024, 768), {"max_tiles": 1}, 729 + 21 * 28, 1458),
    ("jina-vlm", (1024, 768), {"max_crops": 1}, 424, 1458),
]

SIDES = st.one_of(st.integers(1, 64), st.integers(1, 4000), st.integers(1, 2**31 - 1))
OPTIONS = {
    "jina-vlm": "max_crops",
    "qwen2-vl": "min_pixels, max_pixels",
    "internvl2.5": "max_tiles",
    "idefics2": "split",
    "towervision": "max_tiles",
}


@pytest.mark.parametrize("size", KNOWN)
@pytest.mark.parametrize("model", SYSTEMS)
def test_known_sizes(model, size):
    counts = image_tokens(model, *size)
    assert (counts["image_tokens"], counts["patches"]) == KNOWN[size][model]
    assert (counts["model"], counts["width"], counts["height"]) == (model, *size)
    padded = {"padded_patches"} if model == "idefics2" else set()
    assert set(counts) == {"model", "width", "height", "views", "patches", "image_tokens"} | padded


@pytest.mark.parametrize("model,size,options,tokens,patches", WITH_OPTIONS)
def test_options(model, size, options, tokens, patches):
    counts = image_tokens(model, *size, **options)
    assert (counts["image_tokens"], counts["patches"]) == (tokens, patches)


@pytest.mark.parametrize(
    "size,unsplit,split",
    [
        ((1024, 768), 3640, 18200),
        ((1240, 1754), 3430, 17150),
        ((3840, 2160), 2730, 13650),
        ((448, 448), 1024, 5120),
        ((224, 224), 729, 3645),
    ],
)
def test_idefics2_with_its_padding(size, unsplit, split):
    assert image_tokens("idefics2", *size)["padded_patches"] == split
    assert image_tokens("idefics2", *size, split=False)["padded_patches"] == unsplit


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), max_crops=st.integers(1, 40))
def test_jina_vlm_equals_its_image_processor(width, height, max_crops):
    try:
        described = JinaVLMImageProcessor(max_crops=max_crops).describe(width, height)
    except ValueError:
        with pytest.raises(ValueError, match=r"^jina-vlm: .*aspect ratio"):
            image_tokens("jina-vlm", width, height, max_crops=max_crops)
        return
    counts = image_tokens("jina-vlm", width, height, max_crops=max_crops)
    assert counts["views"] == described["crops"] and counts["image_tokens"] == described["total_tokens"]
    assert counts["patches"] == 729 * described["crops"]


@given(model=st.sampled_from(SYSTEMS), width=SIDES, height=SIDES)
def test_views_cover_the_picture_and_nothing_is_counted_twice(model, width, height):
    """The drawing and the counts are of the same views: their parts tile the picture, padding included."""
    try:
        plan = plan_views(model, width, height)
    except ValueError as error:
        assert str(error).startswith(f"{model}: an image of {width}x{height} pixels")
        assert max(width, height) > 200 * min(width, height) or height < 2
        return
    assert plan.describe()["patches"] == sum(rows * cols for rows, cols in (view.patches for view in plan.views))
    slack = 1e-6 * max(width, height)
    lefts, tops, rights, bottoms = zip(*(view.frame for view in plan.parts), strict=True)
    assert min(lefts) <= slack and min(tops) <= slack
    assert max(rights) >= width - slack and max(bottoms) >= height - slack
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in (v.frame for v in plan.parts))
    canvas = (max(rights) - min(lefts)) * (max(bottoms) - min(tops))
    assert covered >= canvas * (1 - 1e-6) and (model == "jina-vlm" or covered <= canvas * (1 + 1e-6))
    for view in plan.views:
        assert view.size <= view.padded_size and min(view.size) >= 1 and min(view.patches) >= 1
        if view.place is None:
            assert view.frame == (0, 0, width, height)


@pytest.mark.parametrize("model", SYSTEMS)
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (5.0, 5), ("5", 5), (None, 5), (True, 5), (5, 10**400)])
def test_what_is_no_size_is_refused(model, size):
    with pytest.raises(ValueError, match=rf"^{model}: .*(width|height) must be an integer .*, got ") as error:
        image_tokens(model, *size)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("model", ["qwen2-vl", "jina-vlm"])
def test_an_aspect_above_200_is_refused_as_the_processor_does(model):
    assert image_tokens(model, 2000, 10)["image_tokens"] > 0
    for size in ((2010, 10), (10, 2010)):
        with pytest.raises(ValueError, match=rf"^{model}: .*aspect ratio of 201, the limit is 200"):
            image_tokens(model, *size)


@pytest.mark.parametrize("model", ["internvl2.5", "idefics2", "towervision"])
def test_the_others_take_any_aspect(model):
    assert image_tokens(model, 100_000, 2)["image_tokens"] > 0


@pytest.mark.parametrize("model", ["", "qwen", "QWEN2-VL", "all", None, 3, ["qwen2-vl"], "x" * 9999])
def test_an_unknown_model_is_refused(model):
    with pytest.raises(ValueError, match=r"^model: got .*, expected one of jina-vlm, qwen2-vl") as error:
        image_tokens(model, 10, 10)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("model", SYSTEMS)
def test_an_unknown_option_is_refused(model):
    for option in ("crops", "width_", "geometry", "model_"):
        with pytest.raises(ValueError, match=f"^{model}: got option '{option}', expected one of {OPTIONS[model]}$"):
            image_tokens(model, 10, 10, **{option: 3})


@pytest.mark.parametrize(
    "model,option,values",
    [
        ("qwen2-vl", "min_pixels", (0, -1, 1.5, "9", None, True)),
        ("qwen2-vl", "max_pixels", (0, -1, 1.5, "9", None, True)),
        ("internvl2.5", "max_tiles", (0, -1, 257, 10**30, 1.5, "9", None, True)),
        ("towervision", "max_tiles", (0, -1, 257, 10**30, 1.5, "9", None, True)),
        ("jina-vlm", "max_crops", (0, -1, 257, 10**30, 1.5, "9", None, True)),
        ("idefics2", "split", (0, 1, "true", None)),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(model, option, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{model}: {option} must be .*, got "):
            image_tokens(model, 100, 100, **{option: value})


def test_counting_needs_no_transformers():
    code = (
        "import sys; from vlmkern.efficiency import SYSTEMS, image_tokens; "
        "[image_tokens(system, 1024, 768) for system in SYSTEMS]; "
        "assert not {'transformers', 'torchvision', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
