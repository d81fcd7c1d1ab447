"""Writes bench/report/: figures, a Markdown page and one self-contained HTML page, from the last `make bench` and from
what is measured and counted here. Nothing in it is typed by hand: python bench/make_report.py [bench/out/latest.json]
"""

from __future__ import annotations

import base64
import json
import platform
import sys
import time
from collections import defaultdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import figures
import torch
from jinja2 import Environment, FileSystemLoader
from peers import PEERS
from rich.console import Console
from savings import savings
from scaling import TILES, scaling

from vlmkern.efficiency import efficiency_rows, sweep_rows
from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor
from vlmkern.models.jina_vlm.tiling_picture import draw_tiling

HERE = Path(__file__).parent
Table = dict[str, Any]


def main() -> int:
    """Measures, draws, writes; returns the exit status."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "out" / "latest.json")
    console, folder = Console(stderr=True), HERE / "report"
    folder.mkdir(exist_ok=True)
    saved = json.loads(source.read_text(encoding="utf-8"))
    groups = grouped(saved["benchmarks"])
    with console.status("counting FLOPs"):
        rows, sweep = efficiency_rows(12), sweep_rows(TILES)
    with console.status("measuring what is left out (a minute)"):
        left_out = savings()
    with console.status("measuring growth (half a minute)"):
        curves = scaling()
    with console.status("drawing"):
        figures.roofline(ours(groups), {"peaks": peaks(groups), "copy": copy_gb_per_s()}, folder / "roofline.png")
        figures.providers([g for g in groups if len(g["milliseconds"]) > 1], folder / "providers.png")
        figures.tiles(sweep, folder / "tiles.png")
        figures.scaling(curves, folder / "scaling.png")
        draw_photograph(folder / "tiling.png")
    content = {
        "machine": machine(saved["machine_info"]),
        "times": times_table(groups),
        "efficiency": efficiency_table(rows),
        "sweep": sweep_table([row for row in sweep if row["tiles"] <= 16]),
        "savings": savings_table(left_out),
        "curves": curves_table(curves),
    }
    pages = Environment(loader=FileSystemLoader(HERE / "templates"), trim_blocks=True, lstrip_blocks=True)
    names = ("roofline", "providers", "tiles", "scaling", "tiling")
    images = {name: f"{name}.png" for name in names}
    (folder / "report.md").write_text(
        pages.get_template("report.md").render(**content, images=images), encoding="utf-8"
    )
    inline = {
        name: "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode()
        for name, file in images.items()
    }
    page = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True)
    (folder / "report.html").write_text(
        page.get_template("report.html").render(**content, images=inline), encoding="utf-8"
    )
    console.print(f"written: {folder}/report.md, report.html and {len(names)} pictures")
    return 0


def grouped(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved cases by suite, shape and dtype, those that vlmkern is among."""
    found: dict[tuple[str, str, str], dict[str, Any]] = defaultdict(dict)
    for case in benchmarks:
        suite, shape, dtype = case["group"].split("|")
        found[suite, shape, dtype][case["extra_info"]["provider"]] = case
    return [
        {
            "suite": suite,
            "shape": shape,
            "dtype": dtype,
            "label": f"{suite}, {shape.replace('_', ' ')}",
            "milliseconds": {
                name: case["stats"]["median"] * 1e3
                for name, case in cases.items()
                if case["extra_info"].get("comparable", True)
            },
            "ours": cases["vlmkern"]["extra_info"],
        }
        for (suite, shape, dtype), cases in found.items()
        if "vlmkern" in cases
    ]


