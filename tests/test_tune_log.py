"""Logs of tuning: what is known is not done again, what did not end is not tried again, tables come from them alone."""

from __future__ import annotations

import json

import pytest
from test_backends import run_python
from tune_support import NAME, by_size, few, fresh_tables, lines, no_compiler, problems, run

pytest.importorskip("triton")

from vlmkern import tune
from vlmkern.cli import main
from vlmkern.kernels.swiglu_mlp import gate as swiglu_mlp
from vlmkern.tune import rounds
from vlmkern.tune.log import read
from vlmkern.tune.pool import Binary, Failed

__all__ = ["few", "fresh_tables"]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


def test_what_a_line_says(few, log):
    run(float, log=log)
    of_256 = [line for line in lines(log) if line["config"]["BLOCK"] == 256]
    same = {"kernel": NAME, "arch": 90, "bits": 16, "shape": {"rows": 2548, "features": 6144}, "gpu": "meta"}
    assert all(same.items() <= line.items() and "triton 3" in line["code"] for line in of_256)
    assert [line.get("begun", line.get("ms")) for line in of_256] == [True, 256.0, True, 256.0]
    assert [line.get("round") for line in of_256] == [None, None, 2, 2]


def test_nothing_is_done_twice(few, log, monkeypatch):
    def measure(size):
        if size == 4096:
            raise RuntimeError("out of resources")
        return float(size)

    no_compiler(monkeypatch, of_512=ValueError("refused"))
    first, asked = run(measure, log=log)
    assert set(asked) == {256, 2048, 4096}
    written = log.read_bytes()
    compiled = []
    monkeypatch.setattr(rounds, "compile_task", compiled.append)
    again, asked = run(measure, log=log)
    assert asked == compiled == [] and log.read_bytes() == written
    assert again.outcomes == first.outcomes and again.counts() == first.counts()


def test_a_candidate_that_is_new(few, log, monkeypatch):
    """It is timed alone, and then against the fastest, which are compiled for that; what is far behind is not."""
    (kernel,) = swiglu_mlp.KERNELS
    many = tuple({"BLOCK": 2**i, "num_warps": 4} for i in range(5, 11))
    monkeypatch.setattr(swiglu_mlp, "KERNELS", (kernel._replace(candidates=many),))
    run(float, log=log)
    monkeypatch.setattr(swiglu_mlp, "KERNELS", (kernel._replace(candidates=(*many, {"BLOCK": 16, "num_warps": 4})),))
    compiled = []

    def compile_task(task):
        compiled.append(task.config["BLOCK"])
        # of what was timed before, this changes nothing
        return Failed("the compiler's words") if compiled[-1] == 64 else Binary(0, 0, 32, 4, 0)

    monkeypatch.setattr(rounds, "compile_task", compile_task)
    case, asked = run(float, log=log)
    assert compiled == [2048, 32, 64, 128, 256, 16]
    assert asked == [16, 16, 32, 64, 128, 2048] and case.best.config["BLOCK"] == 16


@pytest.mark.parametrize("change", [pytest.param("gpu", id="card"), "code", "arch", "bits", "shape", "config"])
def test_what_is_known_of_something_else_does_not_count(few, log, change):
    run(float, log=log)
    other = {"code": "other", "gpu": "other", "arch": 80, "bits": 32, "shape": {"rows": 1}, "config": {"BLOCK": 1}}
    log.write_text("".join(json.dumps(line | {change: other[change]}) + "\n" for line in lines(log)))
    _, asked = run(float, log=log)
    assert set(asked) == {256, 512, 2048, 4096}


def test_a_run_that_died(few, log):
    """The process goes down with a candidate: the next run goes on behind it."""
    script = f"""
import os, pytest
from tune_support import few_candidates, no_compiler, run
patch = pytest.MonkeyPatch()
few_candidates(patch); no_compiler(patch)
run(lambda size: os._exit(9) if size == 512 else float(size), log={str(log)!r})
"""
    assert run_python(f"import sys; sys.path.insert(0, 'tests'){script}").returncode == 9
    assert lines(log)[-1]["begun"] is True and lines(log)[-1]["config"]["BLOCK"] == 512
    for _ in range(2):
        case, asked = run(float, log=log)
        assert 512 not in asked and by_size(case)[512].dropped == "did not end"
        assert case.counts()["did not end"] == 1 and case.counts()["timed"] == 3
    assert [line["dropped"] for line in lines(log) if "dropped" in line] == ["did not end"]


def test_second_rounds_that_end_the_process(few, log, monkeypatch):
    """Not one of the fastest is out for that, which were all begun; after two times the first round decides."""

    def second(self, configs):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds.Bench, "second", second)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(float, log=log)
    case, asked = run(float, log=log)
    assert asked == [] and case.best.config["BLOCK"] == 256 and case.best.final is None


