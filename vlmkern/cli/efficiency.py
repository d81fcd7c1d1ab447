"""`vlmkern efficiency`: the paper's table, or what one picture costs one released model."""

from __future__ import annotations

import argparse
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..efficiency import efficiency_rows, picture_efficiency, render, render_sweep, sweep_rows
from ..efficiency.costs import LANGUAGE_PARTS, TEXT_TOKENS, VISION_PARTS

_LABELS = {
    "patch_embed": "patch embedding",
    "encoder_proj": "encoder projections",
    "encoder_attention": "encoder attention",
    "encoder_mlp": "encoder MLPs",
    "connector": "connector",
    "language_proj": "language projections",
    "language_attention": "language attention",
    "language_mlp": "language MLPs",
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the figures as tables, unless they are wanted as JSON."""
    if options.model is None:
        for name, value in (("--image", options.image), ("--option", options.option), ("--padded", options.padded)):
            if value:
                raise ValueError(f"{name}: got no --model beside it, expected one")
        return _table(options)
    for name, value in (("--tiles", options.tiles), ("--sweep", options.sweep)):
        if value is not None:
            raise ValueError(f"{name}: got {value} with --model, expected --image WIDTHxHEIGHT alone")
    if options.image is None:
        raise ValueError("--model: got no --image beside it, expected --image WIDTHxHEIGHT")
    report = picture_efficiency(options.model, *options.image, padded=options.padded, **dict(options.option or ()))
    if not options.json:
        _print(report)
    return report


def _table(options: argparse.Namespace) -> dict[str, Any]:
    tiles = 12 if options.tiles is None else options.tiles
    report: dict[str, Any] = {"tiles": tiles, "rows": efficiency_rows(tiles)}
    if options.sweep is not None:
        report["sweep"] = sweep_rows(options.sweep)
    if not options.json:
        console = Console()
        console.print(render(report["rows"]))
        if options.sweep is not None:
            Console(width=max(120, console.width)).print(render_sweep(report["sweep"]))
    return report


def _print(report: dict[str, Any]) -> None:
    total = report["vision_flops"] + report["language_flops"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True, min_width=24)
    table.add_column("TFLOP", justify="right", no_wrap=True, min_width=10)
    table.add_column("share", justify="right", no_wrap=True, min_width=8)

    def add(label: str, flops: int, style: str | None = None) -> None:
        table.add_row(label, f"{flops / 1e12:,.3f}", f"{flops / total:.1%}", style=style)

    for whole, parts in (("vision", VISION_PARTS), ("language", LANGUAGE_PARTS)):
        for part in parts:
            add(_LABELS[part], report["flops"][part])
        add(whole, report[f"{whole}_flops"], style="bold")
        table.add_section()
    add("total", total, style="bold")
    console = Console()
    size = f"{report['width']:,} x {report['height']:,} px, {report['image_tokens']:,} image tokens"
    console.print(Text(f"{report['model']}: a picture of {size}", style="bold"))
    console.print(table)
    kept = f"{report['kv_cache_bytes'] / 1e6:,.1f} MB"
    console.print(Text(f"with {TEXT_TOKENS} tokens of text; the picture's keys and values take {kept}", style="dim"))
