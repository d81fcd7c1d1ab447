"""The efficiency figures against the published table and its derivation, digit by digit."""

import functools
import io
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmkern.efficiency import (
    CONVENTIONS,
    QUANTITIES,
    Sizes,
    efficiency_rows,
    formulas,
    render,
    render_sweep,
    sweep_rows,
    token_layout,
)
from vlmkern.models.jina_vlm.tiling import MAX_TILES

SIZES = Sizes()
TILES = st.integers(min_value=1, max_value=60)


# what a run of the released assembly gives
MEASURED = {
    ("exact", "prefill_flops"),
    ("exact", "kv_cache_bytes"),
    *(("released", quantity) for quantity in QUANTITIES),
}


@functools.cache
def figures(tiles=12):
    return {(row["convention"], row["quantity"]): row for row in efficiency_rows(tiles, measure=tiles == 12)}


def tera(value):
    return value / 1e12


def test_rows_have_the_fixed_keys_in_the_fixed_order():
    rows = efficiency_rows()
    assert [(r["convention"], r["quantity"]) for r in rows] == [(c, q) for c in CONVENTIONS for q in QUANTITIES]
    for row in rows:
        assert set(row) == {"convention", "quantity", "unpooled", "pooled", "ratio", "source", "note"}
        assert row["source"] == ("measured" if (row["convention"], row["quantity"]) in MEASURED else "formula")
        assert row["ratio"] == row["unpooled"] / row["pooled"]
        assert isinstance(row["unpooled"], int) and isinstance(row["pooled"], int)


# the printed digits of the derivation: (convention, quantity, unpooled, pooled, ratio, unit, digits)
PINS = [
    ("paper", "visual_tokens", "9477", "2366", "4.005", 1, 0),
    ("paper", "prefill_flops", "27.218", "6.915", "3.936", 1e12, 3),
    ("paper", "kv_cache_bytes", "2.122848", "0.529984", "4.005", 1e9, 6),
    ("paper", "total_flops", "35.87", "15.57", "2.304", 1e12, 2),
    ("exact", "visual_tokens", "9477", "2366", "4.005", 1, 0),
    ("exact", "prefill_flops", "37.01", "7.31", "5.063", 1e12, 2),
    ("exact", "kv_cache_bytes", "1.087", "0.271", "4.005", 1e9, 3),
    ("exact", "total_flops", "46.18", "16.22", "2.847", 1e12, 2),
    ("released", "visual_tokens", "9477", "1744", "5.434", 1, 0),
    ("released", "prefill_flops", "37.01", "5.26", "7.031", 1e12, 2),
    ("released", "kv_cache_bytes", "1.087", "0.200", "5.434", 1e9, 3),
    ("released", "total_flops", "45.54", "13.55", "3.360", 1e12, 2),
]


@pytest.mark.parametrize("convention,quantity,unpooled,pooled,ratio,unit,digits", PINS)
def test_twelve_tiles_to_the_printed_digits(convention, quantity, unpooled, pooled, ratio, unit, digits):
    row = figures()[convention, quantity]
    assert f"{row['unpooled'] / unit:.{digits}f}" == unpooled
    assert f"{row['pooled'] / unit:.{digits}f}" == pooled
    assert f"{row['ratio']:.3f}" == ratio


def test_published_table_as_printed():
    rows = figures()
    printed = {
        "visual_tokens": ("9477", "2366", "4.0", 1, 0),
        "prefill_flops": ("27.2", "6.9", "3.9", 1e12, 1),
        "kv_cache_bytes": ("2.12", "0.53", "4.0", 1e9, 2),
    }
    for quantity, (unpooled, pooled, ratio, unit, digits) in printed.items():
        row = rows["paper", quantity]
        assert f"{row['unpooled'] / unit:.{digits}f}" == unpooled
        assert f"{row['pooled'] / unit:.{digits}f}" == pooled
        assert f"{row['ratio']:.1f}" == ratio
    assert f"{rows['paper', 'total_flops']['ratio']:.1f}" == "2.3"


