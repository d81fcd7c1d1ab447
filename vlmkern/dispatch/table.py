"""Which backend computes which op, in which dtype and with which instructions: asked of those who decide it."""

from __future__ import annotations

from typing import Any

import torch

from . import availability, extension, providers, targets
from .targets import Target

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rows() -> list[dict[str, Any]]:
    """One dict per op, backend and instruction set: "op", "backend", "isa" (None but for native kernels), for each
    dtype's name None or the reason why an op at the sizes of jina-vlm does not run there.

    Those of the native kernels need the extension, those of Triton its package; without, they are left out.
    """
    found = []
    for op in providers.all_ops():
        if op.backward or op.keeps:
            continue
        for backend, target in [("native", targets.of_isa(isa)) for isa in _isas()] + [("triton", Target("cuda"))]:
            if backend not in op.providers or (backend == "triton" and availability.triton_version() is None):
                continue
            supports = providers.provider(op.name, backend).supports
            of_dtypes = {_name(dtype): supports(op.problem.example(dtype), target) for dtype in DTYPES}
            found.append(
                {"op": op.name, "backend": backend, "isa": target.isa if backend == "native" else None, **of_dtypes}
            )
    return found


def merged(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of instruction sets that support the same as one row, "isas" in the place of "isa"."""
    found: list[dict[str, Any]] = []
    for row in table:
        rest = {key: value for key, value in row.items() if key != "isa"}
        same = found and {key: value for key, value in found[-1].items() if key != "isas"} == rest
        if same:
            found[-1]["isas"].append(row["isa"])
        else:
            found.append({**rest, "isas": [] if row["isa"] is None else [row["isa"]]})
    return found


def where(row: dict[str, Any]) -> str:
    """Backend and instruction sets of a merged row."""
    isas = row["isas"]
    if not isas or isas == list(targets.ISAS):
        return row["backend"]
    return f"{row['backend']}, {isas[0]} " + ("and up" if isas[-1] == targets.ISAS[-1] else f"to {isas[-1]}")


def markdown() -> str:
    """The table, for documents."""
    names = [_name(dtype) for dtype in DTYPES]
    lines = [f"| op | backend | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in merged(rows()):
        cells = ["yes" if row[name] is None else "" for name in names]
        lines.append(f"| `{row['op']}` | {where(row)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _isas() -> list[str]:
    """Of all kernels, not of this machine's alone."""
    return list(targets.ISAS) if extension.reason_unavailable() is None else []
