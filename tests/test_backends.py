"""Choosing a backend, and what is said when one is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import vlmkern
from vlmkern import ops
from vlmkern.dispatch import providers

HERE = str(Path(__file__).parent)


def run_python(code, **environment):
    """Runs code in a fresh interpreter; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        # what the tests share is there for the code too
        env={**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_report():
    report = vlmkern.backends()
    assert set(report) == {"reference", "native", "triton"}
    assert report["reference"]["available"] is True
    assert all(
        isinstance(entry["available"], bool) and ("reason" in entry) != entry["available"] for entry in report.values()
    )
    assert isinstance(report["native"]["isa"], str)
    json.dumps(report)


def test_unknown_name():
    with (
        pytest.raises(ValueError, match="use_backend: got 'fast', expected one of auto, reference, native, triton"),
        vlmkern.use_backend("fast"),
    ):
        pass


def test_a_named_backend_does_not_fall_back():
    if not vlmkern.backends()["native"]["available"]:
        pytest.skip(vlmkern.backends()["native"]["reason"])
    x, w_up, w_down = (torch.randn(*s, dtype=torch.float64) for s in ((3, 4), (10, 4), (6, 5)))
    with vlmkern.use_backend("native"), pytest.raises(vlmkern.BackendUnavailable, match="float64"):
        ops.swiglu_mlp(x, w_up, w_down)
    assert ops.swiglu_mlp(x, w_up, w_down).dtype == torch.float64


def test_triton_on_cpu_tensors_raises():
    with (
        pytest.raises(vlmkern.BackendUnavailable, match=r"TRITON_INTERPRET=1|takes cuda tensors"),
        vlmkern.use_backend("triton"),
    ):
        ops.swiglu_mlp(torch.randn(2, 4), torch.randn(10, 4), torch.randn(6, 5))


def test_code_compiled_for_one_backend_does_not_run_silently_under_another():
    op = torch.ops.vlmkern.linear.default
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with (
        vlmkern.use_backend("native"),
        pytest.raises(
            vlmkern.BackendUnavailable, match="'native' is in force, but the code that runs was compiled for"
        ),
    ):
        op(x, w, None, "none", None, "reference")


def test_choice_ends_with_the_block_and_belongs_to_the_thread():
    seen = {}

    def other():
        seen["other"] = vlmkern.dispatch.choice.current()

    with vlmkern.use_backend("reference"):
        with vlmkern.use_backend("auto"):
            assert vlmkern.dispatch.choice.current() == "auto"
        assert vlmkern.dispatch.choice.current() == "reference"
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen["other"] == vlmkern.dispatch.choice.current() == "auto"


def test_backward_uses_the_backend_of_its_forward(monkeypatch):
    used = recorded(monkeypatch)
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    with vlmkern.use_backend("reference"):
        out = ops.attention(q, q, q)
    out.sum().backward()
    assert used == [("attention", "reference"), ("attention_bwd", "reference")]
    with vlmkern.use_backend("reference"):
        out = ops.attention(q, q, q)
        with vlmkern.use_backend("auto"):
            thread = threading.Thread(target=lambda: out.sum().backward())
            thread.start()
            thread.join()
    assert used[2:] == [("attention", "reference"), ("attention_bwd", "reference")]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_code_follows_the_choice_forwards_and_backwards(monkeypatch, compiler):
    used = recorded(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: ops.attention(q, q, q).sum(), backend=compiler, fullgraph=True)
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    for name in ("auto", "reference", "native", "auto"):
        if name == "native" and not vlmkern.backends()["native"]["available"]:
            continue
        used.clear()
        with vlmkern.use_backend(name):
            out = compiled(q)
        # on a thread of its own, as CUDA gradients are
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
        assert used == [("attention", name), ("attention_bwd", name)]


def recorded(monkeypatch):
    """(op, backend) of every call from here on."""
    used, run = [], providers.run
    monkeypatch.setattr(
        providers,
        "run",
        lambda op, problem, device, chosen: (used.append((op.name, chosen)), run(op, problem, device, chosen))[1],
    )
    return used


def test_environment_variable():
    code = (
        "import vlmkern, torch; q = torch.randn(1, 3, 2, 8); vlmkern.ops.attention(q, q, q);"
        "print(vlmkern.dispatch.choice.current())"
    )
    assert run_python(code, VLMKERN_BACKEND="reference").stdout.strip().endswith("reference")
    assert "VLMKERN_BACKEND: got 'quick', expected one of" in run_python(code, VLMKERN_BACKEND="quick").stderr
    if not torch.cuda.is_available():
        assert "BackendUnavailable" in run_python(code, VLMKERN_BACKEND="triton").stderr


def test_import_is_light():
    """No Triton, no GPU driver until something asks for them."""
    code = (
        "import sys, vlmkern, torch; names = ('triton', 'transformers');"
        "print(*(name in sys.modules for name in names), torch.cuda.is_initialized())"
    )
    assert run_python(code).stdout.strip() == "False False False"


def test_without_the_extension_ops_work_and_say_so_once():
    code = """
import sys, warnings
sys.modules["vlmkern._C"] = None
import torch, vlmkern
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = vlmkern.ops.swiglu_mlp(torch.ones(2, 4), torch.ones(10, 4), torch.ones(6, 5))
    print(y.shape, len(caught), caught[0].message)
print(vlmkern.backends()["native"])
try:
    with vlmkern.use_backend("native"):
        pass
except vlmkern.BackendUnavailable as error:
    print("raised", error)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("torch.Size([2, 6]) 1 vlmkern: backend 'native' is not available")
    assert "'available': False" in lines[1] and lines[2].startswith("raised")