def test_paper_prefill_is_decoder_weights_and_connector():
    assert formulas.decoder_linear_weights(SIZES) == 1_409_286_144
    assert f"{tera(formulas.decoder_linear_flops(SIZES, 9477)):.3f}" == "26.712"
    assert f"{tera(formulas.projector_flops(SIZES, 9477)):.3f}" == "0.507"
    assert f"{tera(formulas.decoder_linear_flops(SIZES, 2366)):.3f}" == "6.669"
    assert f"{tera(formulas.connector_flops(SIZES, windows=2366, slots=9477)):.3f}" == "0.246"


def test_tower_with_and_without_its_patch_embedding():
    blocks = formulas.tower_linear_flops(SIZES, 13, 27) + formulas.tower_attention_flops(SIZES, 13, 27)
    assert f"{tera(blocks):.3f}" == "8.651"
    assert f"{tera(blocks + formulas.patch_embedding_flops(SIZES, 13)):.3f}" == "8.664"
    assert f"{tera(formulas.tower_linear_flops(SIZES, 13, 27)):.2f}" == "7.79"


def test_full_square_attention_is_twice_the_causal_half():
    for tokens, full in ((9477, "47.3"), (2366, "7.95")):
        flops = formulas.decoder_linear_flops(SIZES, tokens) + 2 * formulas.decoder_attention_flops(SIZES, tokens)
        assert f"{tera(flops):.{len(full.split('.')[1])}f}" == full


def test_kv_bytes_per_token():
    assert formulas.kv_cache_bytes(SIZES, 1, kv_heads=16) == 224 * 1024
    assert formulas.kv_cache_bytes(SIZES, 1) == 112 * 1024
    assert formulas.kv_cache_bytes(SIZES, 9477, kv_heads=16) == 2_173_796_352
    assert f"{formulas.kv_cache_bytes(SIZES, 9477) / 2**30:.3f}" == "1.012"
    assert f"{formulas.kv_cache_bytes(SIZES, 2366) / 2**30:.3f}" == "0.253"
    assert "2.1738e9" in figures()["paper", "kv_cache_bytes"]["note"]


def test_released_total_with_every_block_is_in_its_note():
    note = figures()["released", "total_flops"]["note"]
    assert "46.18 and 14.19 TFLOP" in note and "25 of 27" in note


def test_released_notes_name_the_grid_and_the_cropped_patches():
    rows = figures()
    for quantity in QUANTITIES:
        assert "3 x 4 tiles" in rows["released", quantity]["note"]
    note = rows["released", "visual_tokens"]["note"]
    assert "6,189" in note and "3.66x" in note and "1,692 of 2,548" in note


@pytest.mark.parametrize(
    "tiling,crops,pooled,grid,kept,total",
    [
        ((1, 1), 2, 392, (14, 14), 392, 424),
        ((1, 3), 4, 784, (14, 34), 672, 704),
        ((2, 2), 5, 980, (24, 24), 772, 814),
        ((2, 3), 7, 1372, (24, 34), 1012, 1054),
        ((3, 3), 10, 1960, (34, 34), 1352, 1404),
        ((3, 4), 13, 2548, (34, 44), 1692, 1744),
        ((4, 3), 13, 2548, (44, 34), 1692, 1754),
        ((12, 1), 13, 2548, (124, 14), 1932, 2074),
    ],
)
def test_token_layout_of_the_released_processor(tiling, crops, pooled, grid, kept, total):
    layout = token_layout(SIZES, tiling)
    assert (layout.crops, layout.pooled_windows, layout.kept_grid) == (crops, pooled, grid)
    assert (layout.kept_windows, layout.total_tokens) == (kept, total)


@pytest.mark.parametrize(
    "tiles,grid", [(1, (1, 1)), (6, (2, 3)), (7, (1, 7)), (12, (3, 4)), (16, (4, 4)), (30, (5, 6))]
)
def test_most_square_grid(tiles, grid):
    assert formulas.most_square_grid(tiles) == grid
    assert f"{grid[0]} x {grid[1]} tiles" in figures(tiles)["released", "total_flops"]["note"]


