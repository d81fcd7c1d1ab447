"""What the tests of tuning share: a small kernel with few candidates, and compilations that take no time."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from vlmkern import tune
from vlmkern.kernels import _launch
from vlmkern.kernels.swiglu_mlp import gate as swiglu_mlp
from vlmkern.tune import rounds
from vlmkern.tune.pool import Binary

NAME = "silu_mul_fwd_kernel"
SIZES = (256, 512, 4096)


def few_candidates(monkeypatch):
    """Leaves one kernel of its module, with three candidates beside the default, which has blocks of 2048 or 1024."""
    kernel = next(kernel for kernel in swiglu_mlp.KERNELS if kernel.name == NAME)
    candidates = tuple({"BLOCK": size, "num_warps": 4} for size in SIZES)
    monkeypatch.setattr(swiglu_mlp, "KERNELS", (kernel._replace(candidates=candidates),))


def no_compiler(monkeypatch, **binaries):
    """What is compiled in this process takes no time, and as much as is given for a size of block, or fails."""

    def compile_task(task):
        binary = binaries.get(f"of_{task.config['BLOCK']}", {})
        if isinstance(binary, Exception):
            raise binary
        return Binary(**{"shared": 0, "tensor_columns": 0, "registers": 32, "warps": 4, "local": 0} | binary)

    monkeypatch.setattr(rounds, "compile_task", compile_task)


@pytest.fixture
def few(monkeypatch):
    few_candidates(monkeypatch)
    no_compiler(monkeypatch)


@pytest.fixture
def fresh_tables():
    """Configurations and the variable's folder are looked up anew, before and after."""
    _launch._select.cache_clear()
    _launch._overlay.cache_clear()
    yield
    _launch._select.cache_clear()
    _launch._overlay.cache_clear()


def problems(bits=(16,), rows=2548):
    return tune.problems(90, [NAME], bits, {"rows": rows})


def run(measure, chosen=None, **options):
    """The case of the first problem, timed by a function of the size of the block."""
    asked = []

    def of_launch(launch):
        asked.append(launch.constants["BLOCK"])
        return measure(launch.constants["BLOCK"])

    given = {"device": "meta", "workers": 0, "source": "a test"} | options
    cases = rounds.search(chosen or problems(), 90, measure=of_launch, **given)
    return cases[0], asked


def by_size(case):
    """Outcomes by size of block."""
    return {outcome.config["BLOCK"]: outcome for outcome in case.outcomes.values()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
