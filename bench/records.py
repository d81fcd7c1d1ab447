"""What benchmark runs found, kept for each CPU: bench/results/<cpu>-<date>.json, and the tables made from those files.

    python bench/records.py save bench/out/latest.json     one file of this run's rows
    python bench/records.py tables                         README.md and docs/performance.md anew, between their marks

A row that a run did not measure keeps its last figure, with that run's date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from peers import PEERS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
Found = dict[str, dict[tuple[str, str, str], dict[str, Any]]]
"""By CPU's name, and then by suite, shape and dtype: a row."""

DEFAULTS = ("sdpa", "transformers", "transformers_sdpa", "eager")
"""Providers that are torch as it comes."""

HIGHLIGHTS = {
    "attention, SigLIP, 1 tile (16 heads x 72, 729 tokens)": ("attention fwd", "siglip_so400m_1_tile"),
    "attention, InternViT (16 x 64, 1,025 tokens)": ("attention fwd", "internvit_300m_1_tile"),
    "attention, Qwen2-VL (16 x 80, 3,996 tokens)": ("attention fwd", "qwen2_vl_image"),
    "attention, causal, 1,744 tokens (16 heads on 8 x 128)": ("attention fwd", "qwen3_1_7b_prefill_1744"),
    "attention's gradients, SigLIP, 1 tile": ("attention bwd", "siglip_so400m_1_tile"),
    "attention pooling, 16 heads, 784 windows": ("attention_pool fwd", "jina_vlm_4_tiles"),
    "attention pooling, one head (the paper's form), 784 windows": ("attention_pool fwd", "jina_vlm_paper_4_tiles"),
    "SwiGLU 1152-6144-2048, 1 row": ("swiglu_mlp fwd", "projector_1"),
    "SwiGLU, 784 rows": ("swiglu_mlp fwd", "projector_784"),
    "SwiGLU's gradients, 196 rows": ("swiglu_mlp bwd", "projector_196"),
    "SigLIP block, 2 tiles, against transformers": ("siglip block fwd", "2_tiles"),
    "transformers' SiglipVisionModel after `patch`, 1 image": ("SiglipVisionModel, patched", "1_image"),
    "prefill, 1,744 tokens, 4 layers, against transformers' Qwen3": ("prefill", "qwen3_1_7b_4_layers_1744_tokens"),
    "one decoded token, 1,744 cached, 4 layers": ("decode", "qwen3_1_7b_4_layers_1744_cached"),
}
"""The README's rows: what they are called there, and their suite and shape."""

# CPUID's vendor, family and models: Intel's and AMD's lists of processors
_CPUS = (
    ("AuthenticAMD", 25, range(0x10, 0x20), "amd-zen4", "AMD Zen 4"),
    ("AuthenticAMD", 25, range(0xA0, 0xB0), "amd-zen4", "AMD Zen 4"),
    ("AuthenticAMD", 26, range(0x100), "amd-zen5", "AMD Zen 5"),
    ("GenuineIntel", 6, (0x8F,), "intel-sapphire-rapids", "Intel Sapphire Rapids"),
    ("GenuineIntel", 6, (0xCF,), "intel-emerald-rapids", "Intel Emerald Rapids"),
    ("GenuineIntel", 6, (0xAD, 0xAE), "intel-granite-rapids", "Intel Granite Rapids"),
    ("GenuineIntel", 6, (0x6A, 0x6C), "intel-ice-lake", "Intel Ice Lake"),
)


def cpu(info: dict[str, Any], isa: str, held_to: str = "") -> tuple[str, str]:
    """A short name for files and one to read, of what py-cpuinfo says of a processor, the instructions in use, and what
    oneDNN is held to."""
    if held_to:
        short, name = cpu(info, isa)
        return f"{short}-held", f"{name} (oneDNN held to {held_to})"
    for vendor, family, models, short, name in _CPUS:
        if info.get("vendor_id_raw") == vendor and info.get("family") == family and info.get("model") in models:
            return f"{short}-{isa}", f"{name}, {isa}"
    brand = info.get("brand_raw", "CPU")
    short = re.sub(r"[^a-z0-9]+", "-", brand.lower()).strip("-")
    return f"{short}-{isa}", f"{brand}, {isa}"


def summary(saved: dict[str, Any]) -> dict[str, Any]:
    """A run's rows, from what pytest-benchmark saved of it."""
    machine = saved["machine_info"]
    short, name = cpu(machine["cpu"], machine["isa"], machine.get("held_to", ""))
    groups = by_group(saved["benchmarks"])
    return {
        "cpu": short,
        "name": name,
        "date": saved["datetime"][:10],
        "torch": machine["torch"],
        "vlmkern": machine["vlmkern"],
        "source": "make bench",
        "rows": [_row(group, cases) for group, cases in groups.items() if "vlmkern" in cases and len(cases) > 1],
    }


