"""The report's pictures, drawn from its data; each is 1,000 pixels wide."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# colours that differ in brightness too, for those who do not see them all
OURS, OTHERS = "#c2410c", ("#1e3a8a", "#60a5fa", "#0f766e", "#a3a3a3", "#7c3aed")
UNPOOLED, POOLED = "#1e3a8a", "#c2410c"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "legend.frameon": False,
}


def roofline(cases: list[dict[str, Any]], roofs: dict[str, Any], path: Path) -> None:
    """Every case of vlmkern under the roofs of the machine: `peaks` GFLOP/s by dtype, `copy` GB/s."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), sharey=True, layout="constrained")
        suites = sorted({case["suite"] for case in cases})
        marks = dict(zip(suites, "osD^vPX*<>hp", strict=False))
        for axis, (dtype, peak) in zip(axes, roofs["peaks"].items(), strict=True):
            x = [0.1 * 1.2**i for i in range(80)]
            axis.loglog(x, [min(peak, roofs["copy"] * value) for value in x], color="#404040", linewidth=1.5)
            axis.text(x[-1], peak * 1.06, f"{peak:.0f} GFLOP/s", ha="right", va="bottom", color="#404040")
            ridge = 0.3
            axis.text(
                ridge,
                roofs["copy"] * ridge * 1.25,
                f"{roofs['copy']:.0f} GB/s",
                rotation=38,
                va="bottom",
                color="#404040",
            )
            for suite in suites:
                found = [c for c in cases if c["suite"] == suite and c["dtype"] == dtype and c["least_bytes"]]
                axis.plot(
                    [c["flops"] / c["least_bytes"] for c in found],
                    [c["gflops"] for c in found],
                    marks[suite],
                    label=suite,
                    markersize=6,
                    alpha=0.8,
                )
            axis.set(title=dtype, xlabel="FLOPs per byte that must be moved", xlim=(0.1, 5e4), ylim=(1, 8 * peak))
        axes[0].set_ylabel("GFLOP/s, one thread")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        figure.suptitle("vlmkern's kernels under the roofs of this machine (forms that do less work may stand above)")
        _save(figure, path)


def providers(groups: list[dict[str, Any]], path: Path) -> None:
    """Time of each provider over vlmkern's, a panel a dtype, a group of bars a case."""
    by_dtype: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        by_dtype[group["dtype"]].append(group)
    names = list(dict.fromkeys(name for group in groups for name in group["milliseconds"] if name != "vlmkern"))
    colours = dict(zip(names, OTHERS * 3, strict=False))
    rows = max(len(found) for found in by_dtype.values())
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(by_dtype), figsize=(10, 1.6 + 0.36 * rows), layout="constrained", squeeze=False
        )
        for axis, (dtype, found) in zip(axes[0], by_dtype.items(), strict=True):
            for row, group in enumerate(found):
                ours = group["milliseconds"]["vlmkern"]
                others = {n: t / ours for n, t in group["milliseconds"].items() if n != "vlmkern"}
                for index, (name, ratio) in enumerate(others.items()):
                    height = 0.8 / len(others)
                    axis.barh(row - 0.4 + (index + 0.5) * height, ratio, height, color=colours[name], label=name)
            axis.axvline(1, color=OURS, linewidth=2, label="vlmkern")
            axis.set_yticks(range(len(found)), [group["label"] for group in found], fontsize=7)
            axis.set(title=dtype, xlabel="times vlmkern's CPU time", xlim=(0, None), ylim=(len(found) - 0.4, -0.6))
            axis.grid(axis="y", visible=False)
        handles = {
            label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7)
        _save(figure, path)


def tiles(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens, prefill FLOPs, cache and total over tiles, unpooled and pooled."""
    panels = (
        ("visual_tokens", "visual tokens", 1),
        ("prefill_flops", "prefill, TFLOP", 1e12),
        ("kv_cache_bytes", "KV cache, GB", 1e9),
        ("total_flops", "total, TFLOP", 1e12),
    )
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(10, 3.2), layout="constrained")
        for axis, (quantity, title, unit) in zip(axes, panels, strict=True):
            found = [row for row in rows if row["quantity"] == quantity]
            x = [row["tiles"] for row in found]
            for key, colour in (("unpooled", UNPOOLED), ("pooled", POOLED)):
                axis.plot(x, [row[key] / unit for row in found], color=colour, label=key)
            twelve = next(row for row in found if row["tiles"] == 12)
            axis.axvline(12, color="#a3a3a3", linewidth=0.8, linestyle=":")
            axis.text(12.5, axis.get_ylim()[1] * 0.92, f"{twelve['ratio']:.2f}x at 12", fontsize=8)
            axis.set(title=title, xlabel="tiles", ylim=(0, None))
        axes[0].legend(loc="center left")
        _save(figure, path)


def scaling(curves: list[dict[str, Any]], path: Path) -> None:
    """Cost over size, both logarithmic, with the fitted exponents."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
        for axis, curve in zip(axes.flat, curves, strict=False):
            axis.loglog(curve["x"], curve["y"], "o-", color=OURS, markersize=3.5)
            axis.set(xlabel=curve["unit_x"], ylabel=curve["unit_y"])
            axis.set_title(f"{textwrap.fill(curve['what'], 40)}\nexponent {curve['exponent']:.2f}", fontsize=8.5)
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                scale.set_minor_formatter(NullFormatter())
        for axis in list(axes.flat)[len(curves) :]:
            axis.set_visible(False)
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
