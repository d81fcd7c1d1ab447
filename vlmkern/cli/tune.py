"""`vlmkern tune`: the fastest configurations on the GPU of this machine, into the tables."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import tune
from .aot import config_text, shape_text


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tunes and writes table after table; prints each, unless JSON is wanted, which is the tables' content."""
    arch, found = tune.device_arch(), tune.kernels(options.kernel)
    console, source, written = Console(stderr=options.json), tune.source(), []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Tuning", total=len(found))
        for kernel in found:
            progress.update(bar, description=kernel.name)
            shown = Table("shape", "fastest", title=f"{kernel.name}, sm_{arch}", title_justify="left")
            shown.add_column("us", justify="right")
            shown.add_column("x slowest", justify="right")
            shown.add_column("ran", justify="right")

            def add(shape: dict[str, int], bits: int, timed: list[tune.Timed], shown: Table = shown) -> None:
                ran = [entry for entry in timed if entry.milliseconds is not None]
                fastest = ran[0] if ran else None
                shown.add_row(
                    f"{bits} bits, {shape_text(shape)}",
                    config_text(fastest.config) if fastest else "none ran: the default stays",
                    f"{fastest.milliseconds * 1e3:.1f}" if fastest else "",
                    f"{ran[-1].milliseconds / fastest.milliseconds:.1f}" if fastest else "",
                    f"{len(ran)}/{len(timed)}",
                )

            table = tune.tune(kernel, arch, source, done=add)
            tune.write(table)
            written.append(table)
            console.print(shown)
            progress.advance(bar)
    return written
