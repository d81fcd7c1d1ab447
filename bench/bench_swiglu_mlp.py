"""SwiGLU MLP, forward: the connector's projector and the decoder's MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, compiled, run_case

from vlmkern import ops

# rows, input, hidden, output
SHAPES = {
    "projector_196": (196, 1152, 6144, 2048),
    "qwen3_1_7b_decode": (1, 2048, 6144, 2048),
    "qwen3_1_7b_256": (256, 2048, 6144, 2048),
}


def eager(x, w_up, w_down):
    value, gate = F.linear(x, w_up).chunk(2, -1)
    return F.linear(F.silu(gate) * value, w_down)


PROVIDERS = {"eager": lambda: eager, "compile": lambda: compiled(eager), "vlmkern": lambda: ops.swiglu_mlp}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_swiglu_mlp_fwd(benchmark, shape, dtype, provider):
    rows, channels, hidden, out = SHAPES[shape]
    benchmark.group = f"swiglu_mlp fwd {shape} {dtype}"
    x, w_up, w_down = (
        (torch.randn(n, c) * c**-0.5).to(DTYPES[dtype])
        for n, c in ((rows, channels), (2 * hidden, channels), (out, hidden))
    )
    function, exact = PROVIDERS[provider](), eager(x.float(), w_up.float(), w_down.float())
    flops = 2 * rows * (w_up.numel() + w_down.numel())
    run_case(benchmark, lambda: function(x, w_up, w_down), exact, DTYPES[dtype], flops=flops)
