"""What became of each candidate, a line of JSON each, so that a run that is cut short goes on where it was.

    {"kernel": ..., "arch": 90, "bits": 16, "shape": {...}, "config": {...}, "code": ..., "gpu": ...,
     "begun": true}                          it is about to run on the device; with "round": 2, again
     "ms": 0.12, "local": 0, "source": ...}  its time, its bytes of local memory, and where the time comes from
     "ms": 0.11, "round": 2, ...}            its time among the fastest
     "dropped": "wrong", "reason": ...}      why it has none

A candidate that was begun and never ended hung the device or took the process with it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import read_regular
from ..kernels._launch import Config
from .candidates import Problem, config_key, problem_key

# why a candidate is out, in the order in which it may be
DROPPED = ("arithmetic", "compile", "shared memory", "registers", "wrong", "failed", "did not end")

# of a candidate a few hundred bytes
_MOST_BYTES = 256 << 20


@dataclass
class Outcome:
    """What became of a candidate: milliseconds of the first and, if it came so far, the second round, or what it was
    `dropped` for; bytes of local memory, which registers were spilled to, are None where it was not compiled."""

    config: Config
    ms: float | None = None
    final: float | None = None
    dropped: str = ""
    reason: str = ""
    local: int | None = None
    # second rounds that were begun and not ended
    attempts: int = 0
    # whether it is only known from a line that says it was begun
    unsaid: bool = False

    @property
    def time(self) -> float:
        """By which it is chosen within a round."""
        return math.inf if self.ms is None else self.ms if self.final is None else self.final


class Log:
    """A log to go on with, or without a path one that nothing is written to.

    Args:
        path: is made if there is none.
        gpu: the device that is timed.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | Path | None, gpu: str) -> None:
        self._path, self._gpu = path, gpu
        self._past = list(read(path)) if path is not None and Path(path).exists() else []
        self._stream = None

    def __enter__(self) -> Log:
        if self._path is not None:
            self._stream = open(self._path, "a+b")
            # a line that was cut must not swallow the next
            if self._stream.tell() and not _ends_a_line(self._stream):
                self._stream.write(b"\n")
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def outcomes(self, problem: Problem, arch: int, code: str) -> dict[tuple[Any, ...], Outcome]:
        """What is known of a problem's candidates, by `config_key`."""
        return outcomes(
            line
            for line in self._past
            if (line["arch"], line["code"], line["gpu"]) == (arch, code, self._gpu) and of(line) == problem_key(problem)
        )

    def write(self, problem: Problem, arch: int, code: str, config: Config, **rest: Any) -> None:
        """Adds a line, which is in the file when this returns."""
        if self._stream is None:
            return
        line = {"kernel": problem.kernel, "arch": arch, "bits": problem.bits, "shape": problem.shape}
        line |= {"config": config, "code": code, "gpu": self._gpu, **rest}
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()


def read(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a log that are lines of a log: others, and one that was cut, are passed over.

    Raises:
        OSError: it cannot be read.
    """
    for text in read_regular(path, _MOST_BYTES).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if _is_line(line):
                yield line


def outcomes(lines: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], Outcome]:
    """What lines of one problem say, by `config_key`; what is said last counts."""
    found: dict[tuple[Any, ...], Outcome] = {}
    for line in lines:
        key = config_key(line["config"])
        outcome = found.setdefault(key, Outcome(line["config"]))
        if "begun" in line and line.get("round") == 2:
            outcome.attempts += 1
        elif "begun" in line:
            reason = "was begun in an earlier run and did not end: it hung, or took the run with it"
            found[key] = Outcome(line["config"], dropped="did not end", reason=reason, unsaid=True)
        elif "dropped" in line:
            found[key] = Outcome(line["config"], dropped=line["dropped"], reason=line["reason"])
        elif line.get("round") == 2:
            outcome.final, outcome.attempts = line["ms"], 0
        else:
            found[key] = Outcome(line["config"], line["ms"], local=line.get("local"))
    return found


def of(line: dict[str, Any]) -> tuple[Any, ...]:
    """The problem of a line, as `problem_key`."""
    return problem_key(Problem(line["kernel"], line["bits"], line["shape"]))


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    kinds = {"kernel": str, "arch": int, "bits": int, "shape": dict, "config": dict, "code": str, "gpu": str}
    if not all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
        return False
    if not all(isinstance(value, int) for value in (*line["shape"].values(), *line["config"].values())):
        return False
    if "dropped" in line:
        return line["dropped"] in DROPPED and isinstance(line.get("reason"), str)
    if "begun" in line:
        return line["begun"] is True
    ms, local = line.get("ms"), line.get("local")
    if not (local is None or isinstance(local, int)) or not isinstance(line.get("source", ""), str):
        return False
    return isinstance(ms, (int, float)) and not isinstance(ms, bool) and 0 < ms < math.inf


def _ends_a_line(stream: Any) -> bool:
    stream.seek(-1, 2)
    return stream.read(1) == b"\n"
