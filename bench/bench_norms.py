"""Norms: LayerNorm of a tower's residual sums, RMSNorm of a decoder's and of the heads of its queries.

eager     the sum, and the norm as transformers has it: F.layer_norm, or RMSNorm's formula in float32
torch     RMSNorm by F.rms_norm
compile   eager, compiled
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, compiled, forward, run_case
from torch import nn

from vlmkern import ops

# of rows, or of queries [N, H, D] in one fused projection
SHAPES = {
    "siglip_729": (729, 1152),
    "qwen2_vl_3996": (3996, 1280),
    "qwen3_1_7b_1744": (1744, 2048),
    "qwen3_1_7b_q_1744": (1744, 16, 128),
}
EPS = 1e-6
MOVED = {"fwd": 4, "bwd": 4}
"""Tensors of x's size that are read or written: two and two; by the gradient the sum, two gradients and the result."""


class LayerNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, x, residual):
        total = x + residual
        return F.layer_norm(total, total.shape[-1:], self.weight, self.bias, EPS), total

    def ours(self, x, residual):
        return ops.add_layer_norm(x, residual, self.weight, self.bias, eps=EPS)


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        wide = total.float()
        normed = self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return normed if residual is None else (normed, total)

    def torch(self, x, residual=None):
        total = x if residual is None else x + residual
        normed = F.rms_norm(total, total.shape[-1:], self.weight, EPS)
        return normed if residual is None else (normed, total)

    def ours(self, x, residual=None):
        return ops.rms_norm(x, self.weight, residual=residual, eps=EPS)


NORMS = {"add_layer_norm": LayerNorm, "rms_norm": RMSNorm}
PROVIDERS = {"add_layer_norm": ("eager", "compile", "vlmkern"), "rms_norm": ("eager", "torch", "compile", "vlmkern")}
CASES = [
    (norm, shape, mode)
    for norm, shape in (
        ("add_layer_norm", "siglip_729"),
        ("add_layer_norm", "qwen2_vl_3996"),
        ("add_layer_norm", "qwen3_1_7b_1744"),
        ("rms_norm", "siglip_729"),
        ("rms_norm", "qwen2_vl_3996"),
        ("rms_norm", "qwen3_1_7b_1744"),
        ("rms_norm", "qwen3_1_7b_q_1744"),
    )
    for mode in ("fwd", "bwd")
]


@pytest.mark.parametrize(
    "norm, shape, mode, dtype, provider",
    [(*case, dtype, provider) for case in CASES for dtype in DTYPES for provider in PROVIDERS[case[0]]],
)
def bench_norms(benchmark, norm, shape, mode, dtype, provider):
    benchmark.group = f"{norm} {mode}|{shape}|{dtype}"
    module = NORMS[norm](SHAPES[shape][-1]).to(DTYPES[dtype]).float()
    given = _inputs(SHAPES[shape], DTYPES[dtype])

    def run(function, given):
        if mode == "bwd":
            return _gradients(module, function, given)
        # the sum is the same for all
        return forward(lambda *x: _tuple(function(*x))[0], given)

    exact = run(module, [x.float() for x in given])()
    module.to(DTYPES[dtype])
    if provider == "compile":
        function = compiled(module, mode)
    else:
        function = {"eager": module, "torch": getattr(module, "torch", None), "vlmkern": module.ours}[provider]
    call = run(function, given)
    x = given[0]
    run_case(
        benchmark,
        provider,
        call,
        exact,
        DTYPES[dtype],
        flops=(10 if mode == "fwd" else 20) * x.numel(),
        least_bytes=(MOVED[mode] if len(given) == 2 else 2 if mode == "fwd" else 3) * x.numel() * x.element_size(),
        rounds=15,
    )


def _inputs(shape, dtype):
    if len(shape) == 2:
        return [torch.randn(shape).to(dtype) for _ in range(2)]
    tokens, heads, dim = shape
    return [torch.randn(1, tokens, 3, heads, dim).to(dtype)[:, :, 0]]


def _gradients(module, function, given):
    """By all inputs and parameters, of gradients by all results that are made once: to fill them takes as long as a
    norm."""
    leaves = [*(x.detach().requires_grad_() for x in given), *module.parameters()]
    state = []

    def call():
        if not state:
            outputs = _tuple(function(*leaves[: len(given)]))
            generator = torch.Generator().manual_seed(1)
            state.extend((outputs, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]))
        return list(torch.autograd.grad(state[0], leaves, state[1], retain_graph=True))

    return call


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)
