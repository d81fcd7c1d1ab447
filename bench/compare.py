"""Compares the working tree with another revision, one-thread CPU time, case by case: python bench/compare.py BASE.

The base is built in a git worktree and installed into an environment of its own that borrows all other packages from
this one. The benchmarks of the working tree run on both in turn, twice each, and the faster median of each counts.
Fails if any case is more than 5 % slower. Cases that only one of the two can run are named and not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "compare"


def main() -> int:
    """Builds, runs, prints; the exit status says whether something got slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a git revision")
    parser.add_argument("--only", default="vlmkern", help="pytest's -k expression (default: vlmkern)")
    parser.add_argument("--limit", type=float, default=5.0, help="allowed slowdown in per cent (default: 5)")
    options = parser.parse_args()
    base = build(options.base)
    runs: dict[str, list[dict[str, float]]] = {"base": [], "here": []}
    for attempt in range(2):
        for name, python in (("base", base), ("here", Path(sys.executable))):
            runs[name].append(medians(python, options.only, FOLDER / f"{name}-{attempt}.json"))
    best = {name: merge(found) for name, found in runs.items()}
    table, slower = compare(best["base"], best["here"], options.limit)
    console = Console(width=max(120, Console().width))
    console.print(table)
    for name in sorted(best["base"].keys() ^ best["here"].keys()):
        console.print(f"only {'here' if name in best['here'] else 'in the base'}: {name}", markup=False)
    console.print(
        f"{len(slower)} of {len(best['here'])} cases more than {options.limit:g} % slower than {options.base}"
    )
    return 1 if slower else 0


def build(revision: str) -> Path:
    """The Python of an environment that holds vlmkern as of `revision`."""
    source, environment = FOLDER / "source", FOLDER / "venv"
    subprocess.run(["git", "worktree", "remove", "--force", str(source)], cwd=ROOT, capture_output=True, check=False)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    subprocess.run(["git", "worktree", "add", "--detach", str(source), revision], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    # a path in a .pth file is searched after the environment's own, and its .pth files, an editable vlmkern's, are not
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(source)]
    subprocess.run(install, check=True)
    return python


def medians(python: Path, only: str, output: Path) -> dict[str, float]:
    """Seconds by case, of those that pass."""
    command = [python, "-m", "pytest", "bench", "-q", "-k", only, "--benchmark-only", f"--benchmark-json={output}"]
    # outside the checkout's folder, where its own vlmkern would be found first
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    subprocess.run([*command, f"--rootdir={ROOT}"], cwd=ROOT, env=environment, check=False)
    cases = json.loads(output.read_text(encoding="utf-8"))["benchmarks"]
    return {case["fullname"]: case["stats"]["median"] for case in cases}


def merge(runs: list[dict[str, float]]) -> dict[str, float]:
    """The least of each case that all runs have."""
    return {name: min(run[name] for run in runs) for name in runs[0] if all(name in run for run in runs)}


def compare(base: dict[str, float], here: dict[str, float], limit: float) -> tuple[Table, list[str]]:
    """A table of the cases that both have, slowest first, and the names of those that got slower than allowed."""
    ratios = {name: here[name] / base[name] for name in here.keys() & base.keys()}
    table = Table("case", title="One-thread CPU time", title_justify="left")
    for heading in ("base ms", "here ms", "change"):
        table.add_column(heading, justify="right")
    for name in sorted(ratios, key=lambda name: -ratios[name]):
        change = (ratios[name] - 1) * 100
        style = "red" if change > limit else "green" if change < -limit else ""
        cells = (f"{base[name] * 1e3:.3f}", f"{here[name] * 1e3:.3f}", f"{change:+.1f} %")
        table.add_row(name.split("::")[-1].replace("[", r"\["), *cells, style=style)
    return table, [name for name, ratio in ratios.items() if (ratio - 1) * 100 > limit]


if __name__ == "__main__":
    sys.exit(main())
