"""The benchmarks' names, which saved results are compared by, and the comparison itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import compare
from support import DATA

ROOT = Path(__file__).parent.parent


def test_names_are_those_that_were_published():
    """A renamed case would drop out of every comparison without a word. To change names on purpose:
    python -m pytest bench --collect-only -q | grep :: > tests/data/bench_ids.txt"""
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    names = {line for line in result.stdout.splitlines() if "::" in line}
    assert names == set((DATA / "bench_ids.txt").read_text(encoding="utf-8").split())


def test_comparison_fails_on_what_got_slower():
    base = {"a::fast": 1.0, "a::same": 1.0, "a::slow": 1.0, "a::gone": 1.0}
    here = {"a::fast": 0.5, "a::same": 1.04, "a::slow": 1.06, "a::new": 9.0}
    table, slower = compare.compare(base, here, 5.0)
    assert slower == ["a::slow"] and table.row_count == 3


def test_the_faster_of_two_runs_counts():
    assert compare.merge([{"a": 2.0, "b": 1.0}, {"a": 1.5}]) == {"a": 1.5}
