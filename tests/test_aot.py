"""`vlmkern aot`: every kernel in every configuration compiles for every target; on sm_90 as well as it must."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_backends import run_python

pytest.importorskip("triton")

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
    "shipped",
}
# kernels that consist of matrix products
MATRIX = {"attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkv_kernel", "swiglu_mlp_fwd_kernel"}


def aot(*arguments):
    command = [sys.executable, "-m", "vlmkern", "aot", "--json", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
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
    from vlmkern.aot import jobs

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
def test_padding_the_head_to_a_power_of_two_takes_more_instructions(rows, arch):
    of_arch = [row for row in rows if row["kernel"] == "attention_fwd_kernel" and row["arch"] == arch]
    (baseline,) = (row for row in of_arch if not row["shipped"])
    same = ("BLOCK_M", "BLOCK_N", "num_warps")
    ours = [
        row
        for row in of_arch
        if row["shipped"]
        and row["shape"].get("head_dim") == 72
        and all(row["config"][key] == baseline["config"][key] for key in same)
    ]
    assert ours or arch != 90
    for row in ours:
        assert row["instructions"] < baseline["instructions"]


def test_one_kernel_and_target():
    rows = aot("--arch", "90", "--kernel", "attention_bwd_dq_kernel")
    assert rows and {(row["kernel"], row["arch"]) for row in rows} == {("attention_bwd_dq_kernel", 90)}


def test_errors():
    unknown = run_python("from vlmkern.cli import main; import sys; sys.exit(main(['aot', '--kernel', 'nope']))")
    assert unknown.returncode == 2 and "--kernel: got 'nope', expected one of" in unknown.stderr
    interpreted = run_python("from vlmkern.cli import main; import sys; sys.exit(main(['aot']))", TRITON_INTERPRET="1")
    assert interpreted.returncode == 2 and "TRITON_INTERPRET" in interpreted.stderr
