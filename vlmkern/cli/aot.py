"""`vlmkern aot`: what every Triton kernel compiles to, for a target that need not be there."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import aot, tune

# measured on one: 8192^3 bf16 products of random data, and device-to-device copies counting reads and writes
_MATMUL_TFLOPS, _COPY_TB = 790, 4.3


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a table a target, unless JSON is wanted: the rows of `vlmkern.aot.report`."""
    archs = aot.ARCHS if options.arch is None else (options.arch,)
    tasks = aot.jobs(archs, options.kernel)
    if options.json:
        return aot.report(tasks)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Compiling", total=len(tasks))
        rows = aot.report(tasks, lambda row: progress.advance(bar))
    console = Console()
    console = Console(width=max(190, console.width))
    for arch in archs:
        console.print(_table(arch, [row for row in rows if row["arch"] == arch]))
    console.print("Read from compiled binaries: nothing here was timed. * compared with, not shipped.")
    console.print(_floors(options.kernel))
    return rows


def _floors(name: str | None) -> Table:
    """The least time of each kernel's work on an H200, by arithmetic: no kernel beats the longer of the two."""
    table = Table(
        title=f"Floors on an H200, bfloat16, 13 crops: {_MATMUL_TFLOPS} TFLOP/s of matrix products, {_COPY_TB} TB/s",
        title_justify="left",
    )
    table.add_column("kernel", no_wrap=True)
    table.add_column("shape")
    for heading in ("GFLOP", "least MB", "us by FLOPs", "us by bytes"):
        table.add_column(heading, justify="right")
    for kernel in tune.kernels(name):
        flops, least = kernel.cost(2, **kernel.shape)
        table.add_row(
            kernel.name,
            shape_text(kernel.shape),
            f"{flops / 1e9:.1f}",
            f"{least / 1e6:.1f}",
            f"{flops / _MATMUL_TFLOPS / 1e6:.1f}",
            f"{least / _COPY_TB / 1e6:.1f}",
        )
    return table


def _table(arch: int, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"sm_{arch}", title_justify="left")
    for heading in ("kernel", "dtype", "shape", "config"):
        table.add_column(heading, no_wrap=heading != "shape")
    for heading in ("regs", "spills", "shared", "CTAs/SM", "instr.", "TMA", "cp.async"):
        table.add_column(heading, justify="right")
    table.add_column("matrix instructions", overflow="fold")
    for row in rows:
        table.add_row(
            row["kernel"] + ("" if row["shipped"] else " *"),
            {"bfloat16": "bf16", "float32": "fp32"}[row["dtype"]],
            shape_text(row["shape"]),
            config_text(row["config"]),
            str(row["registers"]),
            str(row["spill_bytes"] or "-"),
            f"{row['shared_bytes'] / 1024:.0f}K",
            str(row["ctas_per_sm"]),
            str(row["instructions"]),
            str(row["tma"] or "-"),
            str(row["cp_async"] or "-"),
            " ".join(f"{name.split('.F32')[0]}:{count}" for name, count in row["mma"].items()) or "-",
        )
    return table


def shape_text(values: dict[str, Any]) -> str:
    """Keys and values."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def config_text(config: dict[str, Any]) -> str:
    """Blocks, then w(arps), s(tages) and r(egisters at most)."""
    short = {"num_warps": "w", "num_stages": "s", "maxnreg": "r"}
    blocks = "x".join(str(value) for key, value in config.items() if key.startswith("BLOCK"))
    flags = [key for key, value in config.items() if value is True]
    return " ".join([blocks, *flags, *(f"{mark}{config[key]}" for key, mark in short.items() if key in config)])
