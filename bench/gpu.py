"""One run on the GPU of this machine, planned for 30 minutes: python3 bench/gpu.py [--minutes 30].

Numbers of every op at the sizes of the models, times against all that torch and installed libraries have, the tables
that matter tuned, the parts of the model, and torch.compile: in this order, each step with a share of the time. It
needs torch, triton, pytest and rich, no built extension and no network, and changes no setting of the card. A process
does a step; should a kernel hang or break the device, it is started again behind it. Every result is on disk at once:
the same command with --resume does what is left.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any, TextIO

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(BENCH)]

from gpu_ledger import Ledger  # noqa: E402
from gpu_steps import REHEARSAL, STEPS, Step, by_name, ends  # noqa: E402
from gpu_summary import show  # noqa: E402
from rich.console import Console  # noqa: E402

FILES = ("run.json", "bench.jsonl", "numerics.jsonl", "tuning.jsonl", "kernels.json", "run.log", "summary.txt")
# of a file that comes back from a borrowed machine
MOST_BYTES = 16 * 2**20
# so often may a step's process end without having settled anything
TRIES = 2
WORKER = BENCH / "gpu_worker.py"


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps and shows what they came to. Status: 0 done, 1 something failed, 2 bad input or no GPU."""
    options = _parser().parse_args(arguments)
    try:
        steps = by_name(options.steps)
        if options.show is not None:
            return _show(options.show)
        name = "rehearsal" if options.rehearse else _card()
        out = options.out or BENCH / ("out" if options.rehearse else "results") / f"{name}-{date.today()}"
        _prepare(out, options.resume)
    except (ValueError, OSError) as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2
    # as when a shell's `timeout` ends it: what runs on the device must not outlive it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Run(out, f"{name} {_fingerprint()}", options.rehearse)
    run.go(steps, 60 * options.minutes)
    return run.finish()


