"""What a run on a GPU came to, in tables: of the files that it left, so that it can be shown again anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_ledger import Ledger
from gpu_steps import STEPS
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]
LABELS = ("", " tuned", " compiled")


def one_line(unit: str, rows: list[Row]) -> str:
    """Providers of a case, fastest first."""
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    parts = [f"{row['provider']} {row['ms'] * 1e3:.1f}" for row in timed]
    ratio = next((f" = {row['x_best_other']:.2f} x" for row in timed if "x_best_other" in row), "")
    missing = [f"{row['provider']} ({row['unavailable'][:40]})" for row in rows if "unavailable" in row]
    return f"{unit}: us: {', '.join(parts) or 'none'}{ratio}" + (f"; without {', '.join(missing)}" if missing else "")


def tuned_line(case: Any) -> str:
    """What came of the candidates of one of a kernel's problems, a `vlmkern.tune.Case`."""
    counts = ", ".join(f"{count} {what}" for what, count in case.counts().items() if count)
    best, default = case.best, case.of_default
    text = f"{case.problem.kernel}, {case.problem.bits} bits, {_pairs(case.problem.shape)}: {counts}"
    if best is not None:
        text += f"; best {best.time * 1e3:.1f} us"
        text += f", default {default.time * 1e3:.1f}" if default is not None else ""
    return text


def show(out: Path, of: str, console: Console) -> None:
    """Prints all that there is."""
    run = json.loads((out / "run.json").read_text(encoding="utf-8")) if (out / "run.json").exists() else {"steps": {}}
    bench, numerics = (Ledger(out / name, of) for name in ("bench.jsonl", "numerics.jsonl"))
    machine = bench.results.get("machine", {})
    if machine.get("gpu") == "rehearsal":
        console.print("[bold]A rehearsal on a CPU: no figure means anything.[/]")
    console.print(escape(", ".join(f"{key} {value}" for key, value in machine.items())))
    console.print(steps_table(run["steps"]))
    if numerics.results:
        console.print(numerics_text(numerics))
    found = cases(bench)
    if found:
        console.print(cases_table(found))
    for unit, result in bench.results.items():
        if "failed" in result:
            console.print(f"[red]{escape(unit)}[/]: {escape(result['failed'])}")
    if (out / "tuning.jsonl").exists():
        console.print(tuning_table(out / "tuning.jsonl"))
        console.print("`vlmkern tune --from tuning.jsonl` writes the tables.")


def steps_table(steps: dict[str, Row]) -> Table:
    """How far each step came."""
    table = Table(title="steps", title_justify="left")
    for heading, justify in (("step", "left"), ("s", "right"), ("state", "left"), ("gives", "left")):
        table.add_column(heading, justify=justify)
    for step in STEPS:
        if step.name in steps:
            row = steps[step.name]
            table.add_row(step.name, f"{row['seconds']:.0f}", escape(row["state"]), step.about)
    return table


def numerics_text(ledger: Ledger) -> str:
    """Counts, and what failed."""
    outcomes = [row.get("outcome", "failed") for row in ledger.results.values()]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))
    lines = [f"numerics: {counts}, {len(ledger.left('numerics'))} left"]
    worst = max((row for row in ledger.results.items() if "of_allowed" in row[1]), key=_of_allowed, default=None)
    if worst:
        name = worst[0].rpartition("::")[2]
        lines.append(f"largest error, as a share of what is allowed: {worst[1]['of_allowed']:.2f} in {escape(name)}")
    failed = [(unit, row["failed"]) for unit, row in ledger.results.items() if "failed" in row]
    lines += [f"  [red]{escape(unit)}[/]: {escape(' '.join(text.split())[-150:])}" for unit, text in failed[:12]]
    return "\n".join(lines + [f"  and {len(failed) - 12} more"] * (len(failed) > 12))


def _of_allowed(item: tuple[str, Row]) -> float:
    return item[1]["of_allowed"]


def cases(ledger: Ledger) -> dict[str, dict[str, list[Row]]]:
    """Rows by unit and by label: as shipped, tuned, and against torch.compile."""
    found: dict[str, dict[str, list[Row]]] = {}
    for unit, result in ledger.results.items():
        if "rows" in result:
            label = next((label for label in LABELS[1:] if unit.endswith(label)), "")
            found.setdefault(unit.removesuffix(label), {})[label] = result["rows"]
    return found


def cases_table(found: dict[str, dict[str, list[Row]]]) -> Table:
    """A row a case, each ratio of one interleaved run."""
    table = Table(title="us a call, median; x is the other's time over ours in the same run", title_justify="left")
    table.add_column("case", no_wrap=True)
    for heading in ("floor", "vlmkern", "tuned", "of floor"):
        table.add_column(heading, justify="right")
    table.add_column("best other")
    for heading in ("us", "x", "compile", "x", "error"):
        table.add_column(heading, justify="right")
    for unit, labelled in found.items():
        ours = {label: row for label, rows in labelled.items() if (row := _timed(rows, "vlmkern"))}
        latest = ours.get(" tuned") or ours.get("") or ours.get(" compiled")
        rows = labelled.get(" tuned") or labelled.get("") or []
        others = [row for row in rows if row["provider"] != "vlmkern" and "ms" in row]
        best = min(others, key=lambda row: row["ms"], default=None)
        compiled = _timed(labelled.get(" compiled", []), "compile")
        table.add_row(
            escape(unit),
            _us(latest and latest["ms"] * latest["of_floor"]),
            _us(ours[""]["ms"]) if "" in ours else _problem(labelled.get("", [])),
            _us(ours.get(" tuned", {}).get("ms")),
            f"{latest['of_floor']:.0%}" if latest else "",
            best["provider"] if best else "",
            _us(best and best["ms"]),
            _ratio(best, ours.get(" tuned") or ours.get("")),
            _us(compiled and compiled["ms"]),
            _ratio(compiled, ours.get(" compiled")),
            f"{latest['relative_error']:.0e}" if latest else "",
        )
    return table


def tuning_table(log: Path) -> Table:
    """The fastest of each kernel's problems, as far as candidates were timed."""
    best: dict[tuple[str, int, str], list[tuple[float, str]]] = {}
    rounds: dict[tuple[str, int, str], int] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            key = row["kernel"], row["bits"], _pairs(row["shape"])
            found, number = (row["ms"], _pairs(row["config"])), row.get("round", 1)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        # times of the second round, where there was one, are the ones that decide
        if number > rounds.get(key, 1):
            best[key], rounds[key] = [], number
        if number == rounds.get(key, 1):
            best.setdefault(key, []).append(found)
    table = Table(title="tuned", title_justify="left")
    for heading, justify in (
        ("kernel", "left"),
        ("bits", "right"),
        ("shape", "left"),
        ("us", "right"),
        ("config", "left"),
    ):
        table.add_column(heading, justify=justify)
    for (kernel, bits, shape), times in best.items():
        milliseconds, config = min(times)
        table.add_row(kernel, str(bits), shape, f"{milliseconds * 1e3:.1f}", config)
    return table


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _timed(rows: list[Row], provider: str) -> Row | None:
    return next((row for row in rows if row["provider"] == provider and "ms" in row), None)


def _problem(rows: list[Row]) -> str:
    return next((escape(row["unavailable"][:24]) for row in rows if row["provider"] == "vlmkern"), "")


def _us(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds * 1e3:.1f}"


def _ratio(other: Row | None, ours: Row | None) -> str:
    return f"{other['ms'] / ours['ms']:.2f}" if other and ours else ""
