"""Runs cases in a child process, which may crash: `python -m tests.fuzz.worker PLAN`, PLAN a JSON list of runs.

This process imports everything and computes nothing, as threads do not survive a fork. It forks a child that runs the
cases of a run in order; when one kills the child, or hangs it, that case has failed and a new child goes on behind it.
Every outcome is a line of JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import sys
import traceback

import torch._dynamo
import torch._functorch.aot_autograd  # noqa: F401  imported on first use otherwise, by every child again

from . import cases
from .faults import Corrupted
from .judge import Failure

# seconds after which a case hangs: compiling takes ten
PATIENCE = 120
FAILED = "failed"


def main(plan: list[dict]) -> None:
    for run in plan:
        first = run["first"]
        while first < run["last"]:
            first = _run(run, first)


def _run(run: dict, first: int) -> int:
    """Runs cases from `first` on, in one child; returns the index behind the last one that it finished or died of."""
    # what the child is at, for the case that it does not come back from
    state = mmap.mmap(-1, 4096)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _child(run, first, writer, state)
        finally:
            os._exit(0)
    os.close(writer)
    hung = False
    while True:
        ready, _, _ = select.select([reader], [], [], PATIENCE)
        if not ready:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
        data = os.read(reader, 1 << 16)
        if not data:
            break
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    os.close(reader)
    _, status = os.waitpid(child, 0)
    started, finished, note = _read(state)
    if started > finished:
        how = "hung" if hung else _how_it_ended(status)
        _write(sys.stdout.fileno(), run, started, FAILED, f"{how} ({note})")
        return started + 1
    return finished + 1


def _child(run: dict, first: int, writer: int, state: mmap.mmap) -> None:
    # messages of crashes and warnings of torch would run into the progress display
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    for index in range(first, run["last"]):
        _note(state, index, index - 1, "")
        outcome, message, corrupted = _case(run, index, state)
        _write(writer, run, index, outcome, message)
        _note(state, index, index, "")
        if corrupted:
            return


def _case(run: dict, index: int, state: mmap.mmap) -> tuple[str, str, bool]:
    mode = run.get("mode")
    notes = [""]

    def note(text: str) -> None:
        notes[0] = text
        _note(state, index, index - 1, text)

    try:
        return cases.run(run["op"], run["seed"], index, mode, note), "", False
    except Failure as failure:
        return FAILED, f"{failure} ({notes[0]})", isinstance(failure, Corrupted)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return FAILED, f"{text} at {os.path.basename(place.filename)}:{place.lineno} ({notes[0]})", False


def _how_it_ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the process ended with status {os.waitstatus_to_exitcode(status)}"


def _note(state: mmap.mmap, started: int, finished: int, text: str) -> None:
    record = json.dumps([started, finished, text[:3000]]).encode()[:4090]
    state.seek(0)
    state.write(len(record).to_bytes(4, "little") + record)


def _read(state: mmap.mmap) -> tuple[int, int, str]:
    state.seek(0)
    length = int.from_bytes(state.read(4), "little")
    return tuple(json.loads(state.read(length))) if length else (0, -1, "")


def _write(file: int, run: dict, index: int, outcome: str, message: str) -> None:
    record = {"op": run["op"], "index": index, "outcome": outcome, "mode": run.get("mode")}
    if message:
        record["message"] = message
    os.write(file, json.dumps(record).encode() + b"\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
