"""`vlmkern info`: backends, versions and this machine."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__, backends
from ..dispatch import table as support


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints tables, unless JSON is wanted: `vlmkern.backends()`, `versions`, `machine` and, with --ops, `ops`."""
    report: dict[str, Any] = backends()
    report["versions"] = {
        "vlmkern": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "pillow", "transformers")},
    }
    report["machine"] = {"cpu": _cpu(), "platform": platform.platform(), "threads": torch.get_num_threads()}
    if options.ops:
        report["ops"] = support.rows()
    if not options.json:
        _print(report)
    return report


def _print(report: dict[str, Any]) -> None:
    console = Console()
    table = Table("backend", "available", "kernels", "details", title="Backends", title_justify="left")
    for name in ("reference", "native", "triton"):
        entry = report[name]
        kernels = ", ".join(op for op in entry["ops"] if not op.endswith("_bwd")) or "none"
        table.add_row(name, "yes" if entry["available"] else "no", kernels, _details(name, entry))
    console.print(table)
    for heading in ("versions", "machine"):
        table = Table(show_header=False, box=None, title=heading.capitalize(), title_justify="left", pad_edge=False)
        for name, value in report[heading].items():
            table.add_row(name, str(value or "not installed"))
        console.print(table)
    if "ops" in report:
        console.print(_support(report["ops"]))


def _support(rows: list[dict[str, Any]]) -> Table:
    """Who computes what, at the sizes of jina-vlm; the rest runs on the reference."""
    names = [name for name in rows[0] if name not in ("op", "backend", "isa")] if rows else []
    table = Table("op", "backend", *names, title="Ops that have kernels", title_justify="left")
    last = ""
    for row in support.merged(rows):
        where = support.where(row)
        cells = ["yes" if row[name] is None else "[dim]torch[/]" for name in names]
        table.add_row(row["op"] if row["op"] != last else "", where, *cells)
        last = row["op"]
    return table


def _details(name: str, entry: dict[str, Any]) -> str:
    parts = [entry["reason"]] if "reason" in entry else []
    if name == "native" and entry["available"]:
        parts.append(f"{entry['isa']} in use; usable: {', '.join(entry['isas'])}; {entry['threads']} threads")
        by_route = (f"{dtype} {route}" for dtype, route in entry["routes"].items())
        parts.append(f"products as on {entry['family']}: {', '.join(by_route)}")
        if "amx_bf16" in entry["features"] and "amx" not in entry["isas"]:
            parts.append("the CPU has AMX, but this build has no kernels for it or the system refuses its registers")
    if name == "triton" and entry["interpreter"]:
        parts.append("interpreted on CPU")
    return "; ".join(parts) or "plain torch, any device"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
