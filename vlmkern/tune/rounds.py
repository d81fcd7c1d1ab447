"""Goes through the candidates of problems: arithmetic, compilation ahead in a pool, a first round of times of what can
be launched, and a second of the fastest. While one is timed, others are compiled."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._files import named_line
from ..aot import check_compiler
from ..kernels import _launch
from ..kernels._launch import Config
from .candidates import Problem, candidates, code_of, config_key, kernel_of
from .log import DROPPED, Log, Outcome
from .pool import (
    Binary,
    Failed,
    InProcess,
    Pool,
    Task,
    cannot_launch,
    compile_task,
    least_shared_bytes,
    shared_bytes_of,
)
from .timing import Bench, DeviceLost, Measure, Wrong

# of the fastest, and of the fastest without descriptors where those all have them
_FINALISTS, _WITHOUT = 4, 2
# second rounds of a problem that may end the process before there is none
_ATTEMPTS = 2

Key = tuple[Any, ...]
Progress = Callable[[int, int], None]


@dataclass
class Case:
    """A problem and what became of its candidates, by `config_key`; those without an outcome were not come to."""

    problem: Problem
    default: Config
    candidates: dict[Key, Config]
    outcomes: dict[Key, Outcome] = field(default_factory=dict)

    @property
    def best(self) -> Outcome | None:
        """The fastest, if any was timed."""
        return next(iter(ranked(self.outcomes.values())), None)

    @property
    def of_default(self) -> Outcome | None:
        """The table's default, if it was timed."""
        outcome = self.outcomes.get(config_key(self.default))
        return outcome if outcome is not None and outcome.ms is not None else None

    def counts(self) -> dict[str, int]:
        """How many candidates there are, were dropped for each reason, spill, can be launched and were timed."""
        found = list(self.outcomes.values())
        dropped = {kind: sum(outcome.dropped == kind for outcome in found) for kind in DROPPED}
        before = sum(dropped[kind] for kind in ("arithmetic", "compile", "shared memory", "registers"))
        return {
            "candidates": len(self.candidates),
            **dropped,
            "spill": sum(not outcome.dropped and bool(outcome.local) for outcome in found),
            "to time": len(found) - before,
            "timed": sum(outcome.ms is not None for outcome in found),
        }


def search(
    problems: Sequence[Problem],
    arch: int,
    *,
    source: str = "",
    log: str | os.PathLike[str] | None = None,
    device: str | None = "cuda",
    measure: Measure | None = None,
    workers: int | None = None,
    seconds: float | None = None,
    progress: Progress = lambda done, total: None,
    done: Callable[[Case], None] = lambda case: None,
) -> list[Case]:
    """What became of the candidates of all problems.

    Args:
        arch: of the tables, e.g. 90.
        source: where times come from, for the log.
        log: a file to go on with and to add to.
        device: where candidates are timed; None compiles them and times nothing.
        measure: milliseconds of a launch, in place of those on the device; nothing is then run or compared.
        workers: processes that compile; default: one a processor. 0 compiles in this one.
        seconds: nothing new is begun after them.
        progress: told how many candidates of how many are done.
        done: told of each problem when its candidates are done.

    Raises:
        BackendUnavailable: Triton cannot compile here.
        DeviceLost: a candidate left the device unusable; the log says which, and another process can go on with it.
        OSError: the log cannot be read or written.
    """
    check_compiler()
    end = math.inf if seconds is None else time.monotonic() + seconds
    gpu, target, shared_bytes = str(device), arch, shared_bytes_of(arch)
    if device is not None and torch.device(device).type == "cuda":
        gpu, properties = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device)
        # consumer cards read the tables of data-centre ones, but have code of their own and less shared memory
        target, shared_bytes = 10 * properties.major + properties.minor, properties.shared_memory_per_block_optin
    with Log(log, gpu) as kept:
        works = [_Work(problem, arch, kept, source, device, measure) for problem in problems]
        total = sum(len(work.case.candidates) for work in works)
        tasks = [
            ((work, config), Task(work.case.problem, config, arch, target))
            for work in works
            for config in work.plan(shared_bytes)
        ]
        count = (os.cpu_count() or 1) if workers is None else workers
        with Pool(compile_task, tasks, count) if count else InProcess(compile_task, tasks) as pool:
            while not all(work.finished for work in works) and time.monotonic() < end:
                stepped = next((work for work in works if work.step()), None)
                found = pool.next(0 if stepped else max(0, min(1, end - time.monotonic())))
                if found is not None:
                    (work, config), result = found
                    work.compiled(config, result, shared_bytes)
                if stepped is not None and stepped.finished:
                    done(stepped.case)
                progress(sum(len(work.case.outcomes) for work in works), total)
        for work in works:
            if not work.finished:
                done(work.case)
    return [work.case for work in works]


