"""Towers and connectors of other systems at their real widths, cut to a few blocks, as transformers has them and after
`patch`, forward.

sdpa      transformers with torch's scaled_dot_product_attention
onednn    the same with float32 products sent to oneDNN
compile   the same, compiled, where its lengths allow that
"""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, forward, run_case
from torch import nn

import vlmkern

PROVIDERS = ("sdpa", "onednn", "compile", "vlmkern")


class Tower(nn.Module):
    """A tower's forward of one tensor, and the others that go with it."""

    def __init__(self, model: nn.Module, result, **given):
        super().__init__()
        self.model, self.result, self.given = model, result, given

    def forward(self, pixels):
        return self.result(self.model(pixels, **self.given))


def qwen2_vl():
    """Two of 32 blocks and the merger, over one picture of 1024 x 768: 54 x 74 patches."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

    model = qwen2_vl.Qwen2VisionTransformerPretrainedModel(qwen2_vl.Qwen2VLVisionConfig(depth=2, hidden_size=1536))
    tokens, width = 54 * 74, 1280
    flops = 2 * _block(tokens, tokens**2, width, 2 * 4 * width) + 2 * tokens * 1176 * width
    flops += 2 * tokens // 4 * (4 * width) * (4 * width + 1536)
    tower = Tower(model, _last, grid_thw=torch.tensor([[1, 54, 74]]))
    return tower, torch.randn(tokens, 1176), flops


def qwen3_vl():
    """Two of 27 blocks and two mergers, 48 x 64 patches."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

    config = qwen3_vl.Qwen3VLVisionConfig(depth=2, out_hidden_size=2048, deepstack_visual_indexes=[0])
    tokens, width = 48 * 64, 1152
    flops = 2 * _block(tokens, tokens**2, width, 2 * 4304) + 2 * tokens * 1536 * width
    flops += 2 * (2 * tokens // 4 * (4 * width) * (4 * width + 2048))
    tower = Tower(qwen3_vl.Qwen3VLVisionModel(config), _last, grid_thw=torch.tensor([[1, 48, 64]]))
    return tower, torch.randn(tokens, 1536), flops


def internvit_300m():
    """Four of 24 blocks, two tiles."""
    import transformers

    config = transformers.InternVLVisionConfig(
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=[448, 448],
        patch_size=[14, 14],
        attention_bias=True,
    )
    flops = 4 * _block(2 * 1025, 2 * 1025**2, 1024, 2 * 4096) + 2 * 2 * 1024 * 588 * 1024
    return Tower(transformers.InternVLVisionModel(config), _last), torch.randn(2, 3, 448, 448), flops


def idefics2_split():
    """Two of 27 blocks, and the connector with three layers, on 1024 x 768 in four quadrants and the whole: 7,528
    patches are there of 18,200."""
    import transformers
    from transformers.models.idefics2 import modeling_idefics2 as idefics2

    config = transformers.Idefics2Config(
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 2,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
        },
        text_config={"model_type": "mistral", "num_hidden_layers": 0},
        perceiver_config={"hidden_size": 4096},
    )
    real = torch.zeros(5, 52, 70, dtype=torch.bool)
    real[:4, :27, :36] = True
    real[4] = True
    counts = real.sum((1, 2))
    tokens, pairs = int(counts.sum()), int(counts.square().sum())
    flops = 2 * _block(tokens, pairs, 1152, 2 * 4304) + 2 * 5 * 3640 * 588 * 1152
    flops += 2 * tokens * (1152 * 2 * 14336 + 14336 * 4096) + 3 * (2 * tokens * 4096 * 768 + 4 * 64 * tokens * 16 * 96)
    flops += 3 * 2 * 5 * 64 * (2 * 4096 * 1536 + 4096 * 768 + 3 * 4096 * 16384)

    class Idefics2(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_model = idefics2.Idefics2VisionTransformer(config.vision_config)
            self.connector = idefics2.Idefics2Connector(config)

        def forward(self, pixels, real):
            hidden = self.vision_model(pixel_values=pixels, patch_attention_mask=real).last_hidden_state
            return self.connector(hidden, attention_mask=real.flatten(1))

        def set_attn_implementation(self, name):
            self.vision_model.set_attn_implementation(name)
            self.connector.perceiver_resampler.set_attn_implementation(name)

    pixels = torch.randn(5, 3, 728, 980)
    return Tower(Idefics2(), lambda found: found, real=real), pixels, flops


TOWERS = {
    "qwen2_vl_2_blocks_3996": qwen2_vl,
    "qwen3_vl_2_blocks_3072": qwen3_vl,
    "internvit_300m_4_blocks_2_tiles": internvit_300m,
    "idefics2_2_blocks_connector_5_views": idefics2_split,
}


def _block(tokens: int, pairs: int, width: int, hidden: int) -> int:
    """FLOPs of a block's products, of `hidden` features in and out, and of its attention."""
    return 2 * tokens * width * (4 * width + hidden) + 4 * pairs * width


def _last(found):
    return found.last_hidden_state


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tower", TOWERS)
def bench_towers_fwd(benchmark, tower, dtype, provider):
    pytest.importorskip("transformers")
    if provider == "compile" and "idefics2" in tower:
        pytest.skip("compiled it takes minutes, and is no faster: its masks are made of values")
    benchmark.group = f"tower, patched|{tower}|{dtype}"
    torch.manual_seed(0)
    module, pixels, flops = TOWERS[tower]()
    module = module.eval().requires_grad_(False)
    module.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        exact = module(pixels)
    module, pixels = module.to(DTYPES[dtype]), pixels.to(DTYPES[dtype])
    if provider == "vlmkern":
        assert vlmkern.patch(module)
        vlmkern.pack(module)
    torch._dynamo.reset()
    # lengths of images are values, at which a graph breaks
    function = torch.compile(module, options={"freezing": True}) if provider == "compile" else module
    run_case(
        benchmark,
        provider,
        forward(function, [pixels]),
        exact,
        DTYPES[dtype],
        flops=flops,
        least_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
        rounds=3,
        images=1,
    )
