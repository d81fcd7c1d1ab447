"""The assembly on a GPU equals the one on CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE, MODELS_NEED

import vlmkern

pytestmark = pytest.mark.gpu


def test_rows_of_images_and_greedy_tokens():
    for module in MODELS_NEED:
        pytest.importorskip(module)
    from vlmkern.models.jina_vlm import JinaVLM, JinaVLMConfig

    config = JinaVLMConfig.tiny()
    if DEVICE.rehearsal:
        config = replace(config, vision=replace(config.vision, image_size=(70, 70)))
    with vlmkern.use_backend("reference"):
        # which needs no extension, as a machine that is borrowed for its GPU has none
        model = JinaVLM.random(config, seed=0, dtype=torch.float32, device="cpu")
        crops = torch.rand(1, 3, config.vision.num_patches, config.vision.patch_dim) * 2 - 1
        masks, ids = torch.ones(crops.shape[:3]), torch.randint(0, 100, (1, 12))
        with torch.no_grad():
            expected, tokens = model.encode_images(crops, masks), model.generate(ids, max_new_tokens=8)
    with DEVICE.backend(), torch.no_grad():
        model.to(DEVICE.name)
        actual = model.encode_images(crops.to(DEVICE.name), masks.to(DEVICE.name)).cpu()
        on_gpu = model.generate(ids.to(DEVICE.name), max_new_tokens=8).cpu()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(on_gpu, tokens)
