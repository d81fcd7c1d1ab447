"""The rule that no op is slower than torch: python bench/rule.py bench/out/latest.json.

Of a saved run, the cases where vlmkern is below 0.97 of the best of torch's ways are run again, each with all of its
providers, and the least times count: other work on a machine makes a case slower, never faster. Fails with those that
stay below, and writes what it found into the saved run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from records import best_of, by_group
from rich.console import Console
from rich.table import Table

LEAST = 0.97
ROUNDS = 3
"""Runs of a case below it that are made at most."""

Cases = dict[str, dict[str, dict[str, Any]]]


def main(path: str) -> int:
    """Judges, runs again what is below; returns the exit status."""
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    groups = by_group(saved["benchmarks"])
    console = Console(width=max(100, Console().width))
    for _ in range(ROUNDS):
        below = slower(groups)
        if not below:
            break
        console.print(f"run again, as below {LEAST} of the best of torch: {', '.join(sorted(below))}")
        keep_least(groups, by_group(again([case["fullname"] for name in below for case in groups[name].values()])))
    Path(path).write_text(json.dumps(saved, indent=1), encoding="utf-8")
    below = slower(groups)
    if not below:
        console.print(f"no case is below {LEAST} of the best of torch")
        return 0
    table = Table("case", title=f"Below {LEAST} of the best of torch", title_justify="left")
    table.add_column("x best", justify="right")
    for name, ratio in sorted(below.items(), key=lambda item: item[1]):
        table.add_row(name.replace("|", ", "), f"{ratio:.2f}")
    console.print(table)
    return 1


def slower(groups: Cases) -> dict[str, float]:
    """Groups below the rule, and how many times as fast as the best of torch they are."""
    ratios = {}
    for name, cases in groups.items():
        times = best_of(cases)
        if "vlmkern" in cases and times:
            ratios[name] = min(times.values()) / cases["vlmkern"]["stats"]["median"]
    return {name: ratio for name, ratio in ratios.items() if ratio < LEAST}


def keep_least(groups: Cases, others: Cases) -> None:
    """Puts the faster median of each case into the first."""
    for name, cases in others.items():
        for provider, case in cases.items():
            if case["stats"]["median"] < groups[name][provider]["stats"]["median"]:
                groups[name][provider]["stats"] = case["stats"]
                groups[name][provider]["extra_info"] = case["extra_info"]


def again(cases: list[str]) -> list[dict[str, Any]]:
    """Runs cases by their full names, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "again.json")
        command = [sys.executable, "-m", "pytest", *cases, "-q", "--benchmark-only", f"--benchmark-json={output}"]
        subprocess.run(command, cwd=Path(__file__).parent.parent, check=False)
        return json.loads(output.read_text(encoding="utf-8"))["benchmarks"] if output.exists() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
