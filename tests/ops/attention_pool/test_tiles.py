"""Attention pooling in bfloat16 by AMX's tiles: on plain C++ everywhere, on the CPU's own where it has them.

The instruction set is chosen when a process starts, so each computes all cases in one of its own, to be judged here."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from pooling import Weights, random_mask
from support import low_precision_close
from test_backends import run_python

import vlmkern
from vlmkern import ops

report = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(
    "amx_emulated" not in report.get("emulated_isas", []), reason="a build without emulated tiles"
)
each_isa = pytest.mark.parametrize("isa", ["amx_emulated", *{"amx"}.intersection(report.get("isas", []))])

# heads, key_dim, value_dim, channels, layers, window, grid, bias, kept windows
CASES = {
    "released": (16, 72, 72, 1152, 2, (2, 2), (27, 27), True, 21),
    "blocks": (4, 24, 24, 96, 2, (2, 2), (27, 27), False, 350),
    "rows of several tiles": (17, 33, 17, 131, 1, (1, 3), (7, 9), True, None),
    "one slot": (5, 1, 1, 300, 1, (1, 1), (5, 7), True, None),
    "as many slots as columns": (3, 5, 7, 9, 3, (4, 4), (13, 6), False, None),
    "one slot more": (2, 16, 40, 33, 2, (1, 17), (3, 18), True, None),
    "steps of slots": (20, 40, 33, 70, 2, (5, 7), (11, 9), True, None),
    "two heads": (2, 64, 96, 160, 1, (3, 3), (8, 7), False, None),
    "one head": (1, 48, 96, 64, 2, (2, 2), (9, 9), False, None),
}


def inputs(name):
    heads, key_dim, value_dim, channels, layers, window, grid, bias, kept = CASES[name]
    torch.manual_seed(list(CASES).index(name))
    w = Weights.make(layers * channels, heads, key_dim, value_dim, 24, bias=bias, dtype=torch.bfloat16)
    patches = grid[0] * grid[1]
    features, mask = torch.randn(layers, 2, patches, channels).bfloat16(), random_mask(2, patches)
    keep = None if kept is None else torch.randperm(2 * -(-grid[0] // window[0]) * -(-grid[1] // window[1]))[:kept]
    if kept is not None:
        keep[kept // 2] = 4 // window[1]  # which spoil() goes over
    return features, w, {"grid": grid, "num_heads": heads, "window": window, "mask": mask, "keep": keep}


def results(name, dtype, backend, spoil=lambda features: None):
    """The result and the gradients by features, those of the weights that are there, and pad_embed."""
    features, w, options = inputs(name)
    spoil(features)
    leaves = [*features, *w.projections, w.pad_embed]
    leaves = [t if t is None else t.to(dtype).detach().requires_grad_() for t in leaves]
    *projected, pad_embed = leaves
    with vlmkern.use_backend(backend):
        out = ops.attention_pool(projected[: len(features)], *projected[-6:], pad_embed=pad_embed, **options)
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape).sin().bfloat16().to(dtype)
        return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def spoil(features):
    """Two windows, whose neighbours share tiles with them."""
    features[0, 0, 4, 3] = torch.nan
    features[0, 1, 4, 5] = torch.inf


RUN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_tiles, torch
torch.save(test_tiles.results_of_all(), sys.argv[1])
"""


def results_of_all():
    return {name: [results(name, torch.bfloat16, "native", *how) for how in ((), (spoil,))] for name in CASES}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """computed(isa)[case]: what results() gives with that instruction set, and of features that spoil() went over."""

    @functools.cache
    def compute(isa):
        if isa == report["isa"]:
            return results_of_all()
        if "VLMKERN_SANITIZED" in os.environ:
            pytest.skip("another process would not have the sanitized extension")
        to = str(tmp_path_factory.mktemp(isa) / "results")
        process = run_python(f"import sys; sys.argv[1:] = [{to!r}]\n{RUN}", VLMKERN_CPU_ISA=isa)
        assert process.returncode == 0, process.stderr
        return torch.load(to)

    return compute


@functools.cache
def reference(name, dtype):
    return results(name, dtype, "reference")


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_numbers(computed, isa, name):
    """Errors of the result and of each gradient against float64, at most twice those of torch in bfloat16."""
    plain, _ = computed(isa)[name]
    for i, actual in enumerate(plain):
        low_precision_close(actual, lambda dtype, i=i: reference(name, dtype)[i])


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_stays_in_its_window(computed, isa, name):
    """Not so in the gradients of what all windows share."""
    layers = CASES[name][4]
    plain, dirty = computed(isa)[name]
    exact = results(name, torch.float64, "reference", spoil)
    for clean, found, expected in zip(plain[: 1 + layers], dirty, exact, strict=False):
        assert torch.equal(found.isnan(), expected.isnan())
        rows = ~expected.isnan().flatten(0, -2).any(-1)
        assert rows.any() and torch.equal(found.flatten(0, -2)[rows], clean.flatten(0, -2)[rows])


@each_isa
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] > 1 and CASES[name][1] > 1])
def test_tiles_are_in_use(computed, isa, name):
    """Weights are rounded to be multiplied, where the form in float32 rounds nothing."""
    for ours, theirs in zip(computed(isa)[name][0][:2], computed("portable")[name][0], strict=False):
        assert not torch.equal(ours, theirs)
