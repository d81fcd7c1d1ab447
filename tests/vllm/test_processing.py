"""The multimodal processor by itself: blocks, counts and order for every tiling, and what vLLM plans memory with."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from vllm_support import CASES, DATA, IMAGE_ID

from vlmkern.models.jina_vlm import JinaVLM, JinaVLMImageProcessor
from vlmkern.models.jina_vlm.tiling import candidate_tilings

IDS = {"im_start": 300, "im_end": 301, "im_patch": 302, "im_col": 303}


@pytest.fixture(scope="module", autouse=True)
def registered():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="module")
def build(served_checkpoint):
    """build(**engine-level mm_processor_kwargs) is the processor that vLLM makes for the checkpoint."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    def make(**mm_processor_kwargs):
        config = ModelConfig(
            model=str(served_checkpoint),
            dtype="float32",
            max_model_len=4096,
            mm_processor_kwargs=mm_processor_kwargs or None,
            limit_mm_per_prompt={"image": 4},
        )
        return MULTIMODAL_REGISTRY.create_processor(config)

    return make


@pytest.fixture(scope="module")
def processor(build):
    return build()


@pytest.fixture(scope="module")
def model(served_checkpoint):
    return JinaVLM.from_pretrained(served_checkpoint)


def apply(processor, ids, *images, **kwargs):
    items = processor.info.parse_mm_data({"image": list(images)})
    return processor(ids, items, hf_processor_mm_kwargs=kwargs)


def noise(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (height // 20 + 2, width // 20 + 2, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height))


@pytest.mark.parametrize(("rows", "cols"), candidate_tilings(12))
def test_every_tiling(processor, rows, cols):
    image = noise(266 * cols + 112, 266 * rows + 112)
    outputs = apply(processor, [0, 7, IMAGE_ID, 8], image)
    plan = processor.info.image_processor.plan(*image.size)
    assert (plan.rows, plan.cols) == (rows, cols)

    (place,) = outputs["mm_placeholders"]["image"]
    assert (place.offset, place.length) == (2, plan.total_tokens)
    assert place.get_num_embeds() == plan.patch_tokens
    ids = outputs["prompt_token_ids"]
    assert ids[:2] == [0, 7] and ids[-1] == 8 and len(ids) == 3 + plan.total_tokens
    block = torch.tensor(ids[2:-1])
    assert torch.equal(place.is_embed, block == IDS["im_patch"])

    # the n-th patch token of the block is where the n-th kept window goes
    expected = processor.info.image_processor.preprocess(image)
    data = outputs["mm_kwargs"]["image"][0].get_data()
    positions = expected.image_input_idx.flatten()[data["keep"]]
    assert torch.equal(positions, (block == IDS["im_patch"]).nonzero().squeeze(1))
    assert torch.equal(expected.tokens, block)
    # thumbnail first, its windows row by row
    assert torch.equal(data["keep"][:196], torch.arange(196))
    assert torch.equal(data["image_masks"], expected.image_masks)
    assert data["crops"].dtype == torch.uint8
    assert torch.equal(data["crops"].float() / 255 * 2 - 1, expected.crops)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2), (1, 3)])
@torch.no_grad()
def test_rows_follow_the_order_of_the_tokens(processor, model, rows, cols):
    """Features found through `keep` equal those that the package's own model adds to the same tokens."""
    from vlmkern.models.jina_vlm.vision import encode_crops

    image = noise(266 * cols + 112, 266 * rows + 112, seed=1)
    data = apply(processor, [0, IMAGE_ID], image)["mm_kwargs"]["image"][0].get_data()
    crops = data["crops"].float() / 255 * 2 - 1
    features = encode_crops(model.model.vision_model, crops, data["image_masks"], data["keep"])

    own = processor.info.image_processor.preprocess(image)
    projected = model.encode_images(own.crops[None], own.image_masks[None], own.image_input_idx[None])[0].flatten(0, 1)
    by_position = torch.zeros(len(own.tokens), projected.shape[-1])
    kept = own.image_input_idx.flatten() >= 0
    by_position[own.image_input_idx.flatten()[kept]] = projected[kept]
    torch.testing.assert_close(features, by_position[own.tokens == IDS["im_patch"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"do_resize": True}, {"max_crops": 4}, {"max_crops": 4, "do_resize": True}])
