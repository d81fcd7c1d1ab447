"""Crops to projected rows: tower blocks and connector of jina-vlm at released widths, forward.

The tower is cut to four blocks (features of blocks 3 and 1), because a whole one takes a minute in float32 on one
core, so the connector weighs more here than in the model. "same_work" runs every window in all providers;
"kept_windows" lets vlmkern leave out the windows that the token layout drops, which the others compute and discard.
Both run the same blocks: the two of 27 that vlmkern's whole tower leaves out do not count here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench_attention_pool import Eager as EagerPool
from bench_siglip_block import Transformers
from bench_swiglu_mlp import Eager as EagerMLP
from cases import DTYPES, compiled, forward, run_case
from peers import PEERS, peer
from torch import nn

import vlmkern
from vlmkern.models.jina_vlm.config import JinaVLMConfig, VisionConfig
from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor
from vlmkern.models.jina_vlm.vision import VisionModel, run_tower

FOUR_BLOCKS = JinaVLMConfig(vision=VisionConfig(num_layers=4, feature_layers=(3, 1)))
CROPS = 5  # a 2 x 2 tiling and the thumbnail
SHAPES = ("same_work", "kept_windows")
PROVIDERS = ("transformers", "onednn", "compile", *PEERS, "vlmkern")


class EagerPath(nn.Module):
    """transformers' SigLIP layers and an eager connector, on the weights of `vision`."""

    def __init__(self, vision: VisionModel):
        super().__init__()
        self.embed, self.position = vision.patch_embed.proj, vision.pos_embed
        config, self.slots = vision.config, vision.config.feature_slots
        blocks = vision.layers[: max(self.slots) + 1]
        self.layers = nn.ModuleList(Transformers(block, config) for block in blocks)
        pooling, projector = vision.vl_connector.pooling, vision.vl_connector.projector
        self.pool = EagerPool(pooling.num_heads, 72, 72, config.hidden_size, config.grid)
        self.pool.q.weight, self.pool.kv.weight, self.pool.out.weight = (
            pooling.q_w.weight,
            pooling.kv_w.weight,
            pooling.out.weight,
        )
        self.mlp = EagerMLP(config.hidden_size, projector.down.in_features, projector.down.out_features)
        self.mlp.up.weight, self.mlp.down.weight = projector.up.weight, projector.down.weight

    def forward(self, crops):
        x = F.linear(crops, self.embed.weight, self.embed.bias) + self.position
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return self.mlp(self.pool([outputs[slot] for slot in self.slots]))


def make_vision(config: JinaVLMConfig = FOUR_BLOCKS) -> VisionModel:
    vision = VisionModel(config)
    with torch.no_grad():
        vision.pos_embed.normal_()
        for name, parameter in vision.named_parameters():
            # the eager pooling of this suite has no biases
            if "pooling" in name and parameter.dim() == 1:
                parameter.zero_()
    return vision


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_vision_path_fwd(benchmark, shape, dtype, provider):
    benchmark.group = f"vision path fwd|5_crops_4_blocks_{shape}|{dtype}"
    vision = make_vision()
    theirs = EagerPath(vision)
    crops = torch.rand(CROPS, 729, 588) * 2 - 1
    index = JinaVLMImageProcessor().preprocess(torch.zeros(480, 640, 3, dtype=torch.uint8)).image_input_idx
    keep = None if shape == "same_work" else (index.flatten() >= 0).nonzero().squeeze(1)
    with torch.no_grad():
        exact = theirs(crops)
        exact = exact if keep is None else exact.flatten(0, 1)[keep]
    module = (vision if provider == "vlmkern" else theirs).to(DTYPES[dtype]).requires_grad_(False)
    crops, mask = crops.to(DTYPES[dtype]), torch.ones(CROPS, 729)
    if provider == "vlmkern":
        vlmkern.pack(module)
        call = forward(lambda crops: vision.vl_connector(run_tower(vision, crops), mask, keep), [crops])
    else:
        if provider in PEERS:
            run = peer(provider, module, crops)
        else:
            run = forward(compiled(module) if provider == "compile" else module, [crops])

        def call():
            return run() if keep is None else run().flatten(0, 1)[keep]

    tokens, width = CROPS * 729, 1152
    flops = 4 * (2 * tokens * width * (4 * width + 2 * 4304) + 4 * tokens * 729 * width)
    moved = crops.numel() + sum(parameter.numel() for parameter in vision.parameters())
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=flops,
        least_bytes=moved * crops.element_size(),
        rounds=3,
        images=1,
    )
