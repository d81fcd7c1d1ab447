"""What is kept of benchmark runs, the tables made of it, and the rule that nothing is slower than torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import records
import rule


def case(group, provider, seconds, **extra):
    info = {"provider": provider, "of_peak": 0.5, "relative_error": 1e-6, "peak_mib": 1.0, "comparable": True}
    return {
        "group": group,
        "fullname": f"bench/{group}::{provider}",
        "stats": {"median": seconds},
        "extra_info": info | extra,
    }


def run(*cases, date="2030-01-02T03:04:05", cpu=None):
    zen4 = {"vendor_id_raw": "AuthenticAMD", "family": 25, "model": 17, "brand_raw": "AMD EPYC"}
    return {
        "datetime": date,
        "machine_info": {"cpu": cpu or zen4, "isa": "avx512_bf16", "torch": "2.13.0", "vlmkern": "1"},
        "benchmarks": list(cases),
    }


GROUP = "linear fwd|some_rows|float32"


def test_a_row_compares_with_what_is_comparable():
    (row,) = records.summary(
        run(
            case(GROUP, "vlmkern", 0.010),
            case(GROUP, "eager", 0.030),
            case(GROUP, "compile", 0.020),
            case(GROUP, "onednn", 0.001, comparable=False),
            case(GROUP, "openvino", 0.012),
        )
    )["rows"]
    assert (row["best"], row["x_best"], row["x_default"], row["x_openvino"]) == ("compile", 2.0, 3.0, 1.2)


def test_cpus_are_named():
    known = {"vendor_id_raw": "GenuineIntel", "family": 6, "model": 0x8F}
    assert records.cpu(known, "avx512")[0] == "intel-sapphire-rapids-avx512"
    assert records.cpu(known, "avx2", "avx2")[1] == "Intel Sapphire Rapids, avx2 (oneDNN held to avx2)"
    assert records.cpu({"brand_raw": "Some CPU @ 3 GHz"}, "avx2") == ("some-cpu-3-ghz-avx2", "Some CPU @ 3 GHz, avx2")


def test_what_is_not_measured_again_keeps_its_figure(tmp_path):
    def saved(*cases, **options):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(run(*cases, **options)), encoding="utf-8")
        return records.save(path, tmp_path / "results")

    other = "linear fwd|other_rows|float32"
    first = [case(group, p, s) for group in (GROUP, other) for p, s in (("vlmkern", 1.0), ("eager", 2.0))]
    saved(*first)
    # the same day again, and a later day
    saved(case(GROUP, "vlmkern", 1.0), case(GROUP, "eager", 3.0))
    (rows,) = records.latest(tmp_path / "results").values()
    assert [row["x_best"] for row in rows.values()] == [2.0, 3.0]
    saved(case(GROUP, "vlmkern", 1.0), case(GROUP, "eager", 4.0), date="2030-02-01T00:00:00")
    (rows,) = records.latest(tmp_path / "results").values()
    assert {row["x_best"]: row["date"] for row in rows.values()} == {2.0: "2030-01-02", 4.0: "2030-02-01"}


def test_tables():
    found = {
        "A": {("s", "x_1", "float32"): {"x_best": 1.234, "ms": 1234.5, "best": "eager", "date": "d"}},
        "B": {("s", "x_1", "bfloat16"): {"x_best": 2.0, "ms": None, "date": "d", "x_openvino": 1.1}},
    }
    lines = records.side_by_side(found, records._cases(found)).splitlines()
    assert (
        lines[0] == "| case | A: bf16 | A: fp32 | B: bf16 | B: fp32 |" and lines[2] == "| s, x 1 |  | 1.23 | 2.00 |  |"
    )
    assert "x openvino" in records.full(found["B"]) and "1,234.50" in records.full(found["A"])


def test_the_documents_tables_are_those_of_the_files():
    pages = {path: (records.ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/performance.md")}
    for name, text in records.tables().items():
        page = pages["README.md" if name == "speed highlights" else "docs/performance.md"]
        assert text in page, "python bench/records.py tables"


def test_the_readmes_rows_are_benchmarks():
    measured = {case for rows in records.latest().values() for case in ((suite, shape) for suite, shape, _ in rows)}
    groups = set((Path(__file__).parent / "data" / "bench_ids.txt").read_text(encoding="utf-8").split())
    for suite, shape in records.HIGHLIGHTS.values():
        assert (suite, shape) in measured or any(shape in name for name in groups)


def test_marks_that_are_missing_are_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- a -->\nold\n<!-- end of a -->\nrest\n", encoding="utf-8")
    records.write(page, "a", "new")
    assert page.read_text(encoding="utf-8") == "<!-- a -->\nnew\n<!-- end of a -->\nrest\n"
    with pytest.raises(ValueError, match="expected the marks <!-- b -->"):
        records.write(page, "b", "new")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "latest.json"
    cases = [case(GROUP, "vlmkern", 1.0), case(GROUP, "eager", 0.5), case(GROUP, "openvino", 0.1)]
    path.write_text(json.dumps(run(*cases)), encoding="utf-8")
    return path


def test_the_rule_counts_the_least_of_several_runs(saved, monkeypatch, capsys):
    asked = []

    def again(names):
        asked.append(names)
        return [case(GROUP, "vlmkern", 0.4), case(GROUP, "eager", 0.6)]

    monkeypatch.setattr(rule, "again", again)
    assert rule.main(str(saved)) == 0 and len(asked) == 1 and len(asked[0]) == 3
    times = {c["extra_info"]["provider"]: c["stats"]["median"] for c in json.loads(saved.read_text())["benchmarks"]}
    assert times == {"vlmkern": 0.4, "eager": 0.5, "openvino": 0.1}


def test_the_rule_fails_on_what_stays_slower(saved, monkeypatch, capsys):
    monkeypatch.setattr(rule, "again", lambda names: [])
    assert rule.main(str(saved)) == 1
    assert "linear fwd, some_rows, float32" in capsys.readouterr().out


def test_without_anything_comparable_there_is_no_rule():
    groups = rule.by_group([case(GROUP, "vlmkern", 1.0), case(GROUP, "eager", 0.5, comparable=False)])
    assert rule.slower(groups) == {}
