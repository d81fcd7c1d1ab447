"""One block of the SigLIP2-so400m tower, forward, against transformers' own layer with the same weights."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, compiled, forward, run_case
from peers import PEERS, peer
from torch import nn

import vlmkern
from vlmkern.models.jina_vlm.config import VisionConfig
from vlmkern.models.jina_vlm.vision import VisionBlock

SHAPES = {"1_tile": 1, "2_tiles": 2}
PROVIDERS = ("transformers", "onednn", "compile", *PEERS, "vlmkern")


class Transformers(nn.Module):
    """transformers' SiglipEncoderLayer with SDPA, weights taken from ours."""

    def __init__(self, block: VisionBlock, config: VisionConfig):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

        layer_config = transformers.SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_attention_heads=config.num_heads,
        )
        layer_config._attn_implementation = "sdpa"
        self.layer = SiglipEncoderLayer(layer_config)
        attention, q, k, v = self.layer.self_attn, *block.attn.qkv_w.weight.chunk(3)
        for theirs, weight, bias in (
            (attention.q_proj, q, block.attn.q_b),
            (attention.k_proj, k, block.attn.k_b),
            (attention.v_proj, v, block.attn.v_b),
            (attention.out_proj, block.attn.out.weight, block.attn.out.bias),
            (self.layer.mlp.fc1, block.ffn.up.weight, block.ffn.up.bias),
            (self.layer.mlp.fc2, block.ffn.down.weight, block.ffn.down.bias),
        ):
            theirs.weight.data.copy_(weight)
            theirs.bias.data.copy_(bias)

    def forward(self, x):
        y = self.layer(x, attention_mask=None)
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_siglip_block_fwd(benchmark, shape, dtype, provider):
    tiles, config = SHAPES[shape], VisionConfig()
    benchmark.group = f"siglip block fwd|{shape}|{dtype}"
    block = VisionBlock(config)
    theirs = Transformers(block, config)
    x = torch.randn(tiles, config.num_patches, config.hidden_size)
    with torch.no_grad():
        exact = theirs(x)
    module = (block if provider == "vlmkern" else theirs).to(DTYPES[dtype]).requires_grad_(False)
    if provider == "vlmkern":
        vlmkern.pack(module)
    x = x.to(DTYPES[dtype])
    if provider in PEERS:
        call = peer(provider, module, x)
    else:
        call = forward(compiled(module) if provider == "compile" else module, [x])
    tokens, width = tiles * config.num_patches, config.hidden_size
    flops = 2 * tokens * width * (4 * width + 2 * config.mlp_size) + 4 * tokens * config.num_patches * width
    moved = 2 * x.numel() + sum(parameter.numel() for parameter in block.parameters())
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=flops,
        least_bytes=moved * x.element_size(),
        rounds=5,
    )
