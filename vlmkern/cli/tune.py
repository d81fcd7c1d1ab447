"""`vlmkern tune`: the fastest configurations on the GPU of this machine, into the tables."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .. import tune
from .aot import config_text, shape_text

# the narrowest that the tables are for
_WIDTH = 100

# counts and their headings
_COMPILED = {
    "candidates": "all",
    "arithmetic": "arithm.",
    "compile": "refused",
    "shared memory": "shared",
    "registers": "regs",
    "to time": "left",
    "spill": "spill",
}
_COMPILED_NOTE = (
    "All candidates; dropped by arithmetic, refused by the kernel or the compiler, in want of shared memory or of "
    "registers; left to time, and how many of these spill registers."
)
_TIMED_NOTE = (
    "Timed; out, as results are wrong, the run failed or an earlier one did not end. Microseconds of the best and of "
    "the default, and how many times the best is as fast."
)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Tunes and writes tables; prints what became of the candidates, unless JSON is wanted, which has all of it.

    Raises:
        ValueError: options that do not go together, or that no problem agrees with.
        BackendUnavailable: there is no GPU, and none of the ways that need none was asked for.
        OSError: the log or a table cannot be read or written.
    """
    _check(options)
    if options.from_log is not None:
        return _from_log(options)
    arch = options.arch if options.dry_run and options.arch else tune.device_arch()
    if options.arch not in (None, arch):
        raise ValueError(f"--arch: got {options.arch}, expected {arch}, this machine's GPU's, or --dry-run beside it")
    problems = tune.problems(arch, options.kernel, options.bits, options.shape)
    source = "" if options.dry_run else tune.source()
    begin, cases = time.monotonic(), []
    try:
        with _progress() as progress:
            bar = progress.add_task("Compiling" if options.dry_run else "Timing", total=None)
            found = tune.search(
                problems,
                arch,
                source=source,
                log=options.log,
                device=None if options.dry_run else "cuda",
                workers=options.workers,
                seconds=options.seconds,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
                done=cases.append,
            )
    except tune.DeviceLost as error:
        on = "run it again with the same --log to go on after it" if options.log else "a run with --log could go on"
        print(f"vlmkern: error: a candidate left the GPU unusable for this process: {error}; {on}", file=sys.stderr)
        sys.exit(3)
    seconds = time.monotonic() - begin
    chosen = ((case.problem, tune.choose(case.outcomes.values())) for case in found)
    tables = [] if options.dry_run else tune.merge(arch, chosen, source, options.tables)
    written = [str(tune.write(table, options.tables)) for table in tables]
    report = {
        "arch": arch,
        "source": source,
        "seconds": round(seconds, 1),
        "totals": _totals(found),
        "problems": [row_of(case) for case in found],
        "tables": tables,
        "written": written,
    }
    if not options.json:
        print_report(report, options.dry_run)
    return report


def _check(options: argparse.Namespace) -> None:
    if options.dry_run and (options.log is not None or options.tables is not None):
        raise ValueError("--dry-run: times nothing, expected no --log and no --tables beside it")
    if options.from_log is not None:
        others = ("dry_run", "log", "seconds", "workers", "arch")
        given = [f"--{name.replace('_', '-')}" for name in others if getattr(options, name)]
        if given:
            raise ValueError(f"--from: reads a log alone, expected no {' and no '.join(given)} beside it")


def _from_log(options: argparse.Namespace) -> dict[str, Any]:
    tables = tune.tables(options.from_log, options.kernel, options.bits, options.shape, options.tables)
    written = [str(tune.write(table, options.tables)) for table in tables]
    other = tune.other_code(options.from_log)
    if other:
        print(f"vlmkern: timed with other code or another Triton than here: {', '.join(other)}", file=sys.stderr)
    if not options.json:
        print("\n".join(f"written: {path}" for path in written))
    return {"tables": tables, "written": written, "other_code": other}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _totals(cases: list[tune.Case]) -> dict[str, int]:
    counts = [case.counts() for case in cases]
    return {key: sum(count[key] for count in counts) for key in counts[0]}


def row_of(case: tune.Case) -> dict[str, Any]:
    best, default = case.best, case.of_default
    return {
        **case.problem._asdict(),
        **case.counts(),
        "best": best and best.config,
        "ms": best and best.time,
        "default": case.default,
        "default_ms": default and default.time,
        "outcomes": [
            {key: value for key, value in vars(outcome).items() if key not in ("attempts", "unsaid")}
            for outcome in case.outcomes.values()
        ],
    }


def print_report(report: dict[str, Any], dry_run: bool) -> None:
    """The counts of each problem and, of a run that was no dry one, the best."""
    console = Console()
    console = Console(width=max(_WIDTH, console.width))
    rows = [*report["problems"], {"kernel": "all", **report["totals"]}]
    compiled = _table(f"sm_{report['arch']}: compiled", _COMPILED.values())
    for name, row in zip(_names(rows), rows, strict=True):
        compiled.add_row(name, *(str(row[key] or "-") for key in _COMPILED))
    console.print(compiled)
    console.print(_COMPILED_NOTE)
    if not dry_run:
        timed = _table(f"sm_{report['arch']}: timed", ["timed"])
        timed.add_column("out", width=9)
        timed.add_column("best", width=18)
        for heading in ("us", "default", "x"):
            timed.add_column(heading, justify="right", no_wrap=True)
        for name, row in zip(_names(rows), rows, strict=True):
            out = "\n".join(f"{row[key]} {key}" for key in ("wrong", "failed", "did not end") if row[key])
            timed.add_row(name, str(row["timed"] or "-"), out or "-", *_best(row))
        console.print()
        console.print(timed)
        console.print(_TIMED_NOTE)
    console.print(f"{report['seconds']:.1f} s")
    for path in report["written"]:
        console.print(f"written: {path}", soft_wrap=True)


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("kernel and shape", width=35)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _names(rows: list[dict[str, Any]]) -> Iterator[Text]:
    """Of each row, its shape, below its kernel's name where that is another than before."""
    before = ""
    for row in rows:
        shape = f"{row['bits']} bits, {shape_text(row['shape'])}" if "bits" in row else ""
        yield Text("\n".join(filter(None, ["" if row["kernel"] == before else row["kernel"], shape])))
        before = row["kernel"]


def _best(row: dict[str, Any]) -> tuple[str, ...]:
    if "bits" not in row:
        return ()
    if row["best"] is None:
        return ("none: as it was",)
    default = row["default_ms"]
    times = (_microseconds(default), f"{default / row['ms']:.2f}") if default else ()
    return config_text(row["best"]), _microseconds(row["ms"]), *times


def _microseconds(milliseconds: float) -> str:
    # the tenths of what takes long are noise
    return f"{milliseconds * 1e3:.{0 if milliseconds >= 1 else 1}f}"
