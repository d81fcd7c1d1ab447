"""SwiGLU MLP, forward: the connector's projector and the decoder's MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, PROVIDERS, compiled, run_case
from torch import nn

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


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_swiglu_mlp_fwd(benchmark, shape, dtype, provider):
    rows, channels, hidden, out = SHAPES[shape]
    benchmark.group = f"swiglu_mlp fwd|{shape}|{dtype}"
    x, module = torch.randn(rows, channels).to(DTYPES[dtype]), Eager(channels, hidden, out).to(DTYPES[dtype])
    with torch.no_grad():
        exact = module.float()(x.float())
    module.to(DTYPES[dtype])
    if provider == "vlmkern":
        call = lambda: ops.swiglu_mlp(x, module.up.weight, module.down.weight)  # noqa: E731
    else:
        function = compiled(module) if provider == "compile" else module
        call = lambda: function(x)  # noqa: E731
    flops = 2 * rows * (module.up.weight.numel() + module.down.weight.numel())
    run_case(benchmark, provider, call, exact, DTYPES[dtype], flops=flops, rounds=5 if rows > 784 else 9)
