"""Linear layers with what follows them: a SigLIP block's projections, and a decoder's with one or a few tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, PROVIDERS, backward, compiled, forward, run_case
from torch import nn

import vlmkern
from vlmkern import ops

# rows, inputs, outputs, activation, whether a residual is added
SHAPES = {
    "siglip_qkv_729": (729, 1152, 3456, "none", False),
    "siglip_out_729": (729, 1152, 1152, "none", True),
    "siglip_fc1_729": (729, 1152, 4304, "gelu_tanh", False),
    "siglip_fc2_729": (729, 4304, 1152, "none", True),
    "siglip_fc1_1458": (1458, 1152, 4304, "gelu_tanh", False),
    "qwen3_1_7b_qkv_1": (1, 2048, 4096, "none", False),
    "qwen3_1_7b_qkv_16": (16, 2048, 4096, "none", False),
}


class Eager(nn.Module):
    def __init__(self, inputs, outputs, activation):
        super().__init__()
        self.linear, self.activation = nn.Linear(inputs, outputs), activation

    def forward(self, x, residual=None):
        y = self.linear(x)
        if self.activation == "gelu_tanh":
            y = F.gelu(y, approximate="tanh")
        return y if residual is None else y + residual


CASES = [(shape, "fwd") for shape in SHAPES] + [("siglip_fc1_729", "bwd"), ("siglip_fc2_729", "bwd")]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, mode", CASES)
def bench_linear(benchmark, shape, mode, dtype, provider):
    rows, inputs, outputs, activation, added = SHAPES[shape]
    benchmark.group = f"linear {mode}|{shape}|{dtype}"
    module = Eager(inputs, outputs, activation).to(DTYPES[dtype]).float()
    given = [torch.randn(rows, inputs).to(DTYPES[dtype])]
    if added:
        given.append(torch.randn(rows, outputs).to(DTYPES[dtype]))

    def run(function, given):
        return forward(function, given) if mode == "fwd" else backward(function, given, list(module.parameters()))

    exact = run(module, [x.float() for x in given])()
    module.to(DTYPES[dtype])
    if provider == "vlmkern":
        if mode == "fwd":
            vlmkern.pack(module)
        weight, bias = module.linear.weight, module.linear.bias

        def ours(x, residual=None):
            return ops.linear(x, weight, bias, activation=activation, residual=residual)

        call = run(ours, given)
    else:
        call = run(compiled(module, mode) if provider == "compile" else module, given)
    scale = 1 if mode == "fwd" else 2
    elements = inputs * outputs + sum(x.numel() for x in given) + rows * outputs
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=2 * scale * rows * inputs * outputs,
        least_bytes=scale * elements * given[0].element_size(),
    )
