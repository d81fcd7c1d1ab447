"""`vlmkern aot`: every kernel in every configuration compiles for every target; on sm_90 as well as it must."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from test_backends import run_python

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vlmkern.aot import MODULES, Job, _serialized, compile_launch, jobs, report
from vlmkern.kernels import _launch
from vlmkern.kernels._launch import Launch
from vlmkern.kernels.add_layer_norm import norm as add_layer_norm
from vlmkern.kernels.attention import forward as attention

KEYS = {
    "kernel",
    "config",
    "shape",
    "arch",
    "dtype",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "ctas_per_sm",
    "instructions",
    "mma",
    "tma",
    "cp_async",
    "serialized",
    "shipped",
}
# kernels that consist of matrix products
MATRIX = {"attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkv_kernel", "swiglu_mlp_fwd_kernel"}


def aot(*arguments):
    command = [sys.executable, "-m", "vlmkern", "aot", "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def describe(row):
    return {key: row[key] for key in ("kernel", "shape", "config", "dtype")}


@pytest.fixture(scope="module")
def rows():
    return aot()


def on_hopper(rows):
    return [row for row in rows if row["arch"] == 90 and row["shipped"]]


def test_every_kernel_for_every_target(rows):
    assert all(set(row) == KEYS for row in rows)
    kernels = {job.kernel for job in jobs()}
    assert kernels >= MATRIX
    for arch in (80, 90, 100):
        assert {row["kernel"] for row in rows if row["arch"] == arch and row["shipped"]} == kernels


def test_no_spills_on_hopper(rows):
    assert [describe(row) for row in on_hopper(rows) if row["spill_bytes"]] == []


def test_warpgroup_products_on_hopper(rows):
    """float32 products are made without tensor cores, as their tf32 is not float32."""
    lacking = [
        describe(row)
        for row in on_hopper(rows)
        if row["kernel"] in MATRIX and row["dtype"] == "bfloat16" and not any(m.startswith("HGMMA") for m in row["mma"])
    ]
    assert lacking == []


def test_warpgroup_products_overlap_on_hopper(rows):
    """Products that wait for one another leave the tensor cores idle, and nothing but the assembler says so."""
    assert [describe(row) for row in on_hopper(rows) if row["serialized"]] == []


@triton.jit
def product(x, w, p_out, columns, SIZE: tl.constexpr, STEP: tl.constexpr):
    tl.assume(columns > 0)
    b_acc = tl.zeros([SIZE, SIZE], tl.float32)
    for i_col in range(0, columns, STEP):
        b_acc = tl.dot(x.load([0, i_col]), w.load([0, i_col]).T, b_acc)
    o = tl.arange(0, SIZE)
    tl.store(p_out + o[:, None] * SIZE + o[None, :], b_acc)


@pytest.mark.parametrize("limit, serialized", [({}, False), ({"maxnreg": 128}, True)])
def test_products_in_series_are_recognised(limit, serialized):
    """As they are where a thread has no more registers than the sums take, 128."""
    x = TensorDescriptor(torch.empty(128, 512, dtype=torch.bfloat16, device="meta"), [128, 512], [512, 1], [128, 64])
    out = torch.empty(128, 128, device="meta")
    constants, options = {"SIZE": 128, "STEP": 64}, {"num_warps": 4, "num_stages": 3, **limit}
    compiled = compile_launch(Launch(product, (1,), (x, x, out, 512), constants, options), 90)
    assert _serialized(compiled.asm["ptx"]) is serialized


def test_compiling_leaves_the_driver_as_it_was():
    """Launches after it, in the same process, are meant for a device."""
    from triton.runtime import driver

    before = driver._active
    with _launch.recording(90) as launches:
        add_layer_norm.KERNELS[0].example(torch.float32, "meta", cols=8)()
    compile_launch(launches[0], 90)
    assert driver._active is before


def test_asynchronous_copies_on_hopper(rows):
    lacking = [
        describe(row)
        for row in on_hopper(rows)
        if row["kernel"] in MATRIX and row["dtype"] == "bfloat16" and row["tma"] + row["cp_async"] == 0
    ]
    assert lacking == []


def test_attention_keeps_two_blocks_a_multiprocessor(rows):
    """Up to head dimension 96; at 128 one block's accumulator and keys take more than half of it."""
    few = [
        describe(row)
        for row in on_hopper(rows)
        if row["kernel"] == "attention_fwd_kernel" and row["shape"]["head_dim"] <= 96 and row["ctas_per_sm"] < 2
    ]
    assert few == []


@pytest.mark.parametrize("arch", [80, 90])
def test_padding_the_head_to_a_power_of_two_takes_more_instructions(arch, rows):
    """In blocks of one size, whether or not the tables have a configuration of it."""
    (kernel,) = attention.KERNELS
    (padded,) = [row for row in rows if (row["kernel"], row["arch"], row["shipped"]) == (kernel.name, arch, False)]
    assert padded["config"] == kernel.baseline
    split = {key: value for key, value in kernel.baseline.items() if key != "LO"}
    (ours,) = report([Job(kernel.name, arch, 16, kernel.shape, {}, split, shipped=False)])
    assert kernel.shape["head_dim"] == 72 and ours["instructions"] < padded["instructions"]


@pytest.mark.parametrize("bits", [16, 32])
def test_candidates_are_configurations(bits):
    """Whole ones, of which launches are made, and none twice."""
    dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
    for module in MODULES:
        for kernel in import_module(f"vlmkern.kernels.{module}").KERNELS:
            if str(bits) not in _launch.table(kernel.name, 90)["default"]:
                continue
            call = kernel.example(dtype, "meta", **kernel.shape)
            candidates = kernel.candidates_for(bits)
            assert candidates and len({tuple(sorted(config.items())) for config in candidates}) == len(candidates)
            for config in candidates:
                with _launch.forced(kernel.name, config), _launch.recording(90) as launches:
                    call()
                (launch,) = [launch for launch in launches if launch.kernel is kernel.function]
                # how many programs there are is no constant
                assert {key: config[key] for key in config if key != "PROGRAMS"}.items() <= (
                    launch.constants | launch.options
                ).items()


def test_one_kernel_and_target():
    rows = aot("--arch", "90", "--kernel", "silu_mul_fwd_kernel")
    assert rows and {(row["kernel"], row["arch"]) for row in rows} == {("silu_mul_fwd_kernel", 90)}


def test_errors():
    unknown = run_python("from vlmkern.cli import main; import sys; sys.exit(main(['aot', '--kernel', 'nope']))")
    assert unknown.returncode == 2 and "--kernel: got 'nope', expected one of" in unknown.stderr
    interpreted = run_python("from vlmkern.cli import main; import sys; sys.exit(main(['aot']))", TRITON_INTERPRET="1")
    assert interpreted.returncode == 2 and "TRITON_INTERPRET" in interpreted.stderr
