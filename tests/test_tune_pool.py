"""Compilation ahead in processes of their own: what they leave is what a launch finds, and what dies costs one task."""

from __future__ import annotations

import json
import os
import time

import pytest
from test_backends import run_python
from tune_support import NAME, few, few_candidates, problems, run

pytest.importorskip("triton")

from vlmkern import tune
from vlmkern.cli import main
from vlmkern.kernels.attention import forward as attention
from vlmkern.tune import rounds
from vlmkern.tune.candidates import kernel_of
from vlmkern.tune.pool import (
    Binary,
    Failed,
    InProcess,
    Pool,
    Task,
    cannot_launch,
    compile_task,
    least_shared_bytes,
)

__all__ = ["few"]


def collect(pool, count, seconds=60.0):
    """Results by token, as soon as there are so many."""
    found, end = {}, time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        result = pool.next(0.5)
        if result is not None:
            found[result[0]] = result[1]
    return found


def test_a_task_that_kills_its_process_costs_that_task():
    """So does one that takes too long, with what it has started; the others are done as if there had been neither."""
    tasks = {
        "sum": "1 + 1",
        "dies": "__import__('os').kill(__import__('os').getpid(), 9)",
        "hangs": "__import__('subprocess').run(['sleep', '1234.5'])",
        "raises": "1 / 0",
        "last": "2 + 2",
    }
    with Pool(eval, tasks.items(), workers=2, limit=3.0) as pool:
        found = collect(pool, len(tasks))
    assert found == {
        "sum": 2,
        "dies": Failed("the process that compiled it was killed by signal 9"),
        "hangs": Failed("did not compile within 3 s"),
        "raises": Failed("ZeroDivisionError: division by zero"),
        "last": 4,
    }
    assert not any(b"1234.5" in command for command in commands())


def commands():
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as stream:
                yield stream.read()
        except OSError:
            # it has ended
            continue


def test_leaving_a_pool_ends_its_processes():
    begin = time.monotonic()
    with Pool(eval, [("pid", "__import__('os').getpid()"), ("long", "__import__('time').sleep(600)")], 1) as pool:
        pid = collect(pool, 1)["pid"]
        os.kill(pid, 0)
    assert time.monotonic() - begin < 60
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_processes_that_do_not_start(monkeypatch):
    """As where the function is not found by its name."""
    monkeypatch.setattr("vlmkern.tune.pool._work", os.abort)
    with Pool(len, [(i, "x") for i in range(3)], workers=1) as pool:
        found = collect(pool, 3)
    assert set(found.values()) == {Failed("the processes that compile do not start")} and len(found) == 3


def test_in_this_process():
    with InProcess(eval, [(1, "1 + 1"), (2, "1 / 0")]) as pool:
        assert [pool.next(0) for _ in range(3)] == [(1, 2), (2, Failed("ZeroDivisionError: division by zero")), None]


LATER = """
import json, torch
from triton import knobs
from vlmkern.aot import compile_launch
from vlmkern.kernels import _launch
from vlmkern.kernels.swiglu_mlp import gate as swiglu_mlp
hits = []
knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
x = torch.randn(2548, 2 * 6144, dtype=torch.bfloat16)
with _launch.recording(90) as launches:
    for config in ({"BLOCK": 512, "num_warps": 2}, {"BLOCK": 512, "num_warps": 1}):
        with _launch.forced("silu_mul_fwd_kernel", config):
            swiglu_mlp.silu_mul(x)
from vlmkern import aot
for launch in launches:
    # as it is run: the options are those of the launch alone
    with aot._target(90):
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **launch.options)
print(json.dumps(hits))
"""


