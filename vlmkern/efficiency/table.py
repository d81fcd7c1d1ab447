"""The paper's Table 1 under three conventions: as published, counted exactly, with the released token layout.

Each figure comes from the formulas beside this file, and, where the released model can be run for it, from a run that
counts (`counting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import formulas as f

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CONVENTIONS", "QUANTITIES", "efficiency_rows", "render", "render_sweep", "sweep_rows"]

CONVENTIONS = ("paper", "exact", "released")
QUANTITIES = ("visual_tokens", "prefill_flops", "kv_cache_bytes", "total_flops")

_LABELS = {
    "visual_tokens": "visual tokens",
    "prefill_flops": "prefill FLOPs",
    "kv_cache_bytes": "KV cache",
    "total_flops": "total FLOPs",
}


def efficiency_rows(tiles: int = 12, sizes: f.Sizes | None = None, *, measure: bool = True) -> list[dict[str, Any]]:
    """The efficiency figures for one image of ``tiles`` tiles and a thumbnail, without and with 2x2 pooling.

    Returns 12 dicts, conventions in the order of ``CONVENTIONS`` and inside each the ``QUANTITIES``, with the
    keys ``convention``, ``quantity``, ``unpooled``, ``pooled``, ``ratio`` (unpooled / pooled), ``source``
    and ``note``. Units: tokens, FLOPs (a multiply-add is two), bytes; values are not rounded.

    - *paper*: the published figures, with 182 tokens a crop; the prefill holds the decoder's linear layers
      and the connector, the total adds all tower blocks, and the KV cache repeats the printed GB.
    - *exact*: the same token counts; the prefill is the decoder with causal attention, the total adds tower,
      patch embedding and connector, and the KV cache has the decoder's own number of KV heads.
    - *released*: counted as *exact*, with the token layout of the released processor on the most square grid
      of ``tiles`` and with only those tower blocks that the connector reads.

    ``source`` is "measured" where the released assembly was run for the figure (with ``measure``, and ``sizes`` left
    out): FLOPs counted on the meta device, tokens planned by the processor, caches allocated. Else it is "formula":
    the paper's figures, and totals of pooling 182 windows a crop, which no code does.

    ``sizes`` defaults to the released model. Raises ``ValueError`` if ``tiles`` is not an int from 1 to 256.
    Source: paper, Table 1.
    """
    f.validate_tiles(tiles)
    released = f.Sizes() if sizes is None else sizes
    rows = [*_paper(tiles, released), *_exact(tiles, released), *_released(tiles, released)]
    if measure and sizes is None:
        from .counting import measured_figures

        measured = measured_figures(tiles)
        for row in rows:
            figures = measured.get((row["convention"], row["quantity"]))
            if figures is not None:
                unpooled, pooled = figures
                row.update(unpooled=unpooled, pooled=pooled, ratio=unpooled / pooled, source="measured")
    return rows


def render(rows: Iterable[Mapping[str, Any]], title: str | None = None) -> Table:
    """A ``rich`` table of ``rows`` as ``efficiency_rows`` gives them, readable at 100 columns.

    FLOPs are shown in TFLOP (1e12), the KV cache in decimal GB (1e9); notes stand under the table by number.
    Raises ``ImportError`` where ``rich`` is not installed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    notes: list[str] = []
    table = Table(
        title=title or "Efficiency for one image, without and with 2x2 attention pooling",
        box=box.SIMPLE_HEAD,
        min_width=96,
        collapse_padding=True,
        caption_justify="left",
        caption_style="dim",
    )
    for header in ("convention", "quantity"):
        table.add_column(header, no_wrap=True)
    for header in ("unpooled", "pooled", "ratio"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("source", no_wrap=True)

    previous = None
    for row in rows:
        convention, quantity = row["convention"], row["quantity"]
        if previous not in (None, convention):
            table.add_section()
        # Text, and not str, keeps rich from reading the brackets as markup
        label = Text(_LABELS.get(quantity, quantity))
        if row.get("note"):
            notes.append(row["note"])
            label.append(f" [{len(notes)}]", style="dim")
        table.add_row(
            Text(convention if convention != previous else "", style="bold"),
            label,
            _human(quantity, row["unpooled"]),
            _human(quantity, row["pooled"]),
            Text(f"{row['ratio']:.3f}x", style="bold"),
            row["source"],
        )
        previous = convention
    if notes:
        table.caption = Text("\n".join(f"[{number}] {note}" for number, note in enumerate(notes, 1)))
    return table


def sweep_rows(most: int, convention: str = "released") -> list[dict[str, Any]]:
    """The rows of one convention for 1 to ``most`` tiles, by the formulas, each with its ``tiles``.

    Raises ``ValueError`` if ``most`` is not an int from 1 to 256 or there is no such convention.
    """
    f.validate_tiles(most)
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: got {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    return [
        {"tiles": tiles, **row}
        for tiles in range(1, most + 1)
        for row in efficiency_rows(tiles, measure=False)
        if row["convention"] == convention
    ]


def render_sweep(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A ``rich`` table of ``sweep_rows``, a line for each number of tiles."""
    from rich import box
    from rich.table import Table

    by_tiles: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_tiles.setdefault(row["tiles"], {})[row["quantity"]] = row
    table = Table(title="By number of tiles: unpooled to pooled, as released", box=box.SIMPLE_HEAD)
    table.add_column("tiles", justify="right")
    for quantity in QUANTITIES:
        table.add_column(_LABELS[quantity], justify="right", no_wrap=True)
        table.add_column("ratio", justify="right")
    for tiles, found in by_tiles.items():
        cells = []
        for quantity in QUANTITIES:
            row = found[quantity]
            cells += [_span(quantity, row["unpooled"], row["pooled"]), f"{row['ratio']:.2f}x"]
        table.add_row(str(tiles), *cells)
    return table


def _span(quantity: str, unpooled: float, pooled: float) -> str:
    if quantity.endswith("_flops"):
        return f"{unpooled / 1e12:.2f} → {pooled / 1e12:.2f} T"
    if quantity.endswith("_bytes"):
        return f"{unpooled / 1e9:.3f} → {pooled / 1e9:.3f} GB"
    return f"{unpooled:,} → {pooled:,}"


def _paper(tiles: int, sizes: f.Sizes) -> list[dict[str, Any]]:
    crops = tiles + 1
    patches = crops * sizes.patches_per_crop
    tokens = crops * _published_tokens_per_crop(sizes)
    linear = [f.decoder_linear_flops(sizes, n) for n in (patches, tokens)]
    prefill = (
        linear[0] + f.projector_flops(sizes, patches),
        linear[1] + f.connector_flops(sizes, windows=tokens, slots=patches),
    )
    blocks = sizes.tower_layers
    tower = f.tower_linear_flops(sizes, crops, blocks) + f.tower_attention_flops(sizes, crops, blocks)
    full_heads = [f.kv_cache_bytes(sizes, n, kv_heads=sizes.decoder_heads) for n in (patches, tokens)]
    return [
        _row(
            "paper",
            "visual_tokens",
            patches,
            tokens,
            f"{sizes.patches_per_crop} patches a crop; pooling counted as floor({sizes.patches_per_crop}/"
            f"{sizes.window**2}) = {_published_tokens_per_crop(sizes)} tokens a crop",
        ),
        _row(
            "paper",
            "prefill_flops",
            *prefill,
            "decoder linear layers and connector (projector alone when unpooled); no attention scores",
        ),
        _row(
            "paper",
            "kv_cache_bytes",
            *(_printed_bytes(n) for n in full_heads),
            f"the printed GB: {sizes.decoder_heads} heads, KiB divided by 1e6; the bytes of "
            f"{sizes.decoder_heads} heads are {full_heads[0] / 1e9:.4f}e9 and {full_heads[1] / 1e9:.4f}e9, "
            f"and the model keeps {sizes.decoder_kv_heads} KV heads",
        ),
        _row(
            "paper",
            "total_flops",
            *(n + tower for n in prefill),
            f"adds {blocks} tower blocks, their attention scores included; no patch embedding",
        ),
    ]


def _exact(tiles: int, sizes: f.Sizes) -> list[dict[str, Any]]:
    crops = tiles + 1
    patches = crops * sizes.patches_per_crop
    tokens = crops * _published_tokens_per_crop(sizes)
    prefill = [_decoder(sizes, n) for n in (patches, tokens)]
    tower = _tower(sizes, crops, sizes.tower_layers)
    connector = (f.projector_flops(sizes, patches), f.connector_flops(sizes, windows=tokens, slots=patches))
    return [
        _row("exact", "visual_tokens", patches, tokens, "token counts of the paper"),
        _row(
            "exact",
            "prefill_flops",
            *prefill,
            "decoder alone on visual tokens: linear layers and causal attention, counted as half the square",
        ),
        _row(
            "exact",
            "kv_cache_bytes",
            *(f.kv_cache_bytes(sizes, n) for n in (patches, tokens)),
            f"{sizes.decoder_kv_heads} KV heads, 2 bytes a value",
        ),
        _row(
            "exact",
            "total_flops",
            *(n + tower + c for n, c in zip(prefill, connector, strict=True)),
            f"adds {sizes.tower_layers} tower blocks, the patch embedding and the connector",
        ),
    ]


def _released(tiles: int, sizes: f.Sizes) -> list[dict[str, Any]]:
    layout = f.token_layout(sizes, f.most_square_grid(tiles))
    patches = layout.crops * sizes.patches_per_crop
    prefill = [_decoder(sizes, n) for n in (patches, layout.total_tokens)]
    # the released connector pools every window of every crop, zero-padded slots too, and drops afterwards
    slots = layout.pooled_windows * sizes.window**2
    connector = (
        f.projector_flops(sizes, patches),
        f.connector_flops(sizes, windows=layout.pooled_windows, slots=slots),
    )
    tower = _tower(sizes, layout.crops, sizes.tower_layers_used)
    unused = _tower(sizes, layout.crops, sizes.tower_layers) - tower
    totals = [n + tower + c for n, c in zip(prefill, connector, strict=True)]
    rows, cols = layout.tiling
    return [
        _row(
            "released",
            "visual_tokens",
            patches,
            layout.total_tokens,
            f"{rows} x {cols} tiles: {layout.kept_windows:,} of {layout.pooled_windows:,} windows kept, plus "
            f"{layout.total_tokens - layout.kept_windows} frame and column tokens; unpooled holds the "
            f"overlaps twice, cropped alike it would be {layout.kept_patches:,} patches "
            f"({layout.kept_patches / layout.kept_windows:.2f}x the kept windows)",
        ),
        _row(
            "released",
            "prefill_flops",
            *prefill,
            f"{rows} x {cols} tiles: decoder as in exact, frame and column tokens included",
        ),
        _row(
            "released",
            "kv_cache_bytes",
            *(f.kv_cache_bytes(sizes, n) for n in (patches, layout.total_tokens)),
            f"{rows} x {cols} tiles: {sizes.decoder_kv_heads} KV heads, 2 bytes a value",
        ),
        _row(
            "released",
            "total_flops",
            *totals,
            f"{rows} x {cols} tiles: {sizes.tower_layers_used} of {sizes.tower_layers} tower blocks in both "
            f"columns (all: {(totals[0] + unused) / 1e12:.2f} and {(totals[1] + unused) / 1e12:.2f} TFLOP); "
            f"the connector pools all {layout.pooled_windows:,} windows before the dropping",
        ),
    ]


def _decoder(sizes: f.Sizes, tokens: int) -> int:
    return f.decoder_linear_flops(sizes, tokens) + f.decoder_attention_flops(sizes, tokens)


def _tower(sizes: f.Sizes, crops: int, layers: int) -> int:
    blocks = f.tower_linear_flops(sizes, crops, layers) + f.tower_attention_flops(sizes, crops, layers)
    return blocks + f.patch_embedding_flops(sizes, crops)


def _published_tokens_per_crop(sizes: f.Sizes) -> int:
    return sizes.patches_per_crop // sizes.window**2


def _printed_bytes(true_bytes: int) -> int:
    # the published GB are KiB divided by 1e6, so read as decimal they understate the bytes by 1000/1024
    return round(true_bytes * 1000 / 1024)


def _row(convention: str, quantity: str, unpooled: int, pooled: int, note: str) -> dict[str, Any]:
    return {
        "convention": convention,
        "quantity": quantity,
        "unpooled": unpooled,
        "pooled": pooled,
        "ratio": unpooled / pooled,
        "source": "formula",
        "note": note,
    }


def _human(quantity: str, value: float) -> str:
    if quantity.endswith("_flops"):
        return f"{value / 1e12:,.3f} TFLOP"
    if quantity.endswith("_bytes"):
        return f"{value / 1e9:,.3f} GB"
    return f"{value:,}"
