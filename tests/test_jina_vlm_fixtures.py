"""Every stage of jina-vlm against stored outputs of public implementations (tests/data/README.md)."""

from __future__ import annotations

import pytest
import torch
from support import assert_matches, load_arrays

from vlmkern import use_backend
from vlmkern.models.jina_vlm import JinaVLM
from vlmkern.models.jina_vlm.decoder import token_positions
from vlmkern.ops.attention_pool import reference
from vlmkern.ops.attention_pool import windows as pooling


@pytest.fixture(scope="module")
def tiny378(checkpoint_dir):
    return JinaVLM.from_pretrained(checkpoint_dir("tiny378"))


@pytest.fixture(scope="module")
def tiny70(checkpoint_dir):
    return JinaVLM.from_pretrained(checkpoint_dir("tiny70"))


def run_recorded(modules, call):
    """Runs `call` and returns the output of each named module, and what went into those named "<name>.in"."""
    outputs, handles = {}, []
    for name, module in modules.items():
        if name.endswith(".in"):
            handles.append(module.register_forward_pre_hook(lambda _, i, n=name[:-3]: outputs.update({n: i[0]})))
        else:
            handles.append(module.register_forward_hook(lambda _, i, o, n=name: outputs.update({n: o})))
    try:
        with torch.no_grad():
            outputs["result"] = call()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def image_inputs(arrays):
    return {name: arrays[name] for name in ("crops", "image_masks", "image_input_idx") if name in arrays}


def check_vision(model, arrays):
    vision = model.model.vision_model
    crops, masks = arrays["crops"].flatten(0, 1), arrays["image_masks"].flatten(0, 1)
    blocks = [vision.layers[i] for i in vision.config.feature_slots]
    outputs = run_recorded(
        {
            "patch_embed_plus_pos.in": vision.layers[0],
            "layer0": vision.layers[0],
            "hs_a": blocks[0],
            "hs_b": blocks[1],
        },
        lambda: vision(crops),
    )
    features = outputs["result"]
    for name in ("patch_embed_plus_pos", "layer0", "hs_a", "hs_b"):
        if name in arrays or name.startswith("hs"):
            assert_matches(arrays, name, outputs[name])

    connector, pool = vision.vl_connector, vision.vl_connector.pooling
    slots = pooling.find_slots(len(crops), pool.grid, pool.window, None, crops.device)
    x = pooling.gather(features, slots, connector.pad_embed, masks)
    attended = reference._attend(
        x, pool.q_w.weight, pool.q_b, pool.kv_w.weight, torch.cat([pool.k_b, pool.v_b]), pool.num_heads
    )
    assert_matches(arrays, "query", x.mean(1))
    if "windows" in arrays:
        assert_matches(arrays, "windows", x)
    assert_matches(arrays, "attn_ctx", attended.context)
    assert_matches(arrays, "pooled", pool(features, connector.pad_embed, masks).flatten(0, 1))
    assert_matches(arrays, "projected", model.encode_images(arrays["crops"], arrays["image_masks"]))


@pytest.mark.parametrize("case", ["tiny378_640x480", "tiny378_64x64"])
@torch.no_grad()
def test_vision_stages(tiny378, case):
    check_vision(tiny378, load_arrays(case))


@torch.no_grad()
def test_mask_values_and_blank_crops(tiny70):
    """Masks of 1, 0, 0.37, 0.999 and -1, and one crop of -1 throughout."""
    check_vision(tiny70, load_arrays("tiny70_masks"))


@pytest.mark.parametrize("case", ["tiny378_640x480", "tiny378_64x64", "tiny378_text"])
@torch.no_grad()
def test_decoder_stages_and_greedy_tokens(tiny378, case):
    arrays = load_arrays(case)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    real = mask == 1
    text = tiny378.model.language_model
    outputs = run_recorded(
        {
            "embeds.in": text,
            "layer0_out": text.layers[0],
            "final_hidden": text.ln_f,
            "logits": tiny378.lm_head,
        },
        lambda: tiny378(ids, **image_inputs(arrays), attention_mask=mask),
    )
    for name in ("embeds", "layer0_out", "final_hidden", "logits"):
        assert_matches(arrays, name, outputs[name], real)
    assert torch.equal(token_positions(real)[real], arrays["position_ids"][real])

    new_ids = tiny378.generate(ids, **image_inputs(arrays), attention_mask=mask, max_new_tokens=8)
    assert torch.equal(new_ids, arrays["greedy_tokens"])
    cache = tiny378.new_cache(1, ids.shape[1] + 8)
    tiny378(ids, **image_inputs(arrays), attention_mask=mask, cache=cache)
    steps = [tiny378(token.view(1, 1), cache=cache)[:, -1] for token in new_ids[0]]
    assert_matches(arrays, "greedy_logits", torch.stack(steps, 1))


@torch.no_grad()
def test_reference_backend_gives_the_same(tiny378):
    arrays = load_arrays("tiny378_64x64")
    with use_backend("reference"):
        assert_matches(arrays, "projected", tiny378.encode_images(arrays["crops"], arrays["image_masks"]))
