"""What a run on a GPU has done so far, a JSON line each, on disk at once: a process that dies loses nothing.

    {"of": ...}                          what the lines behind it belong to: a card and the state of the code
    {"units": [...], "step": ...}        all that a step has to do
    {"begun": unit}, {"at": unit, "part": ...}
    {"done": unit, ...}                  with its results, or "failed" and why
    {"stopped": unit}                    ended from outside for lack of time: to be begun again

A unit that was begun and has no end took its process with it, at the part that was noted last; it is begun again
without that part, or, if there was none, not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIED = "the process ended, or was stopped for giving no sign of life"


class Ledger:
    """One file of such lines.

    Args:
        path: of the file, which need not be there.
        of: lines that belong to something else are left alone and do not count.
    """

    def __init__(self, path: Path, of: str) -> None:
        self.path, self.of = path, of
        self.units: dict[str, list[str]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.lost: dict[str, set[str]] = {}
        self.open: str | None = None
        self._part: str | None = None
        self._ours = False
        content = path.read_bytes() if path.exists() else b""
        # a line that was cut when its writer was killed must not swallow the next
        self._cut = not content.endswith(b"\n") and bool(content)
        for line in content.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "of" in row:
                self._lose()
                self._ours = row["of"] == of
            elif self._ours:
                self._take(row)

    def settled(self, unit: str) -> bool:
        """Whether there is nothing to do about a unit, as it has an end or took its process with it."""
        return unit in self.results

    def left(self, step: str) -> list[str]:
        """Units of a step that have no end."""
        return [unit for unit in self.units.get(step, ()) if unit not in self.results]

    def announce(self, units: list[str], step: str) -> None:
        """Says what a step has to do, and settles what a process before this one died of."""
        self._lose()
        self._write({"units": units, "step": step})
        self._add(units, step)

    def begin(self, unit: str) -> None:
        """Notes that a unit is at work."""
        self._write({"begun": unit})

    def at(self, unit: str, part: str | None) -> None:
        """Notes which of its parts, without which it could be done again; None for what it cannot do without."""
        self._write({"at": unit, "part": part})

    def end(self, unit: str, **results: Any) -> None:
        """Notes the results of a unit."""
        self._write({"done": unit, **results})
        self.results[unit] = results

    def stop(self) -> None:
        """Notes that the unit at work was ended from outside, for lack of time and nothing else."""
        if self.open is not None:
            self._write({"stopped": self.open})
            self.open = None

    def _take(self, row: dict[str, Any]) -> None:
        if "units" in row:
            self._lose()
            self._add(row["units"], row["step"])
        elif "begun" in row:
            self._lose()
            self.open, self._part = row["begun"], None
        elif "at" in row:
            self._part = row["part"]
        elif "stopped" in row:
            self.open = None
        elif "done" in row:
            self.open = None
            self.results[row["done"]] = {key: value for key, value in row.items() if key != "done"}

    def _add(self, units: list[str], step: str) -> None:
        self.units[step] = list(dict.fromkeys([*self.units.get(step, ()), *units]))

    def _lose(self) -> None:
        if self.open is not None:
            if self._part is None:
                self.results[self.open] = {"failed": DIED}
            else:
                self.lost.setdefault(self.open, set()).add(self._part)
            self.open = self._part = None

    def _write(self, row: dict[str, Any]) -> None:
        lines = [row] if self._ours else [{"of": self.of}, row]
        text = "\n" * self._cut + "".join(json.dumps(line) + "\n" for line in lines)
        self._ours, self._cut = True, False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
