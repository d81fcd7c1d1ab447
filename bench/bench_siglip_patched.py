"""transformers' SiglipVisionModel at so400m/14 width, as it comes and after `patch`, forward; cut to four blocks."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, compiled, forward, run_case
from peers import PEERS, peer
from torch import nn

import vlmkern

SHAPES = {"1_image": 1, "2_images": 2}
PROVIDERS = ("transformers", "onednn", "compile", *PEERS, "vlmkern")
SIZE, PATCH, WIDTH, HIDDEN, HEADS, LAYERS = 378, 14, 1152, 4304, 16, 4


class LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixels).last_hidden_state


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_siglip_patched_fwd(benchmark, shape, dtype, provider):
    transformers = pytest.importorskip("transformers")
    benchmark.group = f"SiglipVisionModel, patched|{shape}|{dtype}"
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    module = LastHiddenState(transformers.SiglipVisionModel(config).eval()).requires_grad_(False)
    pixels = torch.rand(SHAPES[shape], 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        exact = module(pixels)
    module, pixels = module.to(DTYPES[dtype]), pixels.to(DTYPES[dtype])
    if provider == "vlmkern":
        from vlmkern.integrations.transformers import patch

        # four blocks of three modules each
        assert len(patch(module)) == 3 * LAYERS
        vlmkern.pack(module)
    if provider in PEERS:
        call = peer(provider, module, pixels)
    else:
        call = forward(compiled(module) if provider == "compile" else module, [pixels])
    patches = (SIZE // PATCH) ** 2
    tokens = SHAPES[shape] * patches
    block = 2 * tokens * WIDTH * (4 * WIDTH + 2 * HIDDEN) + 4 * tokens * patches * WIDTH
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=LAYERS * block + 2 * tokens * WIDTH * PATCH * PATCH * 3,
        least_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
        rounds=5,
        images=SHAPES[shape],
    )
