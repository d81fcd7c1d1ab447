"""Fuzzes the ops: `python -m tests.fuzz --cases 10000`, or one case again: `--op linear --seed 0 --case 4567`.

Every op runs under every instruction set that its native kernels have here, once more with torch and oneDNN held
to AVX2, and in plain torch. Exit status 1 where a case failed, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

OPS = ("attention", "attention_pool", "swiglu_mlp", "linear", "add_layer_norm", "rms_norm")
MODES = (
    *("forward", "gradient", "autocast", "registered", "changed_weights", "functional", "double_backward"),
    *("bad_argument", "backward_op", "compiled"),
)
OUTCOMES = ("passed", "declined", "refused", "failed")
AVX2_TORCH, REFERENCE = "avx2 torch", "reference"
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, help="only this op")
    parser.add_argument("--isa", help=f"only this instruction set, or {AVX2_TORCH!r} or {REFERENCE!r}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="cases per op and instruction set")
    parser.add_argument("--case", type=int, metavar="INDEX", help="only this one")
    parser.add_argument("--mode", choices=MODES, help="only calls of this kind")
    options = parser.parse_args()
    settings = _settings()
    if options.isa is not None and options.isa not in settings:
        parser.error(f"--isa: got {options.isa!r}, expected one of {', '.join(settings)}")
    chosen = list(settings) if options.isa is None else [options.isa]
    if options.case is not None and options.isa is None:
        chosen = _best(settings)
    runs = [(op, isa) for op in OPS if options.op in (None, op) for isa in chosen]
    first = options.case or 0
    last = first + 1 if options.case is not None else options.cases
    plan = {"seed": options.seed, "mode": options.mode, "first": first, "last": last}
    return _fuzz(runs, settings, plan)


@dataclass
class Tally:
    """What became of the cases of one op in one setting, and when the first and the last of them were done."""

    counts: Counter = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    ended: float = field(default_factory=time.monotonic)

    def add(self, outcome: str) -> None:
        self.counts[outcome] += 1
        self.ended = time.monotonic()

    def speed(self) -> float:
        return self.counts.total() / max(self.ended - self.started, 1e-3)


def _fuzz(runs: list[tuple[str, str]], settings: dict[str, dict[str, str]], plan: dict) -> int:
    """Runs the plan for every op and setting, prints failures as they come and a table; returns the exit status."""
    console, errors = Console(), Console(stderr=True, soft_wrap=True)
    if not console.is_terminal:
        # a log has no width, and names that are cut short tell nothing
        console.width = 110
    size, tallies = plan["last"] - plan["first"], {run: Tally() for run in runs}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} cases/s, {task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, refresh_per_second=1, disable=not errors.is_terminal) as progress:
        for isa in dict.fromkeys(isa for _, isa in runs):
            bar, current = None, ""
            for record in outcomes([plan | {"op": op} for op, setting in runs if setting == isa], settings[isa]):
                op = record["op"]
                if op != current:
                    if bar is not None:
                        progress.remove_task(bar)
                    bar, current = progress.add_task(f"{op}, {isa}", total=size, speed=0.0, failed=0), op
                    tallies[op, isa] = Tally()
                tally = tallies[op, isa]
                tally.add(record["outcome"])
                progress.update(bar, advance=1, speed=tally.speed(), failed=tally.counts["failed"])
                if record["outcome"] == "failed":
                    errors.print(f"{reproducer(record, plan['seed'], isa)}\n    {record['message']}", markup=False)
            if bar is not None:
                progress.remove_task(bar)
    table = Table("op", "setting", "cases", *OUTCOMES, "cases/s")
    for (op, isa), tally in tallies.items():
        # cases that a worker took with it when it ended are no better than failed ones
        tally.counts["failed"] += size - tally.counts.total()
        table.add_row(op, isa, str(size), *(str(tally.counts[o]) for o in OUTCOMES), f"{tally.speed():.0f}")
    console.print(table)
    return 1 if any(tally.counts["failed"] for tally in tallies.values()) else 0


def outcomes(plan: list[dict], environment: dict[str, str]) -> Iterator[dict]:
    """Runs the plan in a worker of its own and yields what became of every case."""
    command = [sys.executable, "-m", "tests.fuzz.worker", json.dumps(plan)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        yield from map(json.loads, worker.stdout)


def reproducer(record: dict, seed: int, isa: str | None = None) -> str:
    """The command that runs one case again."""
    command = f"python -m tests.fuzz --op {record['op']} --seed {seed} --case {record['index']}"
    command += f" --mode {record['mode']}" if record["mode"] else ""
    return command + (f" --isa '{isa}'" if isa else "")


def _settings() -> dict[str, dict[str, str]]:
    """Environment variables of every setting that this machine can run."""
    code = (
        "import json, vlmkern; native = vlmkern.backends()['native'];"
        "print(json.dumps([*native.get('emulated_isas', []), *native['isas']]))"
    )
    isas = json.loads(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)
    settings = {isa: {"VLMKERN_CPU_ISA": isa} for isa in isas}
    # a cache of its own: torch 2.13 loads what it compiled for one vector width for another, and corrupts memory
    cache = str(ROOT / "build" / "inductor_avx2")
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "TORCHINDUCTOR_CACHE_DIR": cache}
    if "avx2" in isas:
        held["VLMKERN_CPU_ISA"] = "avx2"
    return settings | {AVX2_TORCH: held, REFERENCE: {"VLMKERN_BACKEND": REFERENCE}}


def _best(settings: dict[str, dict[str, str]]) -> list[str]:
    return [name for name in settings if name not in (AVX2_TORCH, REFERENCE)][-1:] or [REFERENCE]


if __name__ == "__main__":
    sys.exit(main())