def test_memory_is_planned_with_the_largest_input(build, settings):
    processor = build(**settings)
    images = processor.info.image_processor
    rows_of = {
        images.plan(width, height).patch_tokens for width in range(40, 3400, 55) for height in range(40, 3400, 55)
    }
    (largest,) = processor.info.get_mm_max_tokens_per_item(4096, {"image": 1}).values()
    assert largest >= max(rows_of)
    if "max_crops" not in settings:
        assert largest == 1932
    dummy = processor.get_dummy_mm_inputs({"image": 2})
    assert [place.get_num_embeds() for place in dummy["mm_placeholders"]["image"]] == [largest] * 2


def test_resized_pictures_stay_floats(build):
    processor = build(do_resize=True)
    image = noise(1000, 500)
    data = apply(processor, [0, IMAGE_ID], image)["mm_kwargs"]["image"][0].get_data()
    assert torch.equal(data["crops"], processor.info.image_processor.preprocess(image).crops)


def test_all_black_tiles_keep_to_the_padding_rule(processor):
    data = apply(processor, [0, IMAGE_ID], Image.new("RGB", (378, 378)))["mm_kwargs"]["image"][0].get_data()
    assert bool((data["crops"].float() / 255 * 2 - 1 == -1).all())


def test_bos_is_put_in_front_once(processor):
    image = Image.open(DATA / CASES["64x64"])
    with_bos, without = (apply(processor, ids, image)["prompt_token_ids"] for ids in ([0, 7, IMAGE_ID], [7, IMAGE_ID]))
    assert with_bos == without and with_bos[:2] == [0, 7]


@pytest.mark.parametrize(("ids", "count"), [([0, 7], 1), ([0, IMAGE_ID], 2), ([0, IMAGE_ID, IMAGE_ID], 1)])
def test_markers_and_pictures_must_match(processor, ids, count):
    with pytest.raises(ValueError, match=rf"prompt has {ids.count(IMAGE_ID)} <\|image\|> marker\(s\), but {count}"):
        apply(processor, ids, *[noise(64, 64)] * count)


@pytest.mark.parametrize("kwargs", [{"max_crops": 13}, {"max_crops": 0}, {"max_crops": "4"}, {"patch_size": 7}])
def test_requests_may_only_ask_for_less(processor, kwargs):
    with pytest.raises(ValueError, match="mm_processor_kwargs: got"):
        apply(processor, [0, IMAGE_ID], noise(64, 64), **kwargs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"base_size": 392}, "got crops, patches and pooling"), ({"im_slice_token_id": 320}, "expected ids below 320")],
)
def test_settings_that_do_not_go_with_the_model_are_refused_at_the_start(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings).info.image_processor  # noqa: B018


def test_embeddings_are_refused(processor):
    with pytest.raises(ValueError, match="embeddings are not taken"):
        processor._get_mm_fields_config({"image_embeds": torch.zeros(3, 64)}, {})


def test_ids_come_from_the_files_then_the_tokenizer_then_the_table(processor, served_checkpoint, build, tmp_path):
    assert processor.info.image_processor.image_token_ids == (300, 301, 302, 303, 304, 305)
    assert processor.info.image_processor.bos_token_id == 0
    settings = served_checkpoint / "preprocessor_config.json"
    settings.write_text(json.dumps({"im_slice_token_id": 311, "max_crops": 6}), encoding="utf-8")
    try:
        from_file = build().info.image_processor
    finally:
        settings.unlink()
    assert from_file.image_token_ids == (300, 301, 302, 303, 304, 311) and from_file.max_crops == 6
    assert isinstance(from_file, JinaVLMImageProcessor)
