"""The assembly on a GPU equals the one on CPU."""

from __future__ import annotations

import pytest
import torch

from vlmkern.models.jina_vlm import JinaVLM, JinaVLMConfig

pytestmark = pytest.mark.gpu


def test_rows_of_images_and_greedy_tokens():
    config = JinaVLMConfig.tiny()
    model = JinaVLM.random(config, seed=0, dtype=torch.float32, device="cpu")
    crops = torch.rand(1, 3, config.vision.num_patches, config.vision.patch_dim) * 2 - 1
    masks, ids = torch.ones(crops.shape[:3]), torch.randint(0, 100, (1, 12))
    with torch.no_grad():
        expected, tokens = model.encode_images(crops, masks), model.generate(ids, max_new_tokens=8)
        model.to("cuda")
        actual = model.encode_images(crops.cuda(), masks.cuda()).cpu()
        on_gpu = model.generate(ids.cuda(), max_new_tokens=8).cpu()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(on_gpu, tokens)