def ours(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the roofline shows."""
    return [
        {
            "suite": group["suite"],
            "dtype": group["dtype"],
            "flops": group["ours"]["flops"],
            "least_bytes": group["ours"].get("least_bytes", 0),
            "gflops": group["ours"]["gflops_per_s"],
        }
        for group in groups
        if group["ours"].get("gflops_per_s")
    ]


def peaks(groups: list[dict[str, Any]]) -> dict[str, float]:
    """The matrix-product rates that the saved run measured, GFLOP/s by dtype."""
    return {
        group["dtype"]: group["ours"]["gflops_per_s"] / group["ours"]["of_peak"]
        for group in groups
        if group["ours"].get("of_peak")
    }


def copy_gb_per_s() -> float:
    """Bytes read a second by one thread, from memory that no cache holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = torch.ones(2**27)
    times = []
    for _ in range(5):
        begin = time.process_time()
        data.sum()
        times.append(time.process_time() - begin)
    torch.set_num_threads(threads)
    return data.nbytes / min(times) / 1e9


def draw_photograph(path: Path) -> None:
    """The bundled photograph's tiles, kept windows and tokens."""
    with as_file(files("vlmkern") / "data" / "raccoon.jpg") as photograph:
        draw_tiling(photograph, JinaVLMImageProcessor(), path)


def machine(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values."""
    return [
        ("processor", info["cpu"].get("brand_raw", platform.processor())),
        ("instruction set in use", info["isa"]),
        ("torch", info["torch"]),
        ("vlmkern", info["vlmkern"]),
    ]


def times_table(groups: list[dict[str, Any]]) -> Table:
    """Milliseconds of vlmkern and of the best of torch, and what one call allocates."""
    rows = []
    for group in groups:
        others = {name: ms for name, ms in group["milliseconds"].items() if name not in ("vlmkern", *PEERS)}
        if not others:
            continue
        best = min(others, key=lambda name: others[name])
        mine = group["milliseconds"]["vlmkern"]
        rows.append(
            [
                group["label"],
                group["dtype"],
                f"{mine:.2f}",
                f"{others[best]:.2f} ({best})",
                f"{others[best] / mine:.2f}",
                f"{group['ours']['of_peak']:.0%}",
                f"{group['ours'].get('peak_mib', 0):.0f}",
            ]
        )
    return {"head": ["case", "dtype", "ms", "best other, ms", "ratio", "of peak", "peak MiB"], "rows": rows}


def efficiency_table(rows: list[dict[str, Any]]) -> Table:
    """The paper's table in three conventions."""
    return {
        "head": ["convention", "quantity", "unpooled", "pooled", "ratio", "source"],
        "rows": [
            [
                row["convention"],
                row["quantity"].replace("_", " "),
                _human(row["quantity"], row["unpooled"]),
                _human(row["quantity"], row["pooled"]),
                f"{row['ratio']:.3f}",
                row["source"],
            ]
            for row in rows
        ],
    }


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each number of tiles."""
    by_tiles: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_tiles[row["tiles"]][row["quantity"]] = row
    quantities = list(next(iter(by_tiles.values())))
    return {
        "head": ["tiles", *(f"{name.replace('_', ' ')}, pooled (unpooled / pooled)" for name in quantities)],
        "rows": [
            [str(tiles), *(f"{_human(name, r[name]['pooled'])} ({r[name]['ratio']:.2f})" for name in quantities)]
            for tiles, r in by_tiles.items()
        ],
    }


def savings_table(rows: list[dict[str, Any]]) -> Table:
    """FLOPs counted, CPU seconds measured."""
    return {
        "head": ["left out", "TFLOP with", "without", "CPU s with", "without", "saved"],
        "rows": [
            [
                row["what"],
                f"{row['flops_with'] / 1e12:.3f}",
                f"{row['flops_without'] / 1e12:.3f}",
                f"{row['seconds_with']:.2f}",
                f"{row['seconds_without']:.2f}",
                f"{1 - row['seconds_without'] / row['seconds_with']:.0%}",
            ]
            for row in rows
        ],
    }


def curves_table(curves: list[dict[str, Any]]) -> Table:
    """Fitted exponents."""
    return {
        "head": ["cost", "over", "from", "to", "exponent"],
        "rows": [[c["what"], c["unit_x"], f"{c['x'][0]:,}", f"{c['x'][-1]:,}", f"{c['exponent']:.2f}"] for c in curves],
    }


def _human(quantity: str, value: float) -> str:
    if quantity.endswith("_flops"):
        return f"{value / 1e12:.2f} TFLOP"
    return f"{value / 1e9:.3f} GB" if quantity.endswith("_bytes") else f"{value:,}"


if __name__ == "__main__":
    sys.exit(main())
