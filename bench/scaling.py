"""How cost grows: FLOPs over tiles by formula, CPU seconds over tiles, batch and cached tokens by running, one thread,
bfloat16; with the exponent of the power law that fits best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from bench_decode import VOCABULARY, make_model
from savings import cpu_seconds

from vlmkern.efficiency import sweep_rows
from vlmkern.efficiency.formulas import Sizes, most_square_grid, token_layout
from vlmkern.models.jina_vlm.config import VisionConfig
from vlmkern.models.jina_vlm.vision import VisionBlock

TILES = 40


def scaling() -> list[dict[str, Any]]:
    """One dict for each curve: `what`, `unit_x`, `x`, `unit_y`, `y`, `exponent`."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return [*_flops(), _tower(), _batch(), _cached()]
    finally:
        torch.set_num_threads(threads)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the line that fits log y over log x."""
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in logs) / sum((a - mean_x) ** 2 for a, _ in logs)


def _curve(what: str, unit_x: str, x: Sequence[float], unit_y: str, y: Sequence[float]) -> dict[str, Any]:
    return {
        "what": what,
        "unit_x": unit_x,
        "x": list(x),
        "unit_y": unit_y,
        "y": list(y),
        "exponent": exponent(x, y),
    }


def _flops() -> list[dict[str, Any]]:
    rows = {(row["tiles"], row["quantity"]): row for row in sweep_rows(TILES)}
    crops = range(2, TILES + 2)
    totals = [rows[n - 1, "total_flops"]["pooled"] - rows[n - 1, "prefill_flops"]["pooled"] for n in crops]
    tokens = [token_layout(Sizes(), most_square_grid(n - 1)).total_tokens for n in crops]
    prefill = [rows[n - 1, "prefill_flops"]["pooled"] for n in crops]
    return [
        _curve("tower and connector, FLOPs", "crops", crops, "TFLOP", [value / 1e12 for value in totals]),
        _curve("prefill, FLOPs", "prompt tokens", tokens, "TFLOP", [value / 1e12 for value in prefill]),
    ]


def _tower() -> dict[str, Any]:
    block = VisionBlock(VisionConfig()).bfloat16().requires_grad_(False)
    crops = [1, 2, 4, 8, 16, 32]
    x = torch.randn(crops[-1], 729, 1152, dtype=torch.bfloat16)
    seconds = [cpu_seconds(lambda n=n: [block(part) for part in x[:n].split(1)]) for n in crops]
    return _curve("one tower block, measured", "crops", crops, "s of CPU", seconds)


def _step(model: Any, batch: int, cached: int) -> float:
    cache = model.new_cache(batch, cached + 1)
    cache._keys.normal_()
    cache._values.normal_()
    token = torch.randint(0, VOCABULARY, (batch, 1))

    def step() -> None:
        cache.length = 0
        cache.begin(batch, cached)
        model(token, cache=cache)

    return cpu_seconds(step, rounds=5, warm_up=2)


def _batch() -> dict[str, Any]:
    model = make_model(torch.bfloat16)
    batches = [8, 16, 32, 64]
    return _curve(
        "one decoded token each, 4 layers, 512 cached, measured",
        "sequences",
        batches,
        "s of CPU",
        [_step(model, batch, 512) for batch in batches],
    )


def _cached() -> dict[str, Any]:
    model = make_model(torch.bfloat16)
    cached = [8192, 16384, 32768, 65536]
    # the weights cost the same at any length: what grows is the rest
    base = _step(model, 1, 1)
    return _curve(
        "attention of one decoded token, 4 layers, measured",
        "cached tokens",
        cached,
        "s of CPU",
        [max(1e-9, _step(model, 1, n) - base) for n in cached],
    )
