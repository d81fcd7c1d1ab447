"""bench/gpu.py without a GPU: a rehearsal of all steps on as bare a machine as a borrowed one, and what becomes of
steps that hang, die, break their device or run out of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_cases
import gpu_ledger
import gpu_pytest
import gpu_steps
import pytest
from gpu_ledger import Ledger
from gpu_steps import Step

ROOT = Path(__file__).resolve().parents[1]
OF = "a card and some code"

# stands for a machine without the extension and without what few machines have
BARE = """
import sys

class Missing:
    NAMES = {"vlmkern._C", "hypothesis", "pytest_benchmark", "transformers", "matplotlib", "peft", "scipy", "kernels"}

    def find_spec(self, name, path=None, target=None):
        if name in self.NAMES:
            raise ImportError(f"{name} is not on this machine")

sys.meta_path.insert(0, Missing())
"""


def command(*arguments, env=None, timeout=900):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "sitecustomize.py").write_text(BARE)
    out = folder / "out"
    env = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return out, env, command("--rehearse", "--minutes", "20", "--out", out, env=env)


@pytest.mark.slow
def test_all_steps_are_rehearsed(rehearsed):
    out, _, result = rehearsed
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr
    run = json.loads((out / "run.json").read_text())
    assert {name: row["state"] for name, row in run["steps"].items()} == dict.fromkeys(
        [step.name for step in gpu_steps.STEPS], "done"
    )
    bench, numerics = (Ledger(out / name, run["of"]) for name in ("bench.jsonl", "numerics.jsonl"))
    assert not any(ledger.left(step) for ledger in (bench, numerics) for step in ledger.units)
    assert not bench.lost and not numerics.lost and set(bench.units) == {"machine", "bench", "blocks", "compile"}
    assert not any("failed" in row for ledger in (bench, numerics) for row in ledger.results.values())
    outcomes = [row["outcome"] for row in numerics.results.values()]
    assert outcomes.count("passed") > 80 and outcomes.count("skipped") == 4
    # ops and blocks, as shipped, tuned and compiled; every one of ours was timed
    labels = ["" if not unit.endswith(("tuned", "compiled")) else unit.split()[-1] for unit in bench.results]
    ops = 2 * len(gpu_cases.op_entries())
    assert {label: labels.count(label) for label in set(labels)} == {"": ops + 5, "tuned": ops, "compiled": ops + 2}
    for unit, row in bench.results.items():
        ours = [r for r in row.get("rows", ()) if r["provider"] == "vlmkern"]
        assert all("ms" in r for r in ours) and (ours or "rows" not in row), unit
    assert {row["tables"] for unit, row in bench.results.items() if unit.endswith("tuned")} == {"tuned"}
    assert json.loads((out / "kernels.json").read_text())


@pytest.mark.slow
def test_what_a_rehearsal_leaves_fits_what_a_borrowed_machine_gives_back(rehearsed):
    out, _, _ = rehearsed
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} <= set(gpu.FILES) and len(files) <= 8
    assert all(path.stat().st_size < 2**20 for path in files)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(rehearsed, tmp_path):
    out, env, _ = rehearsed
    begin = time.monotonic()
    again = command("--rehearse", "--minutes", "20", "--out", tmp_path / "again", "--resume", out, env=env)
    assert again.returncode == 0 and time.monotonic() - begin < 120, again.stdout[-3000:] + again.stderr
    of = json.loads((out / "run.json").read_text())["of"]
    for name in ("bench.jsonl", "numerics.jsonl"):
        first, second = (Ledger(folder / name, of) for folder in (out, tmp_path / "again"))
        assert first.results == second.results


@pytest.mark.slow
def test_results_can_be_shown_anywhere(rehearsed):
    out, env, _ = rehearsed
    result = command("--show", out, env=env)
    assert result.returncode == 0
    for text in ("A rehearsal", "numerics: ", " 0 failed", "siglip block", "swiglu_mlp", "tower block and vision path"):
        assert text in result.stdout
    assert (out / "summary.txt").read_text().split() == result.stdout.split()


WORKER = """
import sys, time, os
from pathlib import Path
sys.path.insert(0, {bench!r})
from gpu_ledger import Ledger
name, out, until, of = sys.argv[1:]
ledger = Ledger(Path({file!r}), of)
{first}
ledger.announce(["a", "b", "c"], name)
for unit in "abc":
    if ledger.settled(unit):
        continue
    if time.time() > float(until):
        sys.exit(0)
    ledger.begin(unit)
    if unit == "b":
        {does}
    ledger.end(unit, value=unit.upper())
