"""Who computes a call: asked, not tried; and what is said of it."""

from __future__ import annotations

import pytest
import torch
from test_backends import run_python

import vlmkern
from vlmkern import ops
from vlmkern.dispatch import providers, targets
from vlmkern.ops import _cpu_products
from vlmkern.ops.linear import native as native_linear
from vlmkern.ops.linear.problem import Linear

NATIVE = vlmkern.backends()["native"]
needs_native = pytest.mark.skipif(not NATIVE["available"], reason=NATIVE.get("reason", ""))


def linear(rows, dtype=torch.float32, inputs=24, outputs=16):
    return Linear(torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype), None, "none", None)


@pytest.mark.parametrize("name", sorted(providers._ops))
def test_arguments_of_an_op_are_the_fields_of_its_problem(name):
    schema = getattr(torch.ops.vlmkern, name).default._schema
    assert [argument.name for argument in schema.arguments] == [*providers._ops[name].problem._fields, "backend"]


@pytest.mark.parametrize("name", sorted(providers._ops))
def test_every_provider_has_the_op_and_says_what_it_supports(name):
    for backend in providers._ops[name].providers:
        if backend == "triton":
            pytest.importorskip("triton")
        found = providers.provider(name, backend)
        assert callable(found.call) and (backend == "reference" or found.supports is not providers._anything)


@needs_native
def test_what_is_explained_is_not_run(monkeypatch):
    monkeypatch.setattr(_cpu_products, "_few_rows", None)
    p = linear(2)
    (decision,) = vlmkern.explain(ops.linear, p.x, p.weight)
    assert decision == ("linear", "native", "linear_few_rows", {})
    with pytest.raises(TypeError, match="NoneType"):
        ops.linear(p.x, p.weight)


@needs_native
def test_an_explanation_says_why_not():
    p = linear(3, torch.float64)
    (decision,) = vlmkern.explain(ops.linear, p.x, p.weight)
    assert str(decision) == "linear: reference; not native: it has no kernel for torch.float64"
    with vlmkern.use_backend("native"), pytest.raises(vlmkern.BackendUnavailable, match="vlmkern::linear: it has no"):
        vlmkern.explain(ops.linear, p.x, p.weight)
    with pytest.raises(ValueError, match="weight: got shape"):
        vlmkern.explain(ops.linear, p.x, p.weight.T)


@needs_native
def test_what_raises_in_a_kernel_is_not_taken_for_a_refusal(monkeypatch):
    """The reference would give a result, and nobody would hear of the fault."""

    def broken(*args):
        raise vlmkern.BackendUnavailable("from inside")

    monkeypatch.setattr(_cpu_products, "_few_rows", broken)
    p = linear(2)
    with pytest.raises(vlmkern.BackendUnavailable, match="from inside"):
        ops.linear(p.x, p.weight)


@needs_native
@pytest.mark.parametrize(
    "isa, rows, dtype, supported",
    [
        ("avx512_bf16", 100, torch.bfloat16, True),
        ("avx512", 100, torch.bfloat16, True),
        ("avx2", 100, torch.bfloat16, True),
        ("avx2", 3, torch.bfloat16, True),
        ("avx2", 100, torch.float32, True),
        ("avx512_bf16", 100, torch.float16, True),
        ("portable", 100, torch.float16, True),
        ("portable", 3, torch.float64, False),
    ],
)
def test_targets_need_not_be_this_machine(isa, rows, dtype, supported):
    reason = native_linear.supports(linear(rows, dtype), targets.of_isa(isa))
    assert (reason is None) == supported, reason


@needs_native
def test_this_machine_is_a_target_like_any_other():
    here = targets.of_device("cpu")
    assert here.device == "cpu" and here.isa == NATIVE["isa"] and torch.float32 in here.onednn
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = linear(50, dtype)
        (decision,) = vlmkern.explain(ops.linear, p.x, p.weight)
        assert (decision.backend == "native") == (native_linear.supports(p, here) is None)


@needs_native
def test_the_log_names_each_decision_once():
    code = """
import torch, vlmkern
for dtype in (torch.float32, torch.float64):
    x, w = torch.randn(2, 24, dtype=dtype), torch.randn(16, 24, dtype=dtype)
    for _ in range(3):
        vlmkern.ops.linear(x, w)
"""
    lines = run_python(code, VLMKERN_LOG="dispatch").stderr.splitlines()
    assert lines == [
        "linear: native (linear_few_rows)",
        "linear: reference; not native: it has no kernel for torch.float64",
    ]
    assert run_python(code).stderr == ""
