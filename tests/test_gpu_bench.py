"""The GPU benchmark's own logic, on small CPU cases: results checked before they are timed, rows, tables."""

from __future__ import annotations

import ast
import inspect
import operator
import re
import sys
from functools import partial

import gpu_cases
import gpu_device
import gpu_measure
import gpu_summary
import pytest
import torch
from rich.console import Console

CEILINGS = {"matmul_tflops": 100.0, "copy_gb_per_s": 1000.0}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    device = gpu_device.Rehearsal()
    for module in (gpu_cases, gpu_measure):
        monkeypatch.setattr(module, "DEVICE", device)
    sizes = {"CROPS": 1, "HEADS": 2, "WIDTH": 144, "HIDDEN": 40, "OUT": 24, "GRID": (5, 5), "TOKENS": 25, "WINDOWS": 9}
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_cases, name, value)


CASES = {
    "attention": lambda: gpu_cases.attention(2, 50, 72, torch.bfloat16),
    "causal_attention": lambda: gpu_cases.causal_attention(40, 4, 2, 72, 5.0, torch.bfloat16),
    "rotary_attention": lambda: gpu_cases.rotary_attention(2, 20, 72, torch.bfloat16),
    "attention_pool": lambda: gpu_cases.attention_pool(2, 8, 8, torch.bfloat16),
    "swiglu_mlp": lambda: gpu_cases.swiglu_mlp(3, torch.bfloat16),
    "linear": lambda: gpu_cases.linear(144, 40, "gelu_tanh", torch.bfloat16),
    "linear_residual": lambda: gpu_cases.linear(40, 144, "none", torch.bfloat16),
    # in bfloat16 torch sums the gradient by the bias in bfloat16 on CPUs
    "add_layer_norm": lambda: gpu_cases.add_layer_norm(torch.float32),
    "rms_norm": lambda: gpu_cases.rms_norm(torch.bfloat16),
    "rms_norm_of_heads": lambda: gpu_cases.rms_norm_of_heads(8, torch.bfloat16),
    "rms_norm_and_rotary": lambda: gpu_cases.rms_norm_and_rotary(8, torch.bfloat16),
}


def measure(case, mode="fwd", **options):
    return gpu_measure.measure(case, mode, rounds=1, ceilings=CEILINGS, **options)


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
@pytest.mark.parametrize("name", CASES)
def test_rows(name, mode):
    case = CASES[name]()
    rows = measure(case, mode)
    assert [row["provider"] for row in rows] == list(case.providers)
    ours = rows[-1]
    assert ours["provider"] == "vlmkern" and ours["relative_error"] < 0.05 and ours["x_best_other"] > 0
    flops = case.flops * (1 if mode == "fwd" else 2.5 if name.endswith("attention") else 2)
    assert ours["tflops"] == pytest.approx(flops / ours["ms"] / 1e9)
    # the floor is the longer of two times, here of the bytes
    assert ours["of_floor"] == pytest.approx(max(ours["tflops"] / 100, ours["gb_per_s"] / 1000))
    assert gpu_summary.one_line("case", rows).startswith("case: us: ")


@pytest.mark.parametrize("make", [gpu_cases.block, partial(gpu_cases.vision_path, 4, (-4, -3))], ids=["block", "path"])
@pytest.mark.parametrize("theirs", [True, False])
def test_parts_of_the_model_with_and_without_transformers(make, theirs, monkeypatch):
    if theirs:
        pytest.importorskip("transformers")
    monkeypatch.setattr(gpu_cases, "_is_there", lambda module: theirs and module == "transformers")
    rows = measure(make(torch.float32))
    assert [row["provider"] for row in rows] == (["transformers", "compile"] if theirs else []) + ["vlmkern"]
    assert all(row["relative_error"] < 1e-4 for row in rows)


def test_without_what_the_models_need_there_are_the_ops(monkeypatch):
    assert gpu_cases.op_entries() and gpu_cases.block_entries()
    monkeypatch.setattr(gpu_cases, "_is_there", lambda module: module != "tokenizers")
    assert gpu_cases.op_entries() and gpu_cases.block_entries() == []


def test_torch_has_all_that_a_card_is_asked():
    """What a rehearsal cannot go through, as far as names go."""
    tree = ast.parse(inspect.getsource(gpu_device.Cuda))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    asked = {name for name in names if re.fullmatch(r"torch(\.\w+)+", name)}
    assert len(asked) > 15
    for name in asked:
        operator.attrgetter(name.removeprefix("torch."))(torch)
    # and a rehearsal answers all that a card does
    for name in vars(gpu_device.Cuda):
        assert name in vars(gpu_device.Rehearsal) or name in ("captured",), name


def test_the_reference_is_of_the_same_values_in_float32():
    case = CASES["swiglu_mlp"]()
    (exact,) = gpu_measure.wide_result(case, "fwd")
    assert exact.dtype == torch.float32 and all(weight.dtype == torch.bfloat16 for weight in case.weights)
    x, (up, down) = case.inputs[0].double(), (weight.double() for weight in case.weights)
    value, gate = (x @ up.T).chunk(2, -1)
    torch.testing.assert_close(exact.double(), (gate.sigmoid() * gate * value) @ down.T, rtol=1e-4, atol=1e-5)


def test_wrong_results_are_not_timed():
    case = CASES["swiglu_mlp"]()
    right = case.providers["vlmkern"]
    case.providers["vlmkern"] = lambda x: right(x) * 1.2
    case.providers["nan"] = lambda x: right(x) * torch.nan
    for row in measure(case)[-2:]:
        assert "ms" not in row and row["unavailable"].startswith("wrong: relative error")


