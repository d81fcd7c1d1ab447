"""The tables that times make: entries of what was timed are replaced, all others stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels import _launch
from ..kernels._launch import Config
from . import log as logs
from .candidates import Problem, code_of, kernels, problem_key, problems
from .log import Outcome
from .rounds import ranked


def choose(outcomes: Iterable[Outcome]) -> list[Config]:
    """The fastest, and after one that needs descriptors the fastest that does not."""
    timed = list(outcomes)
    best = ranked(timed)[:1]
    if best and best[0].config.get("TMA"):
        # of the second round, if any was in it
        best += ranked(outcome for outcome in timed if not outcome.config.get("TMA"))[:1]
    return [outcome.config for outcome in best]


def merge(
    arch: int, chosen: Iterable[tuple[Problem, list[Config]]], source: str, folder: str | Path | None = None
) -> list[dict[str, Any]]:
    """The tables of all kernels that anything was chosen for.

    Args:
        chosen: configurations for each problem; of one with none, the entries stay.
        source: where the choice comes from.
        folder: where tables lie that go before the shipped ones.
    """
    tables: dict[str, dict[str, Any]] = {}
    replaced: dict[str, set[Any]] = {}
    for problem, configs in chosen:
        if configs:
            table = tables.setdefault(problem.kernel, dict(_launch.table(problem.kernel, arch, folder)))
            table["entries"] = _replaced(table["entries"], problem, configs)
            replaced.setdefault(problem.kernel, set()).add(problem_key(problem))
    for name, table in tables.items():
        others = {problem_key(Problem(name, e["bits"], e["shape"])) for e in table["entries"]} - replaced[name]
        if not others:
            table["source"] = source
        elif table["source"].split(_OTHERS)[0] != source:
            table["source"] = f"{source}{_OTHERS}{table['source']}"
    return list(tables.values())


_OTHERS = "; other entries: "


def tables(
    log: str | Path,
    names: Iterable[str] | None = None,
    bits: Iterable[int] | None = None,
    shape: Mapping[str, int] | None = None,
    folder: str | Path | None = None,
) -> list[dict[str, Any]]:
    """The tables that a log makes, of any machine, without a GPU: of all problems, or of those that `problems` gives.

    Of a problem that was timed on several GPUs, or with several versions of its kernel, the last counts.

    Raises:
        OSError: the log cannot be read.
        ValueError: as `problems`, or the log has no time.
    """
    lines: dict[Any, list[dict[str, Any]]] = {}
    for line in logs.read(log):
        lines.setdefault((line["arch"], *logs.of(line)), []).append(line)
    found = []
    for arch in sorted({key[0] for key in lines} & set(_launch.ARCHS)):
        chosen, sources = [], []
        for problem in problems(arch, names, bits, shape):
            default = _launch.table(problem.kernel, arch)["default"][str(problem.bits)]
            timed = _last_timed(lines.get((arch, *problem_key(problem)), []), default)
            if timed:
                chosen.append((problem, choose(logs.outcomes(timed).values())))
                last = next(line for line in reversed(timed) if "ms" in line)
                sources.append(last.get("source") or f"timed on {last['gpu']}")
        found += merge(arch, chosen, "; ".join(dict.fromkeys(sources)), folder)
    if not found:
        raise ValueError(f"{log}: holds no time of any problem asked for")
    return found


def other_code(log: str | Path) -> list[str]:
    """Kernels that a log has times of, with other code than they have here."""
    codes = {kernel.name: code_of(kernel) for kernel in kernels()}
    last = {line["kernel"]: line["code"] for line in logs.read(log) if "ms" in line}
    return sorted(name for name, code in last.items() if name in codes and codes[name] != code)


def write(table: dict[str, Any], folder: str | Path | None = None) -> Path:
    """Puts a table in its place among the shipped ones, or in a folder that VLMKERN_TABLES may name; returns where.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(_launch.TABLES if folder is None else folder) / f"sm_{table['arch']}" / f"{table['kernel']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # in one step: a reader finds the old one or the new
    part = path.with_suffix(".part")
    part.write_text(text(table), encoding="utf-8")
    part.replace(path)
    return path


def text(table: dict[str, Any]) -> str:
    """A table as JSON, a configuration a line."""
    defaults = ",\n".join(f'  "{bits}": {json.dumps(config)}' for bits, config in table["default"].items())
    entries = "".join(f"\n  {json.dumps(entry)}," for entry in table["entries"]).removesuffix(",")
    end = "\n ]\n}\n" if entries else "]\n}\n"
    return (
        "{\n"
        + "".join(f' "{key}": {json.dumps(table[key])},\n' for key in ("kernel", "arch", "source"))
        + f' "default": {{\n{defaults}\n }},\n "entries": [{entries}{end}'
    )


def source() -> str:
    """Where this machine's figures come from, for the tables."""
    name, torch_version = torch.cuda.get_device_name(), torch.__version__
    return f"timed on {name}, torch {torch_version}, triton {metadata.version('triton')}, {date.today()}"


def _last_timed(lines: list[dict[str, Any]], default: Config) -> list[dict[str, Any]]:
    """Of a problem's lines those of the GPU and code that were timed last, with configurations that the kernel takes:
    they have all block sizes that the default has."""
    fitting = [line for line in lines if _launch.fits(line["config"], default)]
    last = next((line for line in reversed(fitting) if "ms" in line), None)
    return [] if last is None else [x for x in fitting if (x["gpu"], x["code"]) == (last["gpu"], last["code"])]


def _replaced(entries: list[dict[str, Any]], problem: Problem, configs: list[Config]) -> list[dict[str, Any]]:
    """Entries with those of a problem in the place of what it had, else after all others."""
    key = problem_key(problem)
    mine = [problem_key(Problem(problem.kernel, entry["bits"], entry["shape"])) == key for entry in entries]
    at = mine.index(True) if any(mine) else len(entries)
    made = [{"bits": problem.bits, "shape": problem.shape, "config": config} for config in configs]
    kept = [entry for entry, goes in zip(entries, mine, strict=True) if not goes]
    return [*kept[:at], *made, *kept[at:]]
