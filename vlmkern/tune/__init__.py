"""Times the candidates of every kernel on the GPU of this machine, for tables with the fastest.

Candidates are compiled ahead, several at a time, and what cannot be launched is not tried. What is left runs on the
tensors of the kernel's example, and its results must equal those of the table's default before it is timed: once
quickly, then the fastest again in turn. A log tells what became of each, so that a run that is cut short can go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from .candidates import Problem, kernels, problems
from .log import DROPPED, Outcome
from .results import choose, merge, other_code, source, tables, text, write
from .rounds import Case, Progress, search
from .timing import DeviceLost, Measure, device_arch

__all__ = [
    "DROPPED",
    "Case",
    "DeviceLost",
    "Outcome",
    "Problem",
    "choose",
    "device_arch",
    "kernels",
    "merge",
    "other_code",
    "problems",
    "search",
    "source",
    "tables",
    "text",
    "tune",
    "write",
]


def tune(
    problems: Sequence[Problem],
    arch: int,
    source: str,
    *,
    log: str | os.PathLike[str] | None = None,
    device: str = "cuda",
    measure: Measure | None = None,
    workers: int | None = None,
    seconds: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = lambda done, total: None,
    done: Callable[[Case], None] = lambda case: None,
) -> list[dict[str, Any]]:
    """The tables of the problems' kernels, with entries for what was timed; `write` puts each in its place.

    Args:
        source: where the times come from, for the tables.
        folder: where tables lie that entries are merged into before the shipped ones; else the arguments of `search`.

    Raises:
        As `search`.
    """
    cases = search(
        problems,
        arch,
        source=source,
        log=log,
        device=device,
        measure=measure,
        workers=workers,
        seconds=seconds,
        progress=progress,
        done=done,
    )
    return merge(arch, ((case.problem, choose(case.outcomes.values())) for case in cases), source, folder)