@given(tiles=TILES, factor=st.integers(min_value=2, max_value=7))
def test_what_is_linear_in_crops_grows_linearly(tiles, factor):
    crops = tiles + 1
    for flops in (
        lambda n: formulas.tower_linear_flops(SIZES, n, 27),
        lambda n: formulas.tower_attention_flops(SIZES, n, 27),
        lambda n: formulas.patch_embedding_flops(SIZES, n),
        lambda n: formulas.connector_flops(SIZES, windows=196 * n, slots=729 * n),
        lambda n: formulas.decoder_linear_flops(SIZES, 182 * n),
        lambda n: formulas.kv_cache_bytes(SIZES, 182 * n),
    ):
        assert flops(factor * crops) == factor * flops(crops)
    quadratic = [formulas.decoder_attention_flops(SIZES, 182 * n) for n in (crops, factor * crops)]
    assert quadratic[1] == factor**2 * quadratic[0]


@given(tiles=TILES)
def test_one_more_tile_adds_one_crop_to_the_paper_rows(tiles):
    now, then = figures(tiles), figures(tiles + 1)
    for quantity in QUANTITIES:
        for column in ("unpooled", "pooled"):
            share = now["paper", quantity][column] / (tiles + 1)
            assert then["paper", quantity][column] == pytest.approx(share * (tiles + 2), rel=1e-12)


@given(tiles=TILES)
def test_pooling_always_saves_and_conventions_agree_on_the_unpooled_prefill(tiles):
    rows = figures(tiles)
    for row in rows.values():
        assert row["ratio"] > 1
    assert rows["exact", "prefill_flops"]["unpooled"] == rows["released", "prefill_flops"]["unpooled"]
    assert rows["released", "total_flops"]["unpooled"] < rows["exact", "total_flops"]["unpooled"]


@pytest.mark.parametrize("tiles", [0, -1, 257, 10**9, 10**30, 2.0, float("nan"), "12", None, True])
def test_tiles_must_be_an_int_that_the_processor_can_make(tiles):
    assert formulas.MOST_TILES == MAX_TILES
    for call in (efficiency_rows, sweep_rows, formulas.most_square_grid):
        with pytest.raises(ValueError, match="tiles"):
            call(tiles)


def test_other_sizes_reach_the_figures():
    half = {(r["convention"], r["quantity"]): r for r in efficiency_rows(12, Sizes(decoder_kv_heads=4))}
    assert half["exact", "kv_cache_bytes"]["unpooled"] * 2 == figures()["exact", "kv_cache_bytes"]["unpooled"]
    assert "4 KV heads" in half["exact", "kv_cache_bytes"]["note"]


@pytest.mark.parametrize("width", [80, 100])
def test_rendered_table_is_whole_at_common_widths(width):
    console = pytest.importorskip("rich.console")
    out = io.StringIO()
    console.Console(file=out, width=width).print(render(efficiency_rows(12)))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for needle in ("27.218 TFLOP", "6.915 TFLOP", "3.936x", "2.123 GB", "13.552 TFLOP", "9,477", "[12]"):
        assert needle in text
    assert "…" not in text


def test_rows_without_notes_render():
    console = pytest.importorskip("rich.console")
    rows = [{k: v for k, v in row.items() if k != "note"} for row in efficiency_rows(1)]
    out = io.StringIO()
    console.Console(file=out, width=100).print(render(rows, title="one tile"))
    assert "one tile" in out.getvalue() and "[1]" not in out.getvalue()


def test_formulas_need_neither_torch_nor_rich():
    code = (
        "import sys; import vlmkern; before = set(sys.modules); import vlmkern.efficiency as e; "
        "e.efficiency_rows(3); "
        "assert not {'torch', 'rich', 'numpy'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sweep_repeats_the_rows_of_each_count():
    rows = sweep_rows(13)
    assert [row["tiles"] for row in rows] == [tiles for tiles in range(1, 14) for _ in QUANTITIES]
    assert {key: value for key, value in rows[-5].items() if key != "tiles"} == efficiency_rows(12, measure=False)[11]
    with pytest.raises(ValueError, match="from 1 to 256"):
        sweep_rows(0)


def test_sweep_renders_a_line_for_each_count():
    out = io.StringIO()
    rich_console = pytest.importorskip("rich.console")
    rich_console.Console(file=out, width=120).print(render_sweep(sweep_rows(3)))
    assert "1,458 → 424" in out.getvalue() and "2,916 → 704" in out.getvalue()