"""


@pytest.fixture
def go(tmp_path, monkeypatch):
    """go(statements that the second of three units runs) -> (the state of the step, its ledger)."""
    monkeypatch.setattr(gpu_steps, "RESERVE", 0)

    def go(does="pass", first="", quiet=30.0, seconds=60.0):
        file = tmp_path / "bench.jsonl"
        worker = tmp_path / "worker.py"
        worker.write_text(WORKER.format(bench=str(ROOT / "bench"), file=str(file), does=does, first=first))
        monkeypatch.setattr(gpu, "WORKER", worker)
        run = gpu.Run(tmp_path, OF, rehearsal=True)
        run.go((Step("bench", 1.0, quiet, "bench.jsonl", "a step of three units"),), seconds)
        return json.loads((tmp_path / "run.json").read_text())["steps"]["bench"]["state"], Ledger(file, OF)

    return go


def values(ledger):
    return {unit: row.get("value") for unit, row in ledger.results.items()}


def test_a_unit_that_ends_its_process_costs_itself_alone(go):
    state, ledger = go("os.abort()")
    assert state == "done" and values(ledger) == {"a": "A", "b": None, "c": "C"}
    assert ledger.results["b"] == {"failed": gpu_ledger.DIED}


def test_a_unit_that_hangs_is_stopped(go):
    state, ledger = go("time.sleep(600)", quiet=2.0)
    assert state == "done" and values(ledger) == {"a": "A", "b": None, "c": "C"}


def test_a_unit_that_gives_signs_of_life_is_not(go):
    state, ledger = go("[(print('.', flush=True), time.sleep(0.5)) for _ in range(8)]", quiet=2.0)
    assert state == "done" and values(ledger) == {"a": "A", "b": "B", "c": "C"}


def test_a_unit_goes_on_without_the_part_that_ended_its_process(go):
    state, ledger = go(
        "[(ledger.at('b', part), part == 'two' and os.abort()) for part in ('one', 'two') "
        "if part not in ledger.lost.get('b', ())]"
    )
    assert state == "done" and values(ledger) == {"a": "A", "b": "B", "c": "C"} and ledger.lost == {"b": {"two"}}


def test_time_that_is_over_is_not_held_against_a_unit(go):
    state, ledger = go("time.sleep(600)", seconds=2.0)
    assert state == "time over, 2 left" and values(ledger) == {"a": "A"} and ledger.left("bench") == ["b", "c"]
    state, ledger = go("pass")
    assert state == "done" and values(ledger) == {"a": "A", "b": "B", "c": "C"}


def test_a_process_that_never_begins_is_not_started_for_ever(go):
    state, ledger = go(first="raise SystemExit('something is missing')")
    assert state == "failed: status 1: something is missing" and not ledger.results


def test_what_a_process_leaves_behind_ends_with_it(go, tmp_path):
    marker = tmp_path / "still_here"
    code = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    state, _ = go(f"__import__('subprocess').Popen([sys.executable, '-c', {code!r}])")
    time.sleep(5)
    assert state == "done" and not marker.exists()


def test_the_log_stays_within_its_limit(go, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "MOST_BYTES", 2**17)
    go("[print('x' * 1000) for _ in range(1000)]")
    assert 2**16 - 2000 < (tmp_path / "run.log").stat().st_size < 2**17
    assert capsys.readouterr().out.count("x" * 1000) == 1000


def test_lines_that_were_cut_or_are_of_other_code_do_not_count(tmp_path):
    path = tmp_path / "bench.jsonl"
    other = Ledger(path, "an older state")
    other.announce(["a", "b"], "bench")
    other.end("a", value=1)
    other.begin("b")
    ledger = Ledger(path, OF)
    assert not ledger.units and not ledger.results and ledger.open is None
    ledger.announce(["a", "b"], "bench")
    ledger.end("a", value=2)
    with path.open("a") as file:
        file.write('{"done": "b", "val')
    ledger = Ledger(path, OF)
    assert ledger.results == {"a": {"value": 2}} and ledger.left("bench") == ["b"]
    ledger.end("b", value=3)
    assert Ledger(path, OF).results == {"a": {"value": 2}, "b": {"value": 3}}
    assert Ledger(path, "an older state").results == {"a": {"value": 1}, "b": {"failed": gpu_ledger.DIED}}


def test_steps_that_share_a_file_have_their_own_units(tmp_path):
    ledger = Ledger(tmp_path / "bench.jsonl", OF)
    ledger.announce(["a", "b"], "bench")
    ledger.end("a")
    ledger.announce(["c"], "blocks")
    ledger.announce(["d"], "blocks")
    ledger.end("c")
    again = Ledger(tmp_path / "bench.jsonl", OF)
    assert again.left("bench") == ledger.left("bench") == ["b"] and again.left("blocks") == ["d"]
    assert again.left("compile") == []


def test_tables_of_a_log_without_times_are_none(tmp_path):
    run = gpu.Run(tmp_path, OF, rehearsal=True)
    assert not run._tuned()
    (tmp_path / "tuning.jsonl").write_text('{"kernel": "silu_mul_fwd_kernel", "arch": 90, "dropped": "wrong"}\n')
    assert not run._tuned() and "VLMKERN_TABLES" not in run._environment(gpu_steps.STEPS[4])


def test_every_step_ends_later_than_those_before_it_and_before_the_end():
    ends = gpu_steps.ends(gpu_steps.STEPS, 100.0, 1800.0)
    assert list(ends.values()) == sorted(ends.values()) and ends["rest"] == pytest.approx(1900 - gpu_steps.RESERVE)
    assert sum(step.share for step in gpu_steps.STEPS) == pytest.approx(1)
    few = gpu_steps.by_name("tune,numerics")
    assert [step.name for step in few] == ["numerics", "tune"]
    assert gpu_steps.ends(few, 0.0, 600.0)["tune"] == pytest.approx(600 - gpu_steps.RESERVE)


SUITE = """
import pytest

