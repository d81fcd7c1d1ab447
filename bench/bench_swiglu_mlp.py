"""SwiGLU MLP: the connector's projector and the decoder's MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, PROVIDERS, backward, compiled, forward, run_case
from torch import nn

import vlmkern
from vlmkern import ops

# rows, input, hidden, output
SHAPES = {
    "projector_1": (1, 1152, 6144, 2048),
    "projector_16": (16, 1152, 6144, 2048),
    "projector_196": (196, 1152, 6144, 2048),
    "projector_784": (784, 1152, 6144, 2048),
    "projector_2548": (2548, 1152, 6144, 2048),
    "qwen3_1_7b_decode": (1, 2048, 6144, 2048),
}


class Eager(nn.Module):
    def __init__(self, channels, hidden, out):
        super().__init__()
        self.up = nn.Linear(channels, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, out, bias=False)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


CASES = [(shape, "fwd") for shape in SHAPES] + [("projector_196", "bwd")]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, mode", CASES)
def bench_swiglu_mlp(benchmark, shape, mode, dtype, provider):
    rows, channels, hidden, out = SHAPES[shape]
    benchmark.group = f"swiglu_mlp {mode}|{shape}|{dtype}"
    module = Eager(channels, hidden, out).to(DTYPES[dtype]).float()
    x, weights = torch.randn(rows, channels).to(DTYPES[dtype]), [module.up.weight, module.down.weight]

    def run(function, x):
        return forward(function, [x]) if mode == "fwd" else backward(function, [x], weights)

    exact = run(module, x.float())()
    module.to(DTYPES[dtype])
    if provider == "vlmkern":
        if mode == "fwd":
            vlmkern.pack(module)
        call = run(lambda x: ops.swiglu_mlp(x, *weights), x)
    else:
        call = run(compiled(module, mode) if provider == "compile" else module, x)
    elements = sum(weight.numel() for weight in weights)
    scale = 1 if mode == "fwd" else 2
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=2 * scale * rows * elements,
        least_bytes=scale * (elements + rows * (channels + out)) * x.element_size(),
        rounds=5 if rows > 784 else 9,
    )