def by_group(benchmarks: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Saved cases by group and provider."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for case in benchmarks:
        found[case["group"]][case["extra_info"]["provider"]] = case
    return found


def _row(group: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    suite, shape, dtype = group.split("|")
    ours, info = cases["vlmkern"]["stats"]["median"], cases["vlmkern"]["extra_info"]
    times = best_of(cases)
    row = {
        "suite": suite,
        "shape": shape,
        "dtype": dtype,
        "ms": round(ours * 1e3, 3),
        "of_peak": round(info["of_peak"], 3),
        "error": float(f"{info['relative_error']:.2g}"),
        "peak_mib": info["peak_mib"],
        "x_best": None,
        "best": None,
        "x_default": None,
    }
    if times:
        row["best"] = min(times, key=lambda name: times[name])
        row["x_best"] = round(times[row["best"]] / ours, 3)
    default = next((cases[name]["stats"]["median"] for name in DEFAULTS if name in cases), None)
    if default is not None:
        row["x_default"] = round(default / ours, 3)
    for name in PEERS:
        if name in cases and cases[name]["extra_info"].get("comparable", True):
            row[f"x_{name}"] = round(cases[name]["stats"]["median"] / ours, 3)
    return row


def best_of(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of torch's ways to compute a case, those that are accurate enough to be compared with."""
    return {
        name: case["stats"]["median"]
        for name, case in cases.items()
        if name not in ("vlmkern", *PEERS) and case["extra_info"].get("comparable", True)
    }


def save(path: Path, folder: Path = RESULTS) -> Path:
    """Writes the rows of a saved run, over those that the same day has of the same CPU already; returns the file."""
    found = summary(json.loads(path.read_text(encoding="utf-8")))
    file = folder / f"{found['cpu']}-{found['date']}.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))["rows"]
        now = {_key(row) for row in found["rows"]}
        found["rows"] = [row for row in before if _key(row) not in now] + found["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    # a row a line: differences between runs can be read
    rows = ",\n  ".join(json.dumps(row) for row in found.pop("rows"))
    head = json.dumps(found, indent=1)[:-2]
    file.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
    return file


def latest(folder: Path = RESULTS) -> Found:
    """By CPU's name, and then by suite, shape and dtype: the newest row, with its run's date."""
    found: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = defaultdict(dict)
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    for run in sorted(runs, key=lambda run: run["date"]):
        for row in run["rows"]:
            found[run["name"]][_key(row)] = row | {"date": run["date"], "source": run["source"]}
    return {name: found[name] for name in sorted(found)}


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["suite"], row["shape"], row["dtype"]


def side_by_side(found: Found, cases: dict[str, tuple[str, str]]) -> str:
    """Markdown: how many times as fast as the best of torch, a row for each of the named cases, two columns a CPU."""
    head = ["case", *(f"{name}: {dtype}" for name in found for dtype in ("bf16", "fp32"))]
    lines = [_line(head), _line(["---", *["--:"] * (len(head) - 1)])]
    for label, (suite, shape) in cases.items():
        cells = [label]
        for rows in found.values():
            for dtype in ("bfloat16", "float32"):
                row = rows.get((suite, shape, dtype), {})
                cells.append(_times(row.get("x_best")))
        lines.append(_line(cells))
    return "\n".join(lines)


def full(rows: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """Markdown: all that one CPU's rows have."""
    peers = [name for name in PEERS if any(row.get(f"x_{name}") for row in rows.values())]
    head = ["case", "dtype", "ms", "x default", "x best", "best", *(f"x {name}" for name in peers)]
    head += ["of peak", "error", "measured"]
    lines = [_line(head), _line(["---", "---", *["--:"] * 3, "---", *["--:"] * (len(peers) + 2), "---"])]
    for (suite, shape, dtype), row in rows.items():
        cells = [_label(suite, shape), dtype, "" if row.get("ms") is None else f"{row['ms']:,.2f}"]
        cells += [_times(row.get("x_default")), _times(row.get("x_best")), row.get("best") or ""]
        cells += [_times(row.get(f"x_{name}")) for name in peers]
        cells.append("" if row.get("of_peak") is None else f"{row['of_peak']:.0%}")
        cells.append("" if row.get("error") is None else f"{row['error']:.0e}")
        lines.append(_line([*cells, row["date"]]))
    return "\n".join(lines)


def _cases(found: Found) -> dict[str, tuple[str, str]]:
    return {_label(suite, shape): (suite, shape) for rows in found.values() for suite, shape, _ in rows}


def _label(suite: str, shape: str) -> str:
    return f"{suite}, {shape.replace('_', ' ')}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(path: Path, name: str, text: str) -> None:
    """Puts text between a file's marks `<!-- NAME -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path}: expected the marks {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def tables() -> dict[str, str]:
    """The generated parts of the documents by their marks' name."""
    found = latest()
    pages = []
    for name, rows in found.items():
        sources = sorted({f"{row['source']}, {row['date']}" for row in rows.values()})
        pages.append(f"## {name}\n\n{'; '.join(sources)}\n\n{full(rows)}")
    # a CPU whose instructions were held back stands for others, but is none
    whole = {name: rows for name, rows in found.items() if "held to" not in name}
    return {
        "speed highlights": side_by_side(whole, HIGHLIGHTS),
        "speed by CPU": side_by_side(found, _cases(found)),
        "speed in full": "\n\n".join(pages),
    }


def main(arguments: list[str]) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("save", help="keep a run").add_argument("run", type=Path)
    commands.add_parser("tables", help="write the documents' tables anew")
    options = parser.parse_args(arguments)
    if options.command == "save":
        print(save(options.run).relative_to(ROOT))
        return 0
    text = tables()
    write(ROOT / "README.md", "speed highlights", text["speed highlights"])
    for name in ("speed by CPU", "speed in full"):
        write(ROOT / "docs" / "performance.md", name, text[name])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