def test_fp16():
    assert __import__("os").path.exists("{marker}"), "fp16 before the others"

def test_fails():
    assert 1 == 2, "a reason"

def test_passes(record_property):
    record_property("of_allowed", 0.25)
    open("{marker}", "w")

def test_skips():
    pytest.skip("of no use")

{more}
"""


@pytest.fixture
def record(tmp_path):
    """record(more tests) -> (exit status, outcomes by name, ledger), of a suite in a process of its own."""

    def record(more="", until=1e12):
        (tmp_path / "test_sample.py").write_text(SUITE.format(marker=tmp_path / "marker", more=more))
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import pytest, gpu_pytest, gpu_ledger;"
            f"r = gpu_pytest.Recorder(gpu_ledger.Ledger(__import__('pathlib').Path('numerics.jsonl'), 'x'), {until});"
            "s = pytest.main(['-q', '-p', 'no:cacheprovider', 'test_sample.py'], plugins=[r]); print(s);"
            "sys.exit(3 if r.lost else int(s))"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        ledger = Ledger(tmp_path / "numerics.jsonl", "x")
        return result.returncode, {unit.split("::")[-1]: row for unit, row in ledger.results.items()}, ledger

    return record


def test_outcomes_of_tests_are_recorded_once(record, tmp_path):
    status, found, ledger = record()
    outcomes = {name: row["outcome"] for name, row in found.items()}
    assert status == 1 and not ledger.left("numerics")
    assert outcomes == {"test_fails": "failed", "test_passes": "passed", "test_skips": "skipped", "test_fp16": "passed"}
    assert "a reason" in found["test_fails"]["failed"] and found["test_passes"]["of_allowed"] == 0.25
    (tmp_path / "marker").unlink()
    status, again, _ = record()
    assert again == found and not (tmp_path / "marker").exists()


def test_tests_behind_a_lost_device_are_left_for_another_process(record):
    status, found, ledger = record("def test_breaks():\n    raise RuntimeError('CUDA error: an illegal memory access')")
    assert status == 3 and found["test_breaks"]["outcome"] == "failed"
    assert [unit.split("::")[-1] for unit in ledger.left("numerics")] == ["test_fp16"]
    status, found, ledger = record("def test_breaks():\n    raise RuntimeError('CUDA error: an illegal memory access')")
    assert status == 0 and not ledger.left("numerics")


def test_no_test_begins_when_the_time_is_over(record):
    status, found, ledger = record(until=0.0)
    assert status == 0 and not found and len(ledger.left("numerics")) == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "numerics,nope"], "--steps: got 'nope', expected some of machine,numerics"),
        (["--minutes", "0"], "--minutes: got '0', expected minutes from 1 to 1440"),
        (["--minutes", "nan"], "--minutes: got 'nan', expected minutes"),
        (
            ["--rehearse", "--resume", "/nowhere"],
            "--resume: got /nowhere, expected a folder of results with a run.json",
        ),
        (["--show", "/nowhere"], "--show: got /nowhere, expected a folder of results with a run.json"),
    ],
)
def test_bad_arguments(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(gpu.main([*arguments, "--out", str(tmp_path / "out")]))
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_without_a_device(capsys, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_words_that_tell_of_a_lost_device():
    assert any(words in "RuntimeError: CUDA error: unspecified launch failure" for words in gpu_pytest.FATAL)


def test_results_belong_to_code_and_tables(tmp_path, monkeypatch):
    for name in ("kernels/a/b.py", "kernels/configs/sm_90/k.json", "vlmkern/ops/c.py", "bench/d.py", "tests/gpu/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        monkeypatch.setattr(gpu, "ROOT", tmp_path)
        before = gpu._fingerprint()
        (tmp_path / name).write_text("2")
        assert gpu._fingerprint() != before, name
