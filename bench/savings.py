"""What the assembly leaves out and plain implementations of the model do not: FLOPs by counting, CPU seconds by running
both ways, one thread, bfloat16, released sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from bench_attention_pool import Eager

from vlmkern import ops
from vlmkern.efficiency import counting
from vlmkern.models.jina_vlm.config import JinaVLMConfig
from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor
from vlmkern.models.jina_vlm.vision import VisionModel, run_tower

CROPS = 13  # twelve tiles and the thumbnail


@torch.no_grad()
def savings() -> list[dict[str, Any]]:
    """One dict for each: `what` is left out; `flops_with`, `flops_without`, `seconds_with`, `seconds_without` it."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        vision = VisionModel(JinaVLMConfig())
        vision.pos_embed.normal_()
        vision = vision.bfloat16().requires_grad_(False)
        return [_blocks(vision), _windows(vision), _absorbed(vision), _thumbnail(vision)]
    finally:
        torch.set_num_threads(threads)


def _blocks(vision: VisionModel) -> dict[str, Any]:
    """The last two of 27 blocks feed nothing."""
    model = counting.meta_model()
    x = torch.randn(CROPS, 729, 1152, dtype=torch.bfloat16)

    def skipped() -> None:
        y = x
        for block in vision.layers[25:]:
            y = block(y)

    used = 25 * cpu_seconds(lambda: vision.layers[0](x))
    return {
        "what": "2 of 27 tower blocks, whose output nothing reads (12 tiles)",
        "flops_with": counting.tower_flops(model, CROPS, 27),
        "flops_without": counting.tower_flops(model, CROPS, 25),
        "seconds_with": used + cpu_seconds(skipped),
        "seconds_without": used,
    }


def _windows(vision: VisionModel) -> dict[str, Any]:
    """Windows in the overlap of tiles, which become no token."""
    picture = torch.zeros(1500, 2000, 3, dtype=torch.uint8).numpy()
    index = JinaVLMImageProcessor().preprocess(picture).image_input_idx.flatten()
    keep = (index >= 0).nonzero().squeeze(1)
    features = list(torch.randn(2, CROPS, 729, 1152).bfloat16().unbind(0))
    mask, connector = torch.ones(CROPS, 729), vision.vl_connector
    dropped, of_all = len(index) - len(keep), len(index)
    return {
        "what": f"windows that become no token, before pooling: {dropped:,} of {of_all:,} (12 tiles)",
        "flops_with": counting.count(lambda: connector(features, mask)),
        "flops_without": counting.count(lambda: connector(features, mask, keep)),
        "seconds_with": cpu_seconds(lambda: connector(features, mask)),
        "seconds_without": cpu_seconds(lambda: connector(features, mask, keep)),
    }


def _absorbed(vision: VisionModel) -> dict[str, Any]:
    """Keys that are never projected, values projected after pooling."""
    features = list(torch.randn(2, CROPS, 729, 1152).bfloat16().unbind(0))
    eager = Eager(16, 72, 72).bfloat16().requires_grad_(False)
    weights = (eager.q.weight, None, eager.kv.weight, None, eager.out.weight, None)
    windows, unit = 196 * CROPS, 2 * 2304 * 1152
    # in units of a 2304 x 1152 product a window: q, W_K into it, W_V, out, and scores and pooling of 16 x 4 rows
    absorbed = windows * (3.5 * unit + 2 * 2 * 16 * 4 * 2304)
    return {
        "what": "attention pooling with its weights absorbed, against projected keys and values (12 tiles)",
        "flops_with": counting.count(lambda: ops.attention_pool(features, *weights, grid=(27, 27), num_heads=16)),
        "flops_without": int(absorbed),
        "seconds_with": cpu_seconds(lambda: eager(features)),
        "seconds_without": cpu_seconds(
            lambda: ops.attention_pool(features, *weights, grid=(27, 27), num_heads=16), warm_up=2
        ),
    }


def _thumbnail(vision: VisionModel) -> dict[str, Any]:
    """A picture of one tile is its own thumbnail."""
    model, crops = counting.meta_model(), torch.rand(2, 729, 588) * 2 - 1
    return {
        "what": "the thumbnail of a picture of one tile, which is that tile again",
        "flops_with": counting.tower_flops(model, 2),
        "flops_without": counting.tower_flops(model, 1),
        "seconds_with": cpu_seconds(lambda: run_tower(vision, crops)),
        "seconds_without": cpu_seconds(lambda: run_tower(vision, crops[:1])),
    }


def cpu_seconds(call: Callable[[], Any], rounds: int = 3, warm_up: int = 1) -> float:
    """Least CPU time of a call."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)