def ranked(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those with a time, fastest first: by the second round, if there was one, and then of those alone that were in
    it."""
    timed = [outcome for outcome in outcomes if outcome.ms is not None]
    return sorted([o for o in timed if o.final is not None] or timed, key=lambda outcome: outcome.time)


def finalists(outcomes: Iterable[Outcome], default: Config) -> list[Outcome]:
    """Whom the second round is for: the fastest, some without descriptors among them, and the default."""
    timed = sorted((o for o in outcomes if o.ms is not None), key=lambda outcome: outcome.ms or 0)
    best = timed[:_FINALISTS]
    if all(outcome.config.get("TMA") for outcome in best):
        best += [outcome for outcome in timed if not outcome.config.get("TMA")][:_WITHOUT]
    return best + [o for o in timed if config_key(o.config) == config_key(default) and o not in best]


class _Work:
    """A case on its way."""

    def __init__(
        self, problem: Problem, arch: int, log: Log, source: str, device: str | None, measure: Measure | None
    ) -> None:
        table = _launch.table(problem.kernel, arch)
        configs = {config_key(config): config for config in candidates(problem, table)}
        self.case = Case(problem, table["default"][str(problem.bits)], configs)
        self.finished = False
        self._arch, self._log, self._source, self._device, self._measure = arch, log, source, device, measure
        self._code = code_of(kernel_of(problem))
        self._waiting: set[Key] = set()
        self._ready: list[tuple[bool, int, Key, int]] = []
        self._bench: Bench | None = None
        past = log.outcomes(problem, arch, self._code)
        self.case.outcomes.update((key, past[key]) for key in configs if key in past)

    def plan(self, shared_bytes: int) -> list[Config]:
        """What is to be compiled, the default first: what the log does not tell of, and what it says is fastest."""
        for key, outcome in self.case.outcomes.items():
            if outcome.dropped == "did not end" and outcome.unsaid:
                self._drop(key, outcome.dropped, outcome.reason)
        for key, config in self.case.candidates.items():
            if key in self.case.outcomes:
                continue
            try:
                least = least_shared_bytes(Task(self.case.problem, config, self._arch, self._arch))
            except Exception as error:
                # also what the host function asserts or misses in a configuration
                self._drop(key, "compile", named_line(error))
                continue
            if least > shared_bytes:
                reason = f"takes at least {least} bytes of shared memory, a block may have {shared_bytes}"
                self._drop(key, "arithmetic", reason)
            else:
                self._waiting.add(key)
        if self._second_round() or self._waiting:
            self._waiting |= {config_key(outcome.config) for outcome in self._finalists()}
        return [config for key, config in self.case.candidates.items() if key in self._waiting]

    def compiled(self, config: Config, result: Binary | Failed, shared_bytes: int) -> None:
        """Takes note of what became of a compilation."""
        key = config_key(config)
        self._waiting.remove(key)
        if key in self.case.outcomes:
            # it was timed in an earlier run
            return
        lacking = ("compile", result.reason) if isinstance(result, Failed) else cannot_launch(result, shared_bytes)
        if lacking is not None:
            self._drop(key, *lacking)
        elif isinstance(result, Binary):
            if self._device is None:
                self.case.outcomes[key] = Outcome(config, local=result.local)
            else:
                # what spills is hardly the fastest: last
                order = list(self.case.candidates).index(key)
                self._ready.append((result.local > 0, order, key, result.local))

    def step(self) -> bool:
        """Times a candidate, or the fastest against one another, if anything can be timed now."""
        if self.finished or (self._measure is None and config_key(self.case.default) in self._waiting):
            return False
        self._ready.sort()
        if self._ready and not (self._waiting and self._ready[0][0]):
            _, _, key, local = self._ready.pop(0)
            self._first_round(key, local)
            return True
        if self._waiting:
            return False
        if self._device is not None and self._second_round():
            self._run_second_round()
        # the tensors of its example are in the way of the next
        self._bench, self.finished = None, True
        return True

    def _first_round(self, key: Key, local: int) -> None:
        config = self.case.candidates[key]
        default = self.case.outcomes.get(config_key(self.case.default))
        if self._measure is None and default is not None and default.dropped:
            self._drop(key, "failed", f"there is nothing to compare it with: the default is out ({default.dropped})")
            return
        self._write(config, begun=True)
        try:
            milliseconds = self._open().first(config)
        except DeviceLost as error:
            self._drop(key, "failed", named_line(error))
            raise
        except Wrong as error:
            self._drop(key, "wrong", str(error))
        except Exception as error:
            self._drop(key, "failed", named_line(error))
        else:
            self.case.outcomes[key] = Outcome(config, milliseconds, local=local)
            self._write(config, ms=milliseconds, local=local, source=self._source)

    def _finalists(self) -> list[Outcome]:
        return finalists(self.case.outcomes.values(), self.case.default)

    def _second_round(self) -> bool:
        """Whether one is due: some of the fastest were in none, and earlier ones did not end the process."""
        found = self._finalists()
        return any(o.final is None for o in found) and all(o.attempts < _ATTEMPTS for o in found)

    def _run_second_round(self) -> None:
        found = self._finalists()
        for outcome in found:
            self._write(outcome.config, begun=True, round=2)
        try:
            times = self._open().second([outcome.config for outcome in found])
        except DeviceLost:
            raise
        except Exception:
            # all of them ran before: the first round's times are what there is
            return
        for outcome, milliseconds in zip(found, times, strict=True):
            outcome.final = milliseconds
            self._write(outcome.config, ms=milliseconds, local=outcome.local, round=2, source=self._source)

    def _open(self) -> Bench:
        if self._bench is None:
            assert self._device is not None
            self._bench = Bench(self.case.problem, self._arch, self.case.default, self._device, self._measure)
        return self._bench

    def _drop(self, key: Key, kind: str, reason: str) -> None:
        config = self.case.candidates[key]
        self.case.outcomes[key] = Outcome(config, dropped=kind, reason=reason)
        self._write(config, dropped=kind, reason=reason)

    def _write(self, config: Config, **rest: Any) -> None:
        self._log.write(self.case.problem, self._arch, self._code, config, **rest)
