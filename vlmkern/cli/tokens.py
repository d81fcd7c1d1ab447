"""`vlmkern tokens`: how many tokens a picture takes."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from ..images import load_image
from ..models.jina_vlm import JinaVLMImageProcessor


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the counts as a table, unless they are wanted as JSON."""
    image = load_image(options.image)
    counts = JinaVLMImageProcessor(max_crops=options.max_crops).describe(*image.size)
    if not options.json:
        rows, cols = counts["tiling"]
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in (
            ("picture", f"{counts['width']} x {counts['height']} px"),
            ("tiling", f"{rows} x {cols} (rows x columns)"),
            ("crops", f"{counts['crops']:,} (tiles and thumbnail)"),
            ("windows pooled", f"{counts['kept_windows']:,} of {counts['pooled_windows']:,}"),
            ("patch tokens", f"{counts['patch_tokens']:,}"),
            ("tokens in all", f"{counts['total_tokens']:,}"),
        ):
            table.add_row(name, value)
        Console().print(table)
    return counts
