"""Measures vlmkern on the GPU of this machine against every provider that torch has here: python bench/gpu.py.

Each provider's result is first checked against float32; its call is then captured in a CUDA graph where that works, so
that device time is compared and not Python's. Rounds are interleaved, the L2 cache is overwritten before each, medians
are reported, and rates are given as shares of what this card gave in the same run. No setting of the card is changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case, cases
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vlmkern

RESULTS = Path(__file__).parent / "results"
# relative to the largest value of the float32 result; a provider beyond is reported and not timed
LIMIT = 5e-2


def main() -> int:
    """Runs all cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name holds TEXT")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=270, help="start no case after this time (default: 270)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: needs a CUDA device; `vlmkern aot` reports what needs none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    # gradients are computed on the stream of their forward, and the default stream cannot be captured
    torch.cuda.set_stream(torch.cuda.Stream())
    console, begin = Console(width=150), time.monotonic()
    machine = describe_machine()
    console.print(machine)
    rows: list[dict[str, Any]] = []
    path = RESULTS / f"{machine['gpu'].lower().replace(' ', '-')}-{date.today()}.json"
    path.parent.mkdir(exist_ok=True)
    for case in cases():
        if options.only not in case.name:
            continue
        if time.monotonic() - begin > options.seconds:
            console.print(f"left out for lack of time: {case.name}")
            continue
        for mode in ("fwd", "bwd") if case.backward else ("fwd",):
            found = measure(case, mode, options.rounds, machine)
            rows += found
            console.print(table(case, mode, found))
            # as they come: a run that is cut short leaves what it has
            path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {path}")
    return 0


def describe_machine() -> dict[str, Any]:
    """The card, versions, and the two ceilings that rates are compared with."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = device_times({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": vlmkern.backends()["triton"]["version"],
        "vlmkern": vlmkern.__version__,
        "matmul_tflops": round(2 * 8192**3 / times["matmul"] / 1e9, 1),
        "copy_gb_per_s": round(2 * 2**30 / times["copy"] / 1e6),
    }


def measure(case: Case, mode: str, rounds: int, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one case and mode, one a provider."""
    exact = wide_result(case, mode)
    calls: dict[str, Callable[[], Any]] = {}
    rows = []
    for name, provider in case.providers.items():
        row: dict[str, Any] = {"case": case.name, "mode": mode, "provider": name}
        rows.append(row)
        try:
            call = forward(case, provider) if mode == "fwd" else backward(case, provider)
            found = call()
            row["relative_error"] = max(
                ((x.float() - y).abs().max() / y.abs().max()).item() for x, y in zip(found, exact, strict=True)
            )
            row["peak_mib"] = peak_memory(call)
        except Exception as error:
            # a backend that this card, build or shape does not have; what it said is kept with the results
            row["unavailable"] = " ".join(str(error).split())[:160]
            continue
        if not row["relative_error"] <= LIMIT:
            row["unavailable"] = f"wrong: relative error {row['relative_error']:.2g}"
            continue
        calls[name] = call
    del exact
    for name, milliseconds in device_times(calls, rounds).items():
        row = next(row for row in rows if row["provider"] == name)
        # a backward makes twice the forward's products; what is recomputed does not count as work
        flops = case.flops * (1 if mode == "fwd" else 2.5 if case.name.startswith("attention ") else 2)
        row["ms"] = milliseconds
        row["tflops"] = flops / milliseconds / 1e9
        row["of_matmul_peak"] = row["tflops"] / machine["matmul_tflops"]
        row["gb_per_s"] = case.least_bytes / milliseconds / 1e6
    timed = {row["provider"]: row["ms"] for row in rows if "ms" in row}
    others = [value for name, value in timed.items() if name != "vlmkern"]
    if "vlmkern" in timed and others:
        next(row for row in rows if row["provider"] == "vlmkern")["x_best_other"] = min(others) / timed["vlmkern"]
    return rows


def forward(case: Case, provider: Callable[..., Any]) -> Callable[[], list[Tensor]]:
    """A call that gives the result."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return results(provider(*case.inputs))

    return call


def backward(case: Case, provider: Callable[..., Any]) -> Callable[[], list[Tensor]]:
    """A call that gives the gradients by inputs and weights, of a forward that was run before."""
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    out = results(provider(*leaves))
    grads = [torch.ones_like(x) for x in out]
    return lambda: list(torch.autograd.grad(out, [*leaves, *case.weights], grads, retain_graph=True))


def results(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """What a provider gives, as a list."""
    return [out] if isinstance(out, Tensor) else list(out)


def wide_result(case: Case, mode: str) -> list[Tensor]:
    """What the first provider gives for the same values in float32."""
    provider = next(iter(case.providers.values()))
    narrow = [(x, x.data) for x in case.weights]
    modules = [provider] if isinstance(provider, torch.nn.Module) else []
    dtype = case.inputs[0].dtype
    for module in modules:
        module.float()
    for x, data in narrow:
        x.data = data.float()
    try:
        wide = Case(case.name, [x.float() for x in case.inputs], case.providers, 0, 0, case.weights)
        return (forward if mode == "fwd" else backward)(wide, provider)()
    finally:
        for module in modules:
            module.to(dtype)
        for x, data in narrow:
            x.data = data


def peak_memory(call: Callable[[], Any]) -> float:
    """MiB that one call allocates beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def device_times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, in turn, after the L2 cache was overwritten."""
    replays = {name: captured(call) for name, call in calls.items()}
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, replay in replays.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call's CUDA graph, or the call itself where it cannot be captured."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def table(case: Case, mode: str, rows: list[dict[str, Any]]) -> Table:
    """One case's providers, fastest first."""
    shown = Table(title=f"{case.name} {mode}", title_justify="left")
    shown.add_column("provider", no_wrap=True)
    for heading in ("us", "TFLOP/s", "of matmul", "GB/s", "peak MiB", "error", "x best other"):
        shown.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: row.get("ms", float("inf"))):
        if "ms" not in row:
            shown.add_row(row["provider"], f"[dim]{row['unavailable'][:60]}[/]")
            continue
        shown.add_row(
            row["provider"],
            f"{row['ms'] * 1e3:.1f}",
            f"{row['tflops']:.0f}",
            f"{row['of_matmul_peak']:.0%}",
            f"{row['gb_per_s']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['relative_error']:.0e}",
            f"{row['x_best_other']:.2f}" if "x_best_other" in row else "",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
