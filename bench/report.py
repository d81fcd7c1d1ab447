"""Prints a saved benchmark JSON as a table: python bench/report.py bench/out/latest.json."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from records import best_of
from rich.console import Console
from rich.table import Table


def main(path: str) -> None:
    """One table for each suite, a row for each shape and dtype, milliseconds by provider; the ratio compares
    vlmkern with the fastest of torch's. A provider that misses the accuracy limit is "not comparable"."""
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    suites: dict = defaultdict(lambda: defaultdict(dict))
    for case in saved["benchmarks"]:
        suite, shape, dtype = case["group"].split("|")
        suites[suite][shape, dtype][case["extra_info"]["provider"]] = case
    machine = saved["machine_info"]
    console = Console(width=max(170, Console().width))
    console.print(
        f"{machine['device']}, {machine['isa']}, torch {machine['torch']}, vlmkern {machine['vlmkern']}; "
        "milliseconds of CPU time on one thread, medians"
    )
    console.print("GFLOP/s count the formula's work; forms that do less of it can exceed the measured peak")
    for suite, rows in suites.items():
        alone = all(list(cases) == ["vlmkern"] for cases in rows.values())
        console.print(_host_table(suite, rows) if alone else _table(suite, rows))


def _table(suite: str, rows: dict) -> Table:
    providers = list(dict.fromkeys(provider for cases in rows.values() for provider in cases))
    table = Table(title=suite, title_justify="left")
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype")
    for provider in providers:
        table.add_column(provider, justify="right")
    for heading in ("GFLOP/s", "of peak", "x best other", "error"):
        table.add_column(heading, justify="right")
    for (shape, dtype), cases in rows.items():
        milliseconds = {provider: case["stats"]["median"] * 1e3 for provider, case in cases.items()}
        ours = cases["vlmkern"]["extra_info"]
        best = min(best_of(cases).values(), default=float("nan")) * 1e3
        table.add_row(
            shape,
            dtype,
            *(_milliseconds(cases.get(provider)) for provider in providers),
            f"{ours['gflops_per_s']:.0f}",
            f"{ours['of_peak']:.0%}",
            f"{best / milliseconds['vlmkern']:.2f}",
            f"{ours['relative_error']:.0e}",
        )
    return table


def _milliseconds(case: dict | None) -> str:
    if case is None:
        return ""
    text = f"{case['stats']['median'] * 1e3:.2f}"
    return text if case["extra_info"].get("comparable", True) else f"[dim]{text}, not comparable[/]"


def _host_table(suite: str, rows: dict) -> Table:
    """What has no other provider: microseconds."""
    table = Table("call", "dtype", title=suite, title_justify="left")
    table.add_column("us", justify="right")
    for (call, dtype), cases in rows.items():
        table.add_row(call, dtype, f"{cases['vlmkern']['stats']['median'] * 1e6:.1f}")
    return table


if __name__ == "__main__":
    main(sys.argv[1])