def test_what_is_compiled_ahead_is_found_by_a_launch(tmp_path, monkeypatch):
    """In another process, with tensors that hold values: what was compiled on none has the same key in the cache, and
    what was not compiled is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (problem,) = problems()
    with Pool(compile_task, [(0, Task(problem, {"BLOCK": 512, "num_warps": 2}, 90, 90))], 1) as pool:
        (binary,) = collect(pool, 1).values()
    assert isinstance(binary, Binary), binary
    result = run_python(LATER)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [True, False]


@pytest.mark.parametrize("arch", [80, 90])
def test_what_a_binary_says(arch):
    """Spills: 128 elements of two columns a thread do not fit into 32 registers."""
    (problem,) = problems()
    fits = compile_task(Task(problem, {"BLOCK": 1024, "num_warps": 4}, arch, arch))
    spills = compile_task(Task(problem, {"BLOCK": 8192, "num_warps": 2, "maxnreg": 32}, arch, arch))
    assert 0 < fits.registers < 64 and fits.warps == 4 and fits.local == 0
    assert spills.registers <= 32 and spills.local > 0
    assert cannot_launch(fits, 0) is None and cannot_launch(spills, 0) is None


TMA = {"BLOCK_M": 64, "BLOCK_N": 64, "TMA": True, "num_warps": 4}
ATTENTION = "attention_fwd_kernel"


@pytest.mark.parametrize(
    "problem, config",
    [
        (tune.Problem(ATTENTION, 16, {"tokens": 729, "head_dim": 72}), TMA | {"num_stages": 3}),
        (tune.Problem(ATTENTION, 16, {"tokens": 729, "head_dim": 64}), TMA | {"num_stages": 2}),
        (
            tune.Problem(ATTENTION, 32, {"tokens": 729, "head_dim": 64}),
            {"BLOCK_M": 32, "BLOCK_N": 32, "TMA": True, "num_warps": 4, "num_stages": 2},
        ),
        (
            tune.Problem("swiglu_mlp_fwd_kernel", 16, {"rows": 196, "channels": 1152, "features": 6144}),
            TMA | {"BLOCK_K": 64, "GROUP_M": 8, "PERSISTENT": False, "num_stages": 4},
        ),
    ],
)
def test_the_least_shared_memory_is_no_more_than_what_is_taken(problem, config):
    task = Task(problem, config, 90, 90)
    least, taken = least_shared_bytes(task), compile_task(task).shared
    assert least <= taken <= 3 * least
    # pointers in the place of descriptors: nothing is known
    assert least_shared_bytes(Task(problem, config, 80, 80)) == 0


def test_what_cannot_fit_is_not_compiled(monkeypatch):
    """128 keys and values of 128 float32 are 128 KiB; of three stages, two are in flight."""
    wide = TMA | {"BLOCK_N": 128, "num_stages": 3}
    problem = tune.Problem(ATTENTION, 32, {"tokens": 729, "head_dim": 128})
    assert least_shared_bytes(Task(problem, wide, 90, 90)) == 256 * 1024
    assert least_shared_bytes(Task(problem, wide | {"TMA": False}, 90, 90)) == 0
    kernel = kernel_of(problem)
    monkeypatch.setattr(attention, "KERNELS", (kernel._replace(wide_candidates=(wide,)),))
    compiled = []
    monkeypatch.setattr(rounds, "compile_task", lambda task: compiled.append(task) or Binary(0, 0, 32, 4, 0))
    (case,) = rounds.search([problem], 90, device=None, workers=0)
    (dropped,) = (outcome for outcome in case.outcomes.values() if outcome.dropped)
    assert dropped.config == wide and dropped.dropped == "arithmetic" and "262144 bytes" in dropped.reason
    assert wide not in [task.config for task in compiled] and len(compiled) == len(case.candidates) - 1


@pytest.mark.parametrize(
    "change, lacking",
    [
        ({}, None),
        ({"shared": 101}, "shared memory"),
        ({"tensor_columns": 513}, "shared memory"),
        ({"registers": 255, "warps": 8}, None),
        ({"registers": 129}, "registers"),
    ],
)
def test_what_cannot_be_launched(change, lacking):
    """Of 16 warps with more than 128 registers a thread, or at a limit of 100 bytes of shared memory."""
    binary = Binary(shared=100, tensor_columns=512, registers=128, warps=16, local=0)._replace(**change)
    found = cannot_launch(binary, 100)
    assert (found and found[0]) == lacking


def test_a_dry_run(monkeypatch, capsys, tmp_path):
    """All of the way but for the device, in a process beside this one."""
    few_candidates(monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = ("tune", "--arch", "90", "--dry-run", "--kernel", NAME, "--bits", "16", "--shape", "rows=2548")
    assert main([*arguments, "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["problems"]
    assert report["arch"] == 90 and report["written"] == report["tables"] == []
    assert (row["kernel"], row["candidates"], row["to time"], row["timed"]) == (NAME, 4, 4, 0)
    assert report["totals"]["candidates"] == 4 and report["seconds"] > 0
    assert list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize("dry_run", [True, False])
def test_tables_of_counts_are_aligned(few, capsys, monkeypatch, dry_run):
    """At 100 columns, the longest names and configurations among them."""
    from vlmkern.cli.tune import print_report, row_of

    monkeypatch.setenv("COLUMNS", "80")
    case, _ = run(float)
    wide = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "TMA": True, "PERSISTENT": True, "num_warps": 8}
    problem = {"kernel": "attention_pool_fwd_absorbed_kernel", "bits": 16, "shape": {"rows": 2548, "features": 6144}}
    row = row_of(case) | problem | {"best": wide, "ms": 0.1234, "default_ms": 9.872}
    report = {"arch": 90, "seconds": 1.0, "problems": [row, row], "totals": case.counts(), "written": ["/a/table"]}
    print_report(report, dry_run)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert text.count(problem["kernel"]) == (1 if dry_run else 2) and text.count("16 bits") == (2 if dry_run else 4)
    assert all((word in text) is not dry_run for word in ("PERSISTENT", " 123.4 ", " 9872 ", " 80.00 "))


def test_with_a_stand_in_for_the_device(monkeypatch, tmp_path):
    """The whole way: compiled beside this process, logged, timed in two rounds."""
    few_candidates(monkeypatch)
    cases, asked = [], []

    def measure(launch):
        asked.append(launch.constants["BLOCK"])
        return abs(launch.constants["BLOCK"] - 500) / 1000

    (table,) = tune.tune(
        problems(), 90, "a test", device="meta", measure=measure, log=tmp_path / "log", workers=1, done=cases.append
    )
    assert table["entries"] == [{"bits": 16, "shape": problems()[0].shape, "config": {"BLOCK": 512, "num_warps": 4}}]
    assert len(asked) == 8 and cases[0].counts()["timed"] == 4 and cases[0].best.final is not None
    assert tune.tables(tmp_path / "log") == [table]
