"""The report's tables and pictures from small saved results: whatever `make bench` saves can be drawn."""

from __future__ import annotations

import json

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

import figures
import make_report
import scaling
from jinja2 import Environment, FileSystemLoader

from vlmkern.efficiency import efficiency_rows, sweep_rows


def case(suite, shape, dtype, provider, seconds, **extra):
    return {
        "group": f"{suite}|{shape}|{dtype}",
        "stats": {"median": seconds},
        "extra_info": {"provider": provider, "flops": 1e9, "least_bytes": 1e7, **extra},
    }


@pytest.fixture
def groups():
    rates = {"gflops_per_s": 90.0, "of_peak": 0.5, "peak_mib": 12.0}
    return make_report.grouped(
        [
            case("attention fwd", "one_tile", dtype, provider, seconds, **(rates if provider == "vlmkern" else {}))
            for dtype in ("float32", "bfloat16")
            for provider, seconds in (("eager", 0.03), ("compile", 0.02), ("vlmkern", 0.01))
        ]
        + [case("launch overhead", "attention", "bfloat16", "vlmkern", 15e-6, flops=0)]
    )


def test_tables(groups):
    (row, _) = make_report.times_table(groups)["rows"]
    assert row == ["attention fwd, one tile", "float32", "10.00", "20.00 (compile)", "2.00", "50%", "12"]
    assert make_report.peaks(groups) == {"float32": 180.0, "bfloat16": 180.0}
    assert len(make_report.efficiency_table(efficiency_rows(12, measure=False))["rows"]) == 12
    assert [row[0] for row in make_report.sweep_table(sweep_rows(3))["rows"]] == ["1", "2", "3"]


def test_pictures_are_a_thousand_pixels_wide(groups, tmp_path):
    roofs = {"peaks": make_report.peaks(groups), "copy": 30.0}
    figures.roofline(make_report.ours(groups), roofs, tmp_path / "roofline.png")
    figures.providers([g for g in groups if len(g["milliseconds"]) > 1], tmp_path / "providers.png")
    figures.tiles(sweep_rows(13), tmp_path / "tiles.png")
    figures.scaling(scaling._flops(), tmp_path / "scaling.png")
    for name in ("roofline", "providers", "tiles", "scaling"):
        assert Image.open(tmp_path / f"{name}.png").width == 1000


def test_exponents():
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    vision, prefill = scaling._flops()
    assert vision["exponent"] == pytest.approx(1, abs=1e-6) and 1 < prefill["exponent"] < 1.2


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_pages(groups, name):
    names = ("roofline", "providers", "tiles", "scaling", "tiling")
    table = make_report.times_table(groups)
    content = {"times": table, "efficiency": table, "sweep": table, "savings": table, "curves": table}
    pages = Environment(loader=FileSystemLoader(make_report.HERE / "templates"), trim_blocks=True, lstrip_blocks=True)
    text = pages.get_template(name).render(
        machine=[("torch", "2")], images={name: f"{name}.png" for name in names}, **content
    )
    assert all(f"{name}.png" in text for name in names) and "20.00 (compile)" in text
    json.dumps(text)
