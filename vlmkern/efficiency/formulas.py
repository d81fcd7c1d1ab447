"""FLOPs, tokens and KV bytes of jina-vlm in closed form: the figures behind the paper's Table 1.

The arithmetic is that of `parts`, which leaves out what the paper leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .parts import AttentionPooling, Decoder, Encoder

__all__ = [
    "MOST_TILES",
    "Sizes",
    "TokenLayout",
    "connector_flops",
    "decoder_attention_flops",
    "decoder_linear_flops",
    "decoder_linear_weights",
    "kept_windows",
    "kv_cache_bytes",
    "most_square_grid",
    "patch_embedding_flops",
    "projector_flops",
    "token_layout",
    "tower_attention_flops",
    "tower_linear_flops",
    "validate_tiles",
]

MOST_TILES = 256
"""Of one image: as many as the image processor cuts at most."""


@dataclass(frozen=True)
class Sizes:
    """Layer sizes that the formulas need; the defaults are those of the released jina-vlm.

    Widths are in channels, ``patch_inputs`` in values per patch, ``margin_patches`` in patches per tile side.
    Nothing is validated here: the sizes are expected to come from a checked model configuration.
    Source: the released configuration (SigLIP2-so400m tower, pooling connector, Qwen3-1.7B decoder).
    """

    patch_inputs: int = 588
    patches_per_side: int = 27
    margin_patches: int = 4
    window: int = 2

    tower_layers: int = 27
    # the deepest hidden state that the connector reads is the output of block 24, counted from 0
    tower_layers_used: int = 25
    tower_width: int = 1152
    tower_heads: int = 16
    tower_head_dim: int = 72
    tower_mlp: int = 4304

    connector_features: int = 2304
    connector_heads: int = 16
    connector_head_dim: int = 72
    connector_width: int = 1152
    projector_mlp: int = 6144

    decoder_layers: int = 28
    decoder_width: int = 2048
    decoder_heads: int = 16
    decoder_kv_heads: int = 8
    decoder_head_dim: int = 128
    decoder_mlp: int = 6144
    vocabulary: int = 151_936

    @property
    def encoder(self) -> Encoder:
        """The tower's blocks whose output is used."""
        return Encoder(
            self.tower_layers_used,
            self.tower_width,
            self.tower_heads,
            self.tower_head_dim,
            self.tower_mlp,
            self.patch_inputs,
        )

    @property
    def connector(self) -> AttentionPooling:
        """Pooling and projector."""
        return AttentionPooling(
            features=self.connector_features,
            inner=self.connector_heads * self.connector_head_dim,
            width=self.connector_width,
            projector_mlp=self.projector_mlp,
            out=self.decoder_width,
            window=self.window,
        )

    @property
    def decoder(self) -> Decoder:
        """The language model."""
        return Decoder(
            self.decoder_layers,
            self.decoder_width,
            self.decoder_heads,
            self.decoder_kv_heads,
            self.decoder_head_dim,
            self.decoder_mlp,
            self.vocabulary,
        )

    @property
    def patches_per_crop(self) -> int:
        """Patches of one crop, a tile or the thumbnail (729 as released)."""
        return self.patches_per_side**2

    @property
    def windows_per_side(self) -> int:
        """Pooling windows along one side of a crop, the zero-padded one included (14 as released)."""
        return -(-self.patches_per_side // self.window)

    @property
    def windows_per_crop(self) -> int:
        """Pooling windows of one crop (196 as released)."""
        return self.windows_per_side**2


@dataclass(frozen=True)
class TokenLayout:
    """How many tokens one image takes in the prompt, for a grid of tiles.

    Counts: ``crops`` (tiles and the thumbnail), ``pooled_windows`` (all windows of all crops),
    ``kept_windows`` (those that become image tokens, of the thumbnail and of the tile grid ``kept_grid``),
    ``total_tokens`` (image tokens and the frame and column tokens around them), ``kept_patches`` (patches
    that the same cropping would leave without pooling).
    """

    tiling: tuple[int, int]
    crops: int
    pooled_windows: int
    kept_grid: tuple[int, int]
    kept_windows: int
    total_tokens: int
    kept_patches: int


def validate_tiles(tiles: int) -> int:
    """Return ``tiles`` unchanged if it is an int from 1 to ``MOST_TILES``.

    Raises ``ValueError`` that names ``tiles`` otherwise; a bool is not taken for a number.
    """
    if isinstance(tiles, bool) or not isinstance(tiles, int) or not 1 <= tiles <= MOST_TILES:
        raise ValueError(f"tiles must be an int from 1 to {MOST_TILES}, got {tiles!r}")
    return tiles


def tower_linear_flops(sizes: Sizes, crops: int, layers: int) -> int:
    """FLOPs of the four linear layers (qkv, out, MLP up and down) of ``layers`` vision blocks over ``crops`` crops."""
    encoder, views = sizes.encoder._replace(layers=layers), [sizes.patches_per_crop] * crops
    return encoder.projections(views) + encoder.mlps(views)


def tower_attention_flops(sizes: Sizes, crops: int, layers: int) -> int:
    """FLOPs of QK^T and PV in ``layers`` vision blocks: 4 * N * N * H * D a crop, as no crop sees another."""
    return sizes.encoder._replace(layers=layers).attention([sizes.patches_per_crop] * crops)


def patch_embedding_flops(sizes: Sizes, crops: int) -> int:
    """FLOPs of the linear patch embedding over ``crops`` crops."""
    return sizes.encoder.patch_embed([sizes.patches_per_crop] * crops)


def projector_flops(sizes: Sizes, tokens: int) -> int:
    """FLOPs of the SwiGLU projector into the decoder's width, for ``tokens`` visual tokens (paper Eq. 4)."""
    return sizes.connector.projector(tokens)


def connector_flops(sizes: Sizes, windows: int, slots: int) -> int:
    """FLOPs of pooling ``slots`` patch features into ``windows`` tokens, projected (paper Eqs. 3 and 4)."""
    return sizes.connector.pooling(windows, slots) + projector_flops(sizes, windows)


def decoder_linear_weights(sizes: Sizes) -> int:
    """Weights of the decoder's linear layers (1,409,286,144 as released), without embedding and lm_head."""
    decoder = sizes.decoder
    return decoder.layers * (decoder.projection_weights + decoder.mlp_weights)


def decoder_linear_flops(sizes: Sizes, tokens: int) -> int:
    """FLOPs of the decoder's linear layers over a prefill of ``tokens`` tokens."""
    return sizes.decoder.projections(tokens) + sizes.decoder.mlps(tokens)


def decoder_attention_flops(sizes: Sizes, tokens: int) -> int:
    """FLOPs of causal attention over ``tokens`` tokens: 2 * S * S * H * D a layer, half the full square."""
    return sizes.decoder.attention(tokens)


def kv_cache_bytes(sizes: Sizes, tokens: int, kv_heads: int | None = None, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values for ``tokens`` tokens; ``kv_heads`` defaults to the decoder's own number."""
    decoder = sizes.decoder if kv_heads is None else sizes.decoder._replace(kv_heads=kv_heads)
    return decoder.kv_bytes(tokens, bytes_per_value)


def most_square_grid(tiles: int) -> tuple[int, int]:
    """The grid (rows, cols) with rows * cols == ``tiles``, rows <= cols and the sides as close as can be.

    Raises ``ValueError`` if ``tiles`` is not an int from 1 to ``MOST_TILES``.
    """
    validate_tiles(tiles)
    rows = max(r for r in range(1, math.isqrt(tiles) + 1) if tiles % r == 0)
    return rows, tiles // rows


def kept_windows(sizes: Sizes, tiles_along: int) -> int:
    """Pooling windows kept along one axis of ``tiles_along`` tiles (released: 14, 24, 34, 44 for 1 to 4).

    A tile gives up its overlap margin on each side that has a neighbour; a window that the margin cuts stays.
    """
    one_neighbour = -(-(sizes.patches_per_side - sizes.margin_patches) // sizes.window)
    two_neighbours = -(-(sizes.patches_per_side - 2 * sizes.margin_patches) // sizes.window)
    if tiles_along == 1:
        return sizes.windows_per_side
    return 2 * one_neighbour + (tiles_along - 2) * two_neighbours


def token_layout(sizes: Sizes, tiling: tuple[int, int]) -> TokenLayout:
    """Token counts of the released prompt layout for one image with ``tiling`` = (rows, cols) tiles.

    The thumbnail and the tile grid are each written as rows of image tokens that end in a column token,
    between a start and an end token.
    """
    rows, cols = tiling
    crops = rows * cols + 1
    side = sizes.windows_per_side
    kept_rows, kept_cols = kept_windows(sizes, rows), kept_windows(sizes, cols)
    stride = sizes.patches_per_side - 2 * sizes.margin_patches
    patch_rows, patch_cols = (n * stride + 2 * sizes.margin_patches for n in tiling)
    return TokenLayout(
        tiling=(rows, cols),
        crops=crops,
        pooled_windows=crops * sizes.windows_per_crop,
        kept_grid=(kept_rows, kept_cols),
        kept_windows=side * side + kept_rows * kept_cols,
        total_tokens=(side * (side + 1) + 2) + (kept_rows * (kept_cols + 1) + 2),
        kept_patches=sizes.patches_per_crop + patch_rows * patch_cols,
    )