def test_providers_that_fail_say_why_and_the_others_go_on():
    case = CASES["swiglu_mlp"]()

    def fails(x):
        raise RuntimeError("no kernel\n  for this")

    case.providers = {"fails": fails, **case.providers}
    rows = measure(case)
    assert rows[0] == {"provider": "fails", "unavailable": "RuntimeError: no kernel for this"}
    assert all("ms" in row for row in rows[1:])


def test_a_provider_that_breaks_the_device_ends_the_measurement(monkeypatch):
    case, seen = CASES["swiglu_mlp"](), []

    def breaks(x):
        monkeypatch.setattr(gpu_measure.DEVICE, "alive", lambda: False)
        raise RuntimeError("illegal memory access")

    case.providers["breaks"] = breaks
    with pytest.raises(gpu_measure.DeviceLost, match="breaks"):
        measure(case, at=seen.append)
    assert seen == [None, "eager", "compile", "vlmkern", "breaks"]


def test_providers_are_left_out_by_choice_by_what_they_did_and_by_what_they_have():
    case = CASES["attention"]()
    case.providers["flash_attn_4"] = case.providers["eager"]
    rows = {row["provider"]: row for row in measure(case, "bwd", names={"eager", "vlmkern", "flash_attn_4"})}
    assert set(rows) == {"eager", "vlmkern", "flash_attn_4"} and rows["flash_attn_4"]["unavailable"] == "forward only"
    rows = {row["provider"]: row for row in measure(case, lost={"eager"})}
    assert "ended the process" in rows["eager"]["unavailable"] and "ms" in rows["flash_attn_4"]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Where packages are written that stand for real ones, of which nothing is left after the test."""

    def forget():
        for name in [name for name in sys.modules if name.startswith(("flash_attn", "transformer_engine"))]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()


@pytest.mark.parametrize(
    "package, provider, outs",
    [
        ("flash_attn_interface", "flash_attn_3", 2),
        ("flash_attn.cute", "flash_attn_4", 2),
        ("flash_attn", "flash_attn_2", 1),
    ],
)
def test_attention_of_libraries_that_are_there(packages, package, provider, outs):
    """Stand-ins with the signatures of the real ones."""
    file = packages / package.replace(".", "/")
    file.mkdir(parents=True)
    for folder in {packages / package.split(".")[0], file}:
        (folder / "__init__.py").touch()
    (packages / "flash_attn_2_cuda.py").touch()
    (file / "__init__.py").write_text(
        "import torch.nn.functional as F\n"
        "def flash_attn_func(q, k, v):\n"
        "    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)\n"
        f"    return {'out' if outs == 1 else '(out, None)'}\n"
    )
    case = CASES["attention"]()
    (row,) = measure(case, names={provider})
    assert row["relative_error"] < 0.05
    assert (provider in case.forward_only) == (provider == "flash_attn_4")


def test_attention_of_transformer_engine(packages):
    (packages / "transformer_engine").mkdir()
    (packages / "transformer_engine" / "__init__.py").touch()
    (packages / "transformer_engine" / "pytorch.py").write_text(
        "import torch.nn.functional as F\n"
        "class DotProductAttention:\n"
        "    def __init__(self, num_attention_heads, kv_channels, *, attention_dropout, qkv_format, attn_mask_type):\n"
        "        assert (qkv_format, attn_mask_type, attention_dropout) == ('bshd', 'no_mask', 0.0)\n"
        "        self.sizes = num_attention_heads, kv_channels\n"
        "    def __call__(self, q, k, v):\n"
        "        assert tuple(q.shape[2:]) == self.sizes and q.is_contiguous()\n"
        "        q, k, v = (x.transpose(1, 2) for x in (q, k, v))\n"
        "        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)\n"
    )
    (row,) = measure(CASES["attention"](), names={"transformer_engine"})
    assert row["relative_error"] < 0.05


def test_each_sdpa_backend_is_forced():
    rows = {row["provider"]: row for row in measure(CASES["attention"]())}
    assert {"sdpa_cudnn", "sdpa_flash", "sdpa_efficient"} <= set(rows)
    # which a CPU does not have
    assert "No viable backend" in rows["sdpa_cudnn"]["unavailable"]


def test_the_table_takes_each_ratio_from_one_run():
    def rows(**times):
        return [{"provider": p, "ms": ms, "of_floor": 0.5, "relative_error": 1e-3} for p, ms in times.items()]

    found = {
        "case fwd": {
            "": rows(eager=0.4, vlmkern=0.2),
            " tuned": rows(sdpa_cudnn=0.3, vlmkern=0.1),
            " compiled": rows(compile=0.24, vlmkern=0.12),
        },
        "other fwd": {"": [{"provider": "vlmkern", "unavailable": "wrong: relative error 1"}]},
    }
    console = Console(width=150)
    with console.capture() as printed:
        console.print(gpu_summary.cases_table(found))
    case, other = [line for line in printed.get().splitlines() if " fwd " in line]
    cells = [cell.strip() for cell in case.strip("│").split("│")]
    assert cells == [
        "case fwd",
        "50.0",
        "200.0",
        "100.0",
        "50%",
        "sdpa_cudnn",
        "300.0",
        "3.00",
        "240.0",
        "2.00",
        "1e-03",
    ]
    assert "wrong: relative error 1" in other
