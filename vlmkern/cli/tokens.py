"""`vlmkern tokens`: how many tokens a picture takes, in one system or in all of them side by side."""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..efficiency import SYSTEMS
from ..efficiency.pictures import plan_views
from ..images import load_image
from ..models._shared.views import ViewPlan
from ..models.jina_vlm import JinaVLMImageProcessor

_OWN = "jina-vlm"


def run(options: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    """Prints the counts as a table, unless they are wanted as JSON; draws them where a file is given."""
    if options.model not in (_OWN, "all") and options.max_crops is not None:
        raise ValueError(f"--max-crops: got {options.max_crops} with --model {options.model}, expected jina-vlm or all")
    if options.option and options.model == "all":
        raise ValueError("--option: got --model all, expected one model")
    settings = dict(options.option or ())
    if options.max_crops is not None:
        settings["max_crops"] = options.max_crops
    image = load_image(options.image)
    if options.model == _OWN:
        return _one_of_jina_vlm(image, settings, options)
    plans = _plans(image, settings, options.model)
    if options.picture is not None:
        from ..models._shared.view_picture import draw_views

        draw_views(image, plans, options.picture)
    if not options.json:
        _print(plans)
    counts = [plan.describe() for plan in plans]
    return counts if options.model == "all" else counts[0]


def _plans(image: Image.Image, settings: dict[str, Any], model: str) -> list[ViewPlan]:
    if model != "all":
        return [plan_views(model, *image.size, **settings)]
    return [plan_views(name, *image.size, **(settings if name == _OWN else {})) for name in SYSTEMS]


def _one_of_jina_vlm(image: Image.Image, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    # refuses what is no option of it
    plan_views(_OWN, *image.size, **settings)
    processor = JinaVLMImageProcessor(**settings)
    counts = processor.describe(*image.size)
    if options.picture is not None:
        from ..models.jina_vlm.tiling_picture import draw_tiling

        draw_tiling(image, processor, options.picture)
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


def _print(plans: list[ViewPlan]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for header in ("views", "patches", "image tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("as the tower sees it")
    notes = []
    for plan in plans:
        table.add_row(plan.model, f"{len(plan.views):,}", f"{plan.patches:,}", f"{plan.image_tokens:,}", plan.summary)
        if plan.padded_patches is not None and plan.padded_patches > plan.patches:
            waste = 1 - plan.patches / plan.padded_patches
            notes.append(f"{plan.model} in transformers: {plan.padded_patches:,} patches, {waste:.1%} of them padding")
    console = Console()
    console.print(Text(f"A picture of {plans[0].width:,} x {plans[0].height:,} px", style="bold"))
    console.print(table)
    for note in notes:
        console.print(Text(note, style="dim"))