class Run:
    """The steps of one command.

    Args:
        out: where result files go.
        of: the card and the state of the code, which results of other cards and code do not count for.
    """

    def __init__(self, out: Path, of: str, rehearsal: bool) -> None:
        self.out, self.of, self.rehearsal = out, of, rehearsal
        self.tables = Path(tempfile.mkdtemp(prefix="vlmkern-tables-"))
        path = out / "run.json"
        self.record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": {}}
        self.record["of"] = of
        self.console = Console(width=150, soft_wrap=True)

    def go(self, steps: tuple[Step, ...], seconds: float) -> None:
        """Does one after the other."""
        begin = time.time()
        last, until = begin + seconds, ends(steps, begin, seconds)
        for step in steps:
            self.console.rule(f"{step.name}: {step.about}; until {until[step.name] - begin:.0f} s", align="left")
            started, row = time.time(), self.record["steps"].setdefault(step.name, {"seconds": 0.0})
            self._note(row, state="cut off")
            state = self._step(step, until[step.name], last)
            self._note(row, state=state, seconds=round(row["seconds"] + time.time() - started, 1))
            self.console.print(f"[bold]{step.name}[/]: {state}, {time.time() - started:.0f} s")

    def _note(self, row: dict[str, Any], **changes: Any) -> None:
        row |= changes
        (self.out / "run.json").write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> int:
        """Shows the summary, keeps it, and says whether all is well."""
        with (self.out / "summary.txt").open("w", encoding="utf-8") as file:
            for console in (Console(file=file, width=150), Console(width=150)):
                show(self.out, self.of, console)
        print(f"results: {self.out}")
        shutil.rmtree(self.tables, ignore_errors=True)
        ledgers = [Ledger(self.out / name, self.of) for name in ("bench.jsonl", "numerics.jsonl")]
        failed = any("failed" in row for ledger in ledgers for row in ledger.results.values())
        return int(failed or any(row["state"].startswith("failed") for row in self.record["steps"].values()))

    def _step(self, step: Step, until: float, last: float) -> str:
        fruitless = 0
        while True:
            before = self._progress(step)
            status, words = self._process(step, until, min(until + step.quiet, last))
            if status == "over":
                return f"time over{self._left(step)}"
            if status == "ended":
                left = self._left(step)
                return f"time over{left}" if left or (not self._counts(step) and time.time() > until) else "done"
            fruitless = 0 if self._progress(step) > before else fruitless + 1
            if fruitless == TRIES:
                return f"failed: {words}"
            self.console.print(f"{step.name}: {words}; started again")

    def _process(self, step: Step, until: float, last: float) -> tuple[str, str]:
        """Runs a step's process to its end, "ended" or "broken", or to `last`, "over"; and its last words."""
        child = subprocess.Popen(
            [sys.executable, str(WORKER), step.name, str(self.out), str(until), self.of],
            cwd=ROOT,
            env=self._environment(step),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        tee = _Tee(child.stdout, self.out / "run.log")
        try:
            status = self._watch(child, tee, step, last)
        finally:
            # with all that it started, which must not hold the device
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            tee.close()
        if status == "ended":
            return ("ended", "") if child.returncode == 0 else ("broken", f"status {child.returncode}: {tee.last}")
        if status == "over" and self._counts(step):
            Ledger(self.out / step.file, self.of).stop()
        return ("over", "") if status == "over" else ("broken", f"no sign of life for {step.quiet:.0f} s")

    def _watch(self, child: subprocess.Popen[str], tee: _Tee, step: Step, last: float) -> str:
        path, alive = self.out / step.file, time.time()
        while child.poll() is None:
            time.sleep(0.1)
            now = time.time()
            alive = max(alive, tee.heard, path.stat().st_mtime if path.exists() else 0)
            if now > last:
                return "over"
            if now - alive > step.quiet:
                return "silent"
        return "ended"

    def _environment(self, step: Step) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "VLMKERN_BACKEND")}
        env |= {"PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.rehearsal:
            env |= {REHEARSAL: "1", "OMP_NUM_THREADS": "1"}
            env |= {} if step.compiles else {"TRITON_INTERPRET": "1"}
        if step.tuned and self._tuned():
            env["VLMKERN_TABLES"] = str(self.tables)
        return env

    def _tuned(self) -> bool:
        """Writes the tables that come of what was timed so far; whether there are any."""
        from vlmkern import tune

        try:
            found = tune.tables(self.out / "tuning.jsonl")
        except (OSError, ValueError):
            # there is no such file, or no candidate was timed
            return False
        for table in found:
            tune.write(table, self.tables)
        return True

    def _progress(self, step: Step) -> int:
        """A number that grows with what is settled."""
        path = self.out / step.file
        if not self._counts(step):
            return path.stat().st_size if path.exists() else 0
        ledger = Ledger(path, self.of)
        return len(ledger.results) + sum(len(parts) for parts in ledger.lost.values()) + (ledger.open is not None)

    def _counts(self, step: Step) -> bool:
        """Whether the step's file is a ledger: tuning has a log of its own."""
        return step.file != "tuning.jsonl"

    def _left(self, step: Step) -> str:
        if not self._counts(step):
            return ""
        left = Ledger(self.out / step.file, self.of).left(step.name)
        return f", {len(left)} left" if left else ""


class _Tee:
    """Passes a process's output on to the terminal and a file, which stays within its limit.

    Attributes:
        last: line of it that is not empty.
        heard: when that came.
    """

    def __init__(self, stream: TextIO, path: Path) -> None:
        self.last, self.heard = "", 0.0
        self._stream, self._path = stream, path
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits for what is under way."""
        self._thread.join(timeout=5)

    def _pass_on(self) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            for line in self._stream:
                self.last, self.heard = line.strip() or self.last, time.time()
                print(line, end="", flush=True)
                if file.tell() < MOST_BYTES - 2**16:
                    file.write(line[: 2**15])
                    file.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=_minutes, default=30.0, help="of this command (default: 30)")
    parser.add_argument(
        "--steps", metavar="A,B", help=f"some of {','.join(step.name for step in STEPS)} (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: bench/results/<gpu>-<date>)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="results of an earlier command, to go on from")
    parser.add_argument("--show", type=Path, metavar="DIR", help="show the results there, and do nothing")
    parser.add_argument(
        "--rehearse", action="store_true", help="go through all steps on this machine's CPU, at small sizes"
    )
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"got {text[:20]!r}, expected minutes from 1 to 1440")
    return value


def _card() -> str:
    """The GPU's name, as of a file.

    Raises:
        ValueError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("needs a CUDA device; `--rehearse` goes through the steps without, `vlmkern aot` compiles")
    return torch.cuda.get_device_name().lower().replace(" ", "-")


def _prepare(out: Path, resume: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if resume is None:
        return
    _require_results("--resume", resume)
    for name in FILES:
        if (resume / name).is_file() and not (out / name).exists():
            (out / name).write_bytes((resume / name).read_bytes())


def _fingerprint() -> str:
    """Of all code and tables that results depend on."""
    found = hashlib.sha256()
    for pattern in ("kernels/**/*.py", "kernels/**/*.json", "vlmkern/**/*.py", "bench/*.py", "tests/gpu/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _show(folder: Path) -> int:
    _require_results("--show", folder)
    show(folder, json.loads((folder / "run.json").read_text(encoding="utf-8"))["of"], Console(width=150))
    return 0


def _require_results(option: str, folder: Path) -> None:
    if not (folder / "run.json").is_file():
        raise ValueError(f"{option}: got {folder}, expected a folder of results with a run.json")


if __name__ == "__main__":
    sys.exit(main())
