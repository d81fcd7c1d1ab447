"""The GPU benchmark's own logic, on small CPU cases: results checked before they are timed, rows, the table."""

from __future__ import annotations

import time

import gpu
import gpu_cases
import pytest
import torch
from rich.console import Console


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    def times(calls, rounds):
        begin = time.perf_counter()
        return {name: (call(), 1e3 * (time.perf_counter() - begin))[1] for name, call in calls.items()}

    monkeypatch.setattr(gpu, "device_times", times)
    monkeypatch.setattr(gpu, "peak_memory", lambda call: 1.0)
    monkeypatch.setattr(gpu_cases, "compiled", lambda function: lambda *args: function(*args))
    for name, value in {"CROPS": 1, "HEADS": 2, "TOKENS": 729}.items():
        monkeypatch.setattr(gpu_cases, name, value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpu_cases.attention(2, 50, 72, torch.bfloat16, "cpu"),
        lambda: gpu_cases.attention_pool(2, 8, 8, torch.bfloat16, "cpu"),
        lambda: gpu_cases.swiglu_mlp(3, torch.bfloat16, "cpu"),
        lambda: gpu_cases.linear("gelu_tanh", False, torch.bfloat16, "cpu"),
        lambda: gpu_cases.linear("none", True, torch.bfloat16, "cpu"),
        # in bfloat16 torch sums the gradient by the bias in bfloat16 on CPUs
        lambda: gpu_cases.add_layer_norm(torch.float32, "cpu"),
    ],
    ids=["attention", "attention_pool", "swiglu_mlp", "linear", "linear_residual", "add_layer_norm"],
)
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_rows(make, mode):
    case = make()
    rows = gpu.measure(case, mode, 1, {"matmul_tflops": 1.0})
    assert [row["provider"] for row in rows] == list(case.providers)
    ours = next(row for row in rows if row["provider"] == "vlmkern")
    assert ours["relative_error"] < 0.05 and ours["tflops"] > 0 and ours["x_best_other"] > 0
    console = Console(width=150)
    with console.capture() as printed:
        console.print(gpu.table(case, mode, rows))
    assert "vlmkern" in printed.get() and mode in printed.get()


def test_wrong_results_are_not_timed():
    case = gpu_cases.swiglu_mlp(3, torch.bfloat16, "cpu")
    right = case.providers["vlmkern"]
    case.providers["vlmkern"] = lambda x: right(x) * 1.2
    row = gpu.measure(case, "fwd", 1, {"matmul_tflops": 1.0})[-1]
    assert "ms" not in row and row["unavailable"].startswith("wrong: relative error")


def test_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err
