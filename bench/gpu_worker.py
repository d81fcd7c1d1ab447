"""The process that does a step of bench/gpu.py: python bench/gpu_worker.py STEP OUT UNTIL OF.

It writes each result to the step's file at once, and does what the file does not have yet. It ends with status 0 where
nothing is left that it can do before the time UNTIL, in seconds since the epoch; else it is started again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

from gpu_ledger import Ledger  # noqa: E402
from gpu_steps import by_name  # noqa: E402

# what tuning is worth its time for
TUNED = (
    ("attention_fwd_kernel", {"head_dim": 72}),
    ("attention_bwd_dkv_kernel", {"head_dim": 72}),
    ("attention_bwd_dq_kernel", {"head_dim": 72}),
    ("attention_pool_fwd_kernel", None),
    ("attention_pool_fwd_slots_kernel", None),
    ("attention_pool_fwd_absorbed_kernel", None),
    ("swiglu_mlp_fwd_kernel", None),
    ("silu_mul_fwd_kernel", None),
    ("swiglu_mlp_bwd_kernel", None),
    ("attention_pool_bwd_kernel", None),
    ("attention_pool_bwd_scatter_kernel", None),
)
# what a rehearsal compiles and tunes
REHEARSED = ("silu_mul_fwd_kernel", {"rows": 16})
ROUNDS = 20
# the status of a process whose device is lost
LOST = 3


class Work:
    """A step in progress."""

    def __init__(self, name: str, out: Path, until: float, of: str) -> None:
        (self.step,) = by_name(name)
        self.out, self.until, self.of = out, until, of

    @property
    def over(self) -> bool:
        """Whether nothing new is to be begun."""
        return time.time() > self.until

    def ledger(self) -> Ledger:
        """The step's file."""
        return Ledger(self.out / self.step.file, self.of)

    def run(self) -> int:
        """Does the step; returns the exit status."""
        return {
            "machine": self.machine,
            "numerics": self.numerics,
            "bench": self.bench,
            "tune": lambda: self.tune(rest=False),
            "blocks": self.blocks,
            "compile": self.compile,
            "rest": lambda: self.tune(rest=True),
        }[self.step.name]()

    def machine(self) -> int:
        """Ceilings and versions, and the kernels as compiled, which later launches find in Triton's cache."""
        import gpu_device

        ledger = self.ledger()
        ledger.announce(["machine", "kernels"], self.step.name)
        device = gpu_device.current()
        if not ledger.settled("machine"):
            ledger.begin("machine")
            describe(ledger, device)
        if not ledger.settled("kernels"):
            from vlmkern import aot

            ledger.begin("kernels")
            begin = time.monotonic()
            arch = table_arch(device)
            rows = aot.report(aot.jobs((arch,), REHEARSED[0] if device.rehearsal else None))
            (self.out / "kernels.json").write_text(json.dumps(rows), encoding="utf-8")
            ledger.end("kernels", count=len(rows), seconds=round(time.monotonic() - begin, 1))
        print_line(f"ceilings: {ledger.results['machine']}")
        return 0

    def numerics(self) -> int:
        """tests/gpu, those of the dtype that is used most first."""
        import pytest
        from gpu_pytest import Recorder

        recorder = Recorder(self.ledger(), self.until)
        os.chdir(ROOT)
        status = pytest.main(
            ["tests/gpu", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu", f"--rootdir={ROOT}", "--tb=short"],
            plugins=[recorder],
        )
        if recorder.lost:
            return LOST
        # files that could not be imported are no tests that failed
        return status if status in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR) else 0

    def bench(self) -> int:
        """All ops, by all providers that need no compilation of minutes."""
        import gpu_cases

        return self.cases(gpu_cases.op_entries(), _without_compilation)

    def blocks(self) -> int:
        """Parts of the model; then, if there are tuned tables, the ops again."""
        import gpu_cases

        entries = gpu_cases.block_entries()
        if not entries:
            print_line(f"parts of the model are left out: they need {', '.join(gpu_cases.MODELS_NEED)}")
        status = self.cases(entries, _without_compilation)
        if status or "VLMKERN_TABLES" not in os.environ:
            return status
        return self.cases(gpu_cases.op_entries(), _without_compilation, label=" tuned")

    def compile(self) -> int:
        """What torch.compile has a form of, by it and by us."""
        import gpu_cases

        entries = [entry for entry in (*gpu_cases.op_entries(), *gpu_cases.block_entries()) if entry.compiled]
        return self.cases(entries, lambda provider: provider in ("compile", "vlmkern"), label=" compiled")

    def cases(self, entries: list[Any], wanted: Callable[[str], bool], label: str = "") -> int:
        """Measures entries of gpu_cases whose units are not in the ledger under their names with `label`, by the
        providers that are wanted."""
        import gpu_measure
        import gpu_summary
        from gpu_cases import DEVICE

        from vlmkern._files import named_line

        DEVICE.prepare()
        ledger = self.ledger()
        if "matmul_tflops" not in ledger.results.get("machine", {}):
            # the step that does so was left out, or failed
            describe(ledger, DEVICE)
        ceilings = ledger.results["machine"]
        units = {f"{unit}{label}": (entry, mode) for entry in entries for unit, mode in entry.units.items()}
        ledger.announce(list(units), self.step.name)
        for unit, (entry, mode) in units.items():
            if ledger.settled(unit):
                continue
            if self.over:
                return 0
            ledger.begin(unit)
            try:
                rows = self._measured(entry, mode, unit, wanted, ceilings, ledger)
            except gpu_measure.DeviceLost as error:
                # not its end: another process begins it again without the provider at fault
                print_line(f"{unit}: {error}")
                return LOST
            except Exception as error:
                ledger.end(unit, failed=named_line(error))
                print_line(f"{unit}: {named_line(error)}")
                if not DEVICE.alive():
                    return LOST
            else:
                ledger.end(unit, rows=rows, tables="tuned" if "VLMKERN_TABLES" in os.environ else "shipped")
                print_line(gpu_summary.one_line(unit, rows))
        return 0

    def _measured(
        self, entry: Any, mode: str, unit: str, wanted: Callable[[str], bool], ceilings: dict[str, Any], ledger: Ledger
    ) -> list[dict[str, Any]]:
        import gpu_measure
        import torch
        from gpu_cases import DEVICE

        torch.manual_seed(0)
        with DEVICE.backend():
            case = entry.make()
            return gpu_measure.measure(
                case,
                mode,
                rounds=ROUNDS,
                ceilings=ceilings,
                names=[name for name in case.providers if wanted(name)],
                lost=ledger.lost.get(unit, ()),
                at=lambda part: ledger.at(unit, part),
            )

    def tune(self, *, rest: bool) -> int:
        """The candidates of `TUNED`, or of all kernels, into `OUT/tuning.jsonl`."""
        import gpu_device
        import gpu_summary

        from vlmkern import tune

        device = gpu_device.current()
        device.prepare()
        arch = table_arch(device)
        if device.rehearsal:
            chosen = [(*REHEARSED, 32 if rest else 16)]
        elif rest:
            chosen = [(None, None, 16), (None, None, 32)]
        else:
            chosen = [(name, shape, 16) for name, shape in TUNED]
        problems = [p for name, shape, bits in chosen for p in tune.problems(arch, name and [name], [bits], shape)]
        try:
            tune.search(
                problems,
                arch,
                source="a rehearsal" if device.rehearsal else tune.source(),
                log=self.out / self.step.file,
                device="meta" if device.rehearsal else "cuda",
                measure=device.measure,
                seconds=max(0.0, self.until - time.time()),
                done=lambda case: print_line(gpu_summary.tuned_line(case)),
            )
        except tune.DeviceLost as error:
            print_line(str(error))
            return LOST
        return 0


def _without_compilation(provider: str) -> bool:
    return provider != "compile"


def table_arch(device: Any) -> int:
    """Which tables kernels read on the device."""
    from vlmkern.kernels import _launch

    return 90 if device.rehearsal else _launch.table_arch(0)


def describe(ledger: Ledger, device: Any) -> None:
    """Notes the machine that results are from, and its ceilings."""
    import platform
    from datetime import date

    import torch

    import vlmkern

    backends = vlmkern.backends()
    device.prepare()
    ledger.end(
        "machine",
        **device.describe(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=backends["triton"]["version"],
        vlmkern=vlmkern.__version__,
        extension=backends["native"]["available"],
        cores=os.cpu_count(),
        date=str(date.today()),
        **device.ceilings(),
    )


def print_line(text: str) -> None:
    """At once, as another process reads it."""
    print(text, flush=True)


if __name__ == "__main__":
    name, out, until, of = sys.argv[1:]
    sys.exit(Work(name, Path(out), float(until), of).run())