def test_a_device_that_is_lost(few, log, capsys, monkeypatch):
    """The process must end, since nothing runs in it any more; the line is written before."""

    def measure(size):
        if size == 512:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return float(size)

    with pytest.raises(tune.DeviceLost, match="illegal memory access"):
        run(measure, log=log)
    assert lines(log)[-1]["dropped"] == "failed" and "illegal memory access" in lines(log)[-1]["reason"]
    case, asked = run(measure, log=log)
    assert 512 not in asked and case.counts()["timed"] == 3

    def lost(*args, **options):
        raise tune.DeviceLost("an illegal memory access")

    monkeypatch.setattr(tune, "search", lost)
    monkeypatch.setattr(tune, "device_arch", lambda: 90)
    monkeypatch.setattr(tune, "source", lambda: "")
    with pytest.raises(SystemExit) as exit:
        main(["tune", "--log", str(log)])
    error = capsys.readouterr().err
    assert exit.value.code == 3 and "illegal memory access; run it again with the same --log" in error


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\n",
        b"nothing of JSON\n",
        b"[1, 2]\n",
        b'{"kernel": "x"}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"cut": ',
    ],
)
def test_what_is_no_line_is_passed_over(few, log, broken):
    run(float, log=log)
    whole = log.read_bytes()
    log.write_bytes(broken + (b"\n" if broken and not broken.endswith(b"\n") else b"") + whole)
    _, asked = run(float, log=log)
    assert asked == []
    # what is written after a line that was cut is a line of its own
    log.write_bytes(broken)
    run(float, log=log)
    assert len(list(read(log))) == 16
    _, asked = run(float, log=log)
    assert asked == []


@pytest.mark.parametrize(
    "change",
    [
        {"ms": "1"},
        {"ms": None},
        {"ms": float("nan")},
        {"ms": -1.0},
        {"ms": True},
        {"config": {"BLOCK": "256"}},
        {"config": {"num_warps": 4}},
        {"shape": {"rows": 2548, "features": None}},
        {"kernel": 3},
        {"kernel": "none"},
        {"arch": 70},
        {"local": "0"},
        {"source": 1},
        {"gpu": None},
    ],
)
def test_lines_of_another_form_make_no_table(few, log, change):
    run(float, log=log)
    log.write_text("".join(json.dumps(line | change) + "\n" for line in lines(log) if "ms" in line))
    with pytest.raises(ValueError, match="holds no time"):
        tune.tables(log)


def test_a_line_that_was_cut_is_done_again(few, log):
    run(float, log=log)
    kept = log.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(kept) if b'"ms"' in line)
    log.write_bytes(b"".join(kept[:at]) + kept[at][:-20])
    case, asked = run(float, log=log)
    # begun, and its end was not written
    assert case.counts()["did not end"] == 1 and len(set(asked)) == 3


def test_tables_from_a_log_alone(few, fresh_tables, log, tmp_path, capsys):
    """They are those that the run itself makes."""
    chosen = problems((16, 32))
    made = tune.tune(chosen, 90, "a test", log=log, device="meta", measure=_by_block, workers=0)
    assert tune.tables(log) == made and len(made[0]["entries"]) == 2
    assert len(tune.tables(log, bits=[32])[0]["entries"]) == 1
    assert main(["tune", "--from", str(log), "--tables", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    path = tmp_path / "out" / "sm_90" / f"{NAME}.json"
    assert report["written"] == [str(path)] and json.loads(path.read_text()) == made[0]
    assert report["other_code"] == []


def test_tables_of_the_last_gpu_and_code(few, log):
    run(float, log=log)
    slower = [line for line in lines(log) if "ms" in line and line["config"]["BLOCK"] > 1000]
    with log.open("a") as stream:
        stream.writelines(json.dumps(line | {"gpu": "other", "ms": 1e7 / line["ms"]}) + "\n" for line in slower)
    assert tune.tables(log)[0]["entries"][0]["config"]["BLOCK"] == 4096
    with log.open("a") as stream:
        stream.writelines(json.dumps(line | {"code": "before"}) + "\n" for line in lines(log)[-1:])
    assert tune.other_code(log) == [NAME]


def test_logs_that_are_none(capsys, tmp_path):
    assert main(["tune", "--from", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    (tmp_path / "empty").write_text("")
    assert main(["tune", "--from", str(tmp_path / "empty")]) == 2
    assert "holds no time" in capsys.readouterr().err


def _by_block(launch):
    return float(launch.constants["BLOCK"])
