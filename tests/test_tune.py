"""`vlmkern tune` without a GPU: which configurations are chosen, and the tables it writes and the kernels read."""

from __future__ import annotations

import json

import pytest
import torch
from test_backends import run_python

pytest.importorskip("triton")

from vlmkern import tune
from vlmkern.kernels import _launch, attention


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A copy of the tables to write to."""
    for source in _launch.TABLES.glob("sm_*/*.json"):
        target = tmp_path / source.parent.name / source.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(source.read_text())
    monkeypatch.setattr(_launch, "TABLES", tmp_path)
    _launch._select.cache_clear()
    yield tmp_path
    _launch._select.cache_clear()


def test_the_fastest_is_written_and_read_back(tables):
    (kernel,) = attention.KERNELS

    def measure(launch):
        # 64 x 128 wins where it runs, and descriptors a little more
        return (
            1.0
            + (launch.constants["BLOCK_N"] != 128)
            + abs(launch.constants["BLOCK_M"] - 64)
            - 0.1 * launch.constants["TMA"]
        )

    seen = []
    table = tune.tune(kernel, 90, "a test", device="meta", measure=measure, done=lambda *args: seen.append(args))
    tune.write(table)
    assert json.loads((tables / "sm_90" / "attention_fwd_kernel.json").read_text()) == table
    assert table["source"] == "a test"
    assert all([t.milliseconds for t in timed] == sorted(t.milliseconds for t in timed) for _, _, timed in seen)
    like = torch.empty(1, dtype=torch.bfloat16, device="meta")
    chosen = _launch.select("attention_fwd_kernel", like, True, tokens=729, head_dim=72)
    assert (chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["TMA"]) == (64, 128, True)
    without = _launch.select("attention_fwd_kernel", like, False, tokens=729, head_dim=72)
    assert (without["BLOCK_M"], without["BLOCK_N"], without["TMA"]) == (64, 128, False)


def test_what_does_not_run_is_left_out(tables):
    (kernel,) = attention.KERNELS

    def measure(launch):
        if launch.constants["TMA"] or launch.constants["BLOCK_M"] == 128:
            raise RuntimeError("out of resources")
        return float(launch.options["num_warps"])

    table = tune.tune(kernel, 90, "a test", device="meta", measure=measure)
    assert all(e["config"]["BLOCK_M"] != 128 and not e["config"]["TMA"] for e in table["entries"])


def test_a_wrong_configuration_is_left_out():
    assert tune._difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])], 1e-2).startswith("wrong")
    assert tune._difference([torch.tensor([torch.nan])], [torch.tensor([1.0])], 1e-2).startswith("wrong")
    assert tune._difference([torch.tensor([1.0])], [torch.tensor([1.001])], 1e-2) == ""


def test_shipped_tables_are_written_as_tune_writes_them():
    """So that tuning changes the lines that it must."""
    for path in _launch.TABLES.glob("sm_*/*.json"):
        assert path.read_text() == tune.text(json.loads(path.read_text())), path


@pytest.mark.parametrize(
    "shape, expected",
    [
        ({"tokens": 729, "head_dim": 72}, True),
        ({"tokens": 1025, "head_dim": 80}, True),
        # beyond twice the nearest entry's size, and at a head dimension far from any
        ({"tokens": 9, "head_dim": 72}, False),
        ({"tokens": 729, "head_dim": 256}, False),
    ],
)
def test_nearest_shape_and_default(shape, expected):
    like = torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert _launch.select("attention_fwd_kernel", like, True, **shape)["TMA"] == expected


def test_without_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = run_python("from vlmkern.cli import main; import sys; sys.exit(main(['tune']))")
    assert result.returncode == 2 and "needs a CUDA device" in result.stderr and "Traceback" not in result.stderr
