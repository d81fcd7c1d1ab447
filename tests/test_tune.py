"""`vlmkern tune` without a GPU: which configurations are chosen, and the tables it writes and the kernels read."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_backends import run_python
from tune_support import NAME, by_size, few, fresh_tables, no_compiler, problems, run

pytest.importorskip("triton")

from vlmkern import tune
from vlmkern.cli import main
from vlmkern.kernels import _launch
from vlmkern.tune import candidates, timing
from vlmkern.tune.log import Outcome
from vlmkern.tune.rounds import finalists

__all__ = ["few", "fresh_tables"]


def outcome(ms, tma=False, final=None, **config):
    return Outcome({"TMA": tma, **config}, ms, final)


def test_the_fastest_is_written_and_read_back(few, fresh_tables, tmp_path, monkeypatch):
    (table,) = tune.tune(
        problems(), 90, "a test", device="meta", measure=lambda launch: launch.constants["BLOCK"] / 512, workers=0
    )
    path = tune.write(table, tmp_path)
    assert path == tmp_path / "sm_90" / f"{NAME}.json" and json.loads(path.read_text()) == table
    assert table["source"] == "a test"
    monkeypatch.setenv("VLMKERN_TABLES", str(tmp_path))
    _launch._overlay.cache_clear()
    like = torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert _launch.select(NAME, like, rows=2548, features=6144)["BLOCK"] == 256


def test_the_second_round_decides(few):
    """Among the fastest of the first; others, whatever they would take, are in none."""
    seen = set()

    def measure(size):
        again = size in seen
        seen.add(size)
        return {256: 9.0, 512: 1.0, 2048: 5.0, 4096: 1.5}[size] - (4.5 if again and size == 2048 else 0)

    case, asked = run(measure)
    assert case.best.config["BLOCK"] == 2048 and case.best.time == 0.5 and case.best.ms == 5.0
    assert len(asked) == 8
    assert case.of_default.config["BLOCK"] == 2048


def test_who_is_in_the_second_round():
    timed = [outcome(float(i), i < 6, BLOCK=i) for i in range(1, 12)] + [Outcome({"BLOCK": 99}, dropped="wrong")]
    default = {"TMA": False, "BLOCK": 11}
    # the fastest all need descriptors: the fastest of the others are in it too, and the default always
    assert [o.config["BLOCK"] for o in finalists(timed, default)] == [1, 2, 3, 4, 6, 7, 11]
    timed[1].config["TMA"] = False
    assert [o.config["BLOCK"] for o in finalists(timed, default)] == [1, 2, 3, 4, 11]


@pytest.mark.parametrize(
    "timed, expected",
    [
        ([outcome(2.0, b=1), outcome(1.0, b=2)], [2]),
        # descriptors do not take every tensor: one without beside it
        ([outcome(2.0, b=1), outcome(1.0, True, b=2), outcome(1.5, True, b=3)], [2, 1]),
        # times of different rounds do not compare
        ([outcome(0.5, b=1), outcome(2.0, b=2, final=3.0), outcome(3.0, b=3, final=2.0)], [3]),
        ([outcome(0.5, b=1), outcome(2.0, True, b=2, final=3.0)], [2, 1]),
        ([Outcome({"b": 1}, dropped="wrong")], []),
    ],
)
def test_choice(timed, expected):
    assert [config["b"] for config in tune.choose(timed)] == expected


def test_what_does_not_run_is_left_out(few):
    def measure(size):
        if size == 256:
            raise RuntimeError("out of resources")
        return float(size)

    case, _ = run(measure)
    assert by_size(case)[256].dropped == "failed" and "out of resources" in by_size(case)[256].reason
    assert case.best.config["BLOCK"] == 512
    assert case.counts()["failed"] == 1 and case.counts()["timed"] == 3


def test_what_cannot_be_launched_is_not_run(few, monkeypatch):
    no_compiler(
        monkeypatch,
        of_256={"shared": 227 * 1024 + 1},
        of_512={"registers": 200, "warps": 16},
        of_4096=ValueError("the compiler's words"),
    )
    case, asked = run(float)
    assert set(asked) == {2048}
    found = by_size(case)
    assert {size: found[size].dropped for size in (256, 512, 4096)} == {
        256: "shared memory",
        512: "registers",
        4096: "compile",
    }
    assert "232449 bytes" in found[256].reason and "232448" in found[256].reason
    assert "the compiler's words" in found[4096].reason
    assert case.counts() == dict.fromkeys(case.counts(), 0) | {
        "candidates": 4,
        "compile": 1,
        "shared memory": 1,
        "registers": 1,
        "to time": 1,
        "timed": 1,
    }


def test_shared_memory_is_what_a_block_may_have(few, monkeypatch):
    no_compiler(monkeypatch, of_256={"shared": 227 * 1024})
    assert by_size(run(float)[0])[256].dropped == ""
    chosen = [problem for problem in tune.problems(80, [NAME], [16]) if problem.shape["rows"] == 2548]
    (case,) = tune.search(chosen, 80, device="meta", measure=lambda launch: 1.0, workers=0)
    assert by_size(case)[256].dropped == "shared memory"


def test_what_spills_is_timed_last(few, monkeypatch):
    no_compiler(monkeypatch, of_2048={"local": 8}, of_256={"local": 400})
    case, asked = run(float)
    assert asked[:4] == [512, 4096, 2048, 256]
    assert case.counts()["spill"] == 2


def test_after_the_time_nothing_new_is_begun(few, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    case, asked = run(float, seconds=6)
    assert 0 < len(asked) < 4 and case.counts()["timed"] == len(asked)
    (table,) = tune.merge(90, [(case.problem, tune.choose(case.outcomes.values()))], "a test")
    assert len(table["entries"]) == 1
    # a problem that nothing was timed of keeps what it has
    assert tune.merge(90, [(case.problem, [])], "a test") == []


def test_entries_of_other_problems_stay(tmp_path):
    shape, other = {"rows": 2548, "features": 6144}, {"rows": 16, "features": 6144}
    old, new = {"BLOCK": 512, "num_warps": 2}, {"BLOCK": 256, "num_warps": 4}
    before = dict(_launch.table(NAME, 90), source="before")
    before["entries"] = [
        {"bits": 32, "shape": shape, "config": old},
        {"bits": 16, "shape": shape, "config": old},
        {"bits": 16, "shape": shape, "config": old | {"num_warps": 8}},
        {"bits": 16, "shape": other, "config": old},
    ]
    tune.write(before, tmp_path)
    problem = tune.Problem(NAME, 16, dict(reversed(shape.items())))
    (after,) = tune.merge(90, [(problem, [new])], "after", tmp_path)
    assert after["default"] == before["default"]
    kept = [before["entries"][i] for i in (0, 3)]
    assert after["entries"] == [kept[0], {"bits": 16, "shape": shape, "config": new}, kept[1]]
    assert after["source"] == "after; other entries: before"
    # what is left of the old source goes with the last of its entries
    tune.write(after, tmp_path)
    (again,) = tune.merge(90, [(problem, [old])], "after", tmp_path)
    assert again["source"] == after["source"]
    rest = [tune.Problem(NAME, 32, shape), tune.Problem(NAME, 16, other), problem]
    assert [table["source"] for table in tune.merge(90, [(p, [new]) for p in rest], "now", tmp_path)] == ["now"]


class Plain:
    """In place of a Triton kernel: runs on the CPU, rightly with even blocks alone."""

    __name__ = "plain_kernel"
    cache_key = "0" * 64

    def __getitem__(self, grid):
        def call(x, out, BLOCK):
            out.copy_(x * {1: 1.5, 3: math.nan}.get(BLOCK, 1.0))
            if BLOCK == 5:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return call


@pytest.fixture
def bench(monkeypatch):
    plain = Plain()

    def example(dtype, device, rows):
        x = torch.randn(rows, dtype=dtype, device=device)

        def call():
            out = torch.empty_like(x)
            config = _launch.select_for("plain_kernel", dtype, x.device, rows=rows)
            _launch.launch(plain, (1,), (x, out), config)
            return out

        return call

    made = []
    kernel = _launch.Kernel(plain, lambda *a, **k: made.append(k) or example(*a, **k), {"rows": 8}, None, ())
    monkeypatch.setattr(timing, "kernel_of", lambda problem: kernel)
    monkeypatch.setattr(timing, "times_in_turn", lambda runs, rounds: [[1.0] * rounds for _ in runs])
    bench = timing.Bench(tune.Problem("plain_kernel", 32, {"rows": 8}), 90, {"BLOCK": 2}, "cpu", None)
    yield bench
    # the tensors are those of the problem, not of each candidate
    assert made == [{"rows": 8}]


def test_a_wrong_candidate_is_not_timed(bench):
    assert bench.first({"BLOCK": 4}) == 1.0
    for block in (1, 3):
        with pytest.raises(timing.Wrong, match="from the default"):
            bench.first({"BLOCK": block})


def test_a_candidate_that_breaks_the_device(bench):
    with pytest.raises(tune.DeviceLost, match="illegal memory access"):
        bench.first({"BLOCK": 5})


def test_differences():
    assert timing.difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])], 1e-2).startswith("differs")
    assert timing.difference([torch.tensor([torch.nan])], [torch.tensor([1.0])], 1e-2).startswith("differs")
    assert timing.difference([torch.tensor([1.0])], [torch.tensor([1.001])], 1e-2) == ""


def test_candidates_are_the_default_the_kernels_and_the_tables():
    problem = tune.problems(90, ["attention_fwd_kernel"], [16], {"head_dim": 72})[0]
    table = _launch.table("attention_fwd_kernel", 90)
    found = candidates.candidates(problem, table)
    assert found[0] == table["default"]["16"]
    assert all(entry["config"] in found for entry in table["entries"])
    assert all(config in found for config in candidates.kernel_of(problem).candidates)
    assert len(found) == len({candidates.config_key(config) for config in found})


@pytest.mark.parametrize(
    "names, bits, shape, expected",
    [
        ([NAME], None, None, {(NAME, 16, 2548), (NAME, 16, 16), (NAME, 32, 2548), (NAME, 32, 16)}),
        ([NAME], [32], {"rows": 16}, {(NAME, 32, 16)}),
        ([NAME, "linear_fwd_kernel"], [16], {"features": 6144}, {(NAME, 16, 2548), (NAME, 16, 16)}),
    ],
)
def test_filters(names, bits, shape, expected):
    found = tune.problems(90, names, bits, shape)
    assert {(p.kernel, p.bits, p.shape["rows"]) for p in found} == expected and len(found) == len(expected)


def test_what_models_run_in_comes_first():
    bits = [problem.bits for problem in tune.problems(90)]
    assert bits == sorted(bits) and set(bits) == {16, 32}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--kernel", "none"], "--kernel: got 'none', expected one of add_layer_norm"),
        (
            ["--kernel", NAME, "--shape", "head_dim=72"],
            "--shape: got the key 'head_dim', expected one of features, rows",
        ),
        (["--kernel", NAME, "--shape", "rows=3"], "expected one of rows=16, features=6144; rows=2548, features=6144"),
        (["--shape", "rows"], "argument --shape: got 'rows', expected KEY=N"),
        (["--bits", "8"], "--bits: invalid choice: 8"),
        (["--seconds", "nan"], "--seconds: got 'nan', expected a positive number"),
        (["--workers", "0"], "--workers: got '0', expected an integer of at least 1"),
        (["--log", "x"], "--dry-run: times nothing"),
        (["--from", "x"], "--from: reads a log alone, expected no --dry-run and no --arch"),
    ],
)
def test_errors(capsys, arguments, said):
    try:
        status = main(["tune", "--arch", "90", "--dry-run", *arguments])
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and error.count("\n") == 1


def test_without_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = run_python("from vlmkern.cli import main; import sys; sys.exit(main(['tune']))")
    assert result.returncode == 2 and "needs a CUDA device" in result.stderr and "Traceback" not in result.stderr


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
        ({"tokens": 729, "head_dim": 32}, False),
    ],
)
def test_nearest_shape_and_default(shape, expected):
    like = torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert _launch.select("attention_fwd_kernel", like, True, **shape)["TMA"] == expected
