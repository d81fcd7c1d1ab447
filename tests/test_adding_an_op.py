"""The example of CONTRIBUTING.md: an op of a problem, a reference and a provider is a torch op like any other."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import vlmkern
from vlmkern._ops import ops as registered
from vlmkern.dispatch import checks, choice, library, providers


class ScaleRows(NamedTuple):
    x: Tensor  # [M, C]
    factor: float


class ScaleRowsGradient(NamedTuple):
    grad: Tensor
    factor: float


def room(name, **functions):
    module = ModuleType(name)
    module.__dict__.update(functions)
    return module


def _check(p):
    checks.float_tensor("x", p.x)
    checks.rank("x", p.x, "[M, C]")


def _fake(p):
    return torch.empty_like(p[0], memory_format=torch.contiguous_format)


def _setup_context(ctx, p, output):
    ctx.factor = p.factor


def _backward(ctx, needed, grad):
    return registered.scale_rows_bwd(grad, ctx.factor, ctx.backend), None


@pytest.fixture(scope="module")
def scale_rows():
    reference = room(
        "reference",
        scale_rows=lambda p: p.x * p.factor,
        scale_rows_bwd=lambda p: (p.grad * p.factor).contiguous(),
    )
    native = room(
        "native",
        supports=lambda p, target: None if p.x.shape[1] <= 8 else f"it takes up to 8 columns, got {p.x.shape[1]}",
        supports_bwd=lambda p, target: "it has no gradients",
        kernel=lambda p: "scale_few_columns",
        scale_rows=lambda p: p.x.clone(memory_format=torch.contiguous_format).mul_(p.factor),
        scale_rows_bwd=None,
    )
    op, _ = library.define_with_gradient(
        "scale_rows",
        library.Form(ScaleRows, "Tensor", _check, _fake),
        library.Form(ScaleRowsGradient, "Tensor", lambda p: None, _fake),
        providers={"reference": reference, "native": native},
        setup_context=_setup_context,
        backward=_backward,
    )
    yield lambda x, factor: op(x, factor, choice.requested())
    # the tests of what is registered go through all ops
    for name in ("scale_rows", "scale_rows_bwd"):
        del providers._ops[name]


def test_it_is_a_torch_op(scale_rows):
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(scale_rows(x, 3.0), 3 * x)
    assert torch.autograd.gradcheck(lambda x: scale_rows(x, 3.0), x)
    torch.library.opcheck(registered.scale_rows.default, (x, 3.0))
    compiled = torch.compile(lambda x: scale_rows(x, 3.0) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 3 * x + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert scale_rows(torch.randn(2, 3), 2.0).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x: got shape \[3\], expected \[M, C\]"):
        scale_rows(torch.randn(3), 2.0)


def test_its_providers_are_asked(scale_rows):
    if not vlmkern.backends()["native"]["available"]:
        pytest.skip(vlmkern.backends()["native"]["reason"])
    (narrow,), (wide,) = (vlmkern.explain(scale_rows, torch.randn(2, n), 1.0) for n in (8, 9))
    assert str(narrow) == "scale_rows: native (scale_few_columns)"
    assert str(wide) == "scale_rows: reference; not native: it takes up to 8 columns, got 9"
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(scale_rows(x, 2.0).sum(), x)[0], torch.full_like(x, 2))
    with vlmkern.use_backend("native"), pytest.raises(vlmkern.BackendUnavailable, match="it has no gradients"):
        scale_rows(x, 2.0).sum().backward()
