"""Prints a saved benchmark JSON as a table: python bench/report.py bench/out/latest.json."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(path: str) -> None:
    """One row per case; the ratio compares with the fastest other provider of the same group."""
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    groups = defaultdict(dict)
    for case in saved["benchmarks"]:
        groups[case["group"]][case["params"]["provider"]] = case
    machine = saved["machine_info"]
    table = Table(title=f"{machine['device']} ({machine['isa']}), torch {machine['torch']}, one thread, medians")
    table.add_column("case")
    table.add_column("provider")
    for heading in ("ms", "GFLOP/s", "error", "times the best other"):
        table.add_column(heading, justify="right")
    for group, cases in groups.items():
        for provider, case in cases.items():
            median, info = case["stats"]["median"], case["extra_info"]
            others = [c["stats"]["median"] for p, c in cases.items() if p != provider]
            table.add_row(
                group,
                provider,
                f"{median * 1e3:.2f}",
                f"{info['gflops_per_s']:.0f}",
                f"{info['relative_error']:.0e}",
                f"{min(others) / median:.2f}" if others and provider == "vlmkern" else "",
                end_section=provider == list(cases)[-1],
            )
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1])
