"""Random arguments for every op, under their names, in the order of the registered op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .generate import Arena

ACTIVATIONS = ("none", "gelu_tanh", "gelu", "quick_gelu", "silu")
MASK_VALUES = (1.0, 1.0, 1.0, 0.0, 0.0, 0.37, 0.999, -1.0, 2.0)
MASK_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


class Maker:
    def __init__(self, arena: Arena, dtype: torch.dtype, kind: str, dtypes: Sequence[torch.dtype] | None):
        self.arena, self.draw, self.dtype, self.kind, self.dtypes = arena, arena.draw, dtype, kind, dtypes
        self.extreme = False
        self.overlapping: set[str] = set()
        # whether there are queries that do not see all keys
        self.hides = False
        # in half of the cases one tensor alone has the unusual values
        self._everywhere = self.draw.chance(0.5)
        self._chosen = False

    def tensor(self, name: str, shape: Sequence[int], factor: float = 1.0, **layout: Any) -> Tensor:
        kind = self.kind
        if not self._everywhere:
            kind = "normal" if self._chosen or self.draw.chance(0.5) else self.kind
            self._chosen |= kind == self.kind
        values = self.draw.values(shape, kind, factor)
        dtype = self.dtype if self.dtypes is None else self.draw.choice(self.dtypes)
        view = self.arena.tensor(values, dtype, **layout)
        if id(view) in self.arena.overlapping:
            self.overlapping.add(name)
        return view

    def maybe(self, name: str, shape: Sequence[int], probability: float = 0.6) -> Tensor | None:
        return self.tensor(name, shape) if self.draw.chance(probability) else None

    def rows(self, limit: int = 40) -> list[int]:
        """Leading sizes: most often one of at most `limit`, both sides of the few rows with kernels of their own."""
        draw = self.draw
        if draw.chance(0.03):
            return [draw.randint(150, 400)]
        if draw.chance(0.1):
            return [] if draw.chance(0.5) else [draw.size(4, zero=True), draw.size(5, zero=True), draw.size(3)]
        return [draw.randint(1, 6) if draw.chance(0.4) else draw.size(limit, zero=True)]

    def linear(self) -> dict[str, Any]:
        draw = self.draw
        rows, inputs, outputs = self.rows(), draw.size(260, zero=True), draw.size(130, zero=True)
        return {
            "x": self.tensor("x", [*rows, inputs]),
            "weight": self.tensor("weight", [outputs, inputs], max(inputs, 1) ** -0.5),
            "bias": self.maybe("bias", [outputs]),
            "activation": draw.choice(ACTIVATIONS),
            "residual": self.maybe("residual", [*rows, outputs], 0.4),
        }

    def swiglu_mlp(self) -> dict[str, Any]:
        draw = self.draw
        rows, inputs = self.rows(), draw.size(130, zero=True)
        features, outputs = draw.size(70, zero=True), draw.size(40, zero=True)
        return {
            "x": self.tensor("x", [*rows, inputs]),
            "w_up": self.tensor("w_up", [2 * features, inputs], max(inputs, 1) ** -0.5),
            "w_down": self.tensor("w_down", [outputs, features], max(features, 1) ** -0.5),
            "b_up": self.maybe("b_up", [2 * features]),
            "b_down": self.maybe("b_down", [outputs]),
        }

    def add_layer_norm(self) -> dict[str, Any]:
        draw = self.draw
        shape = [*self.rows(), draw.size(300, zero=True)]
        return {
            "x": self.tensor("x", shape),
            "residual": self.maybe("residual", shape),
            "weight": self.maybe("weight", shape[-1:]),
            "bias": self.maybe("bias", shape[-1:]),
            "eps": draw.choice([1e-6, 1e-5, 1e-3]),
        }

    def rms_norm(self) -> dict[str, Any]:
        draw = self.draw
        # of heads too, of which there may be views
        shape = [*self.rows(), *([draw.size(4)] if draw.chance(0.3) else []), draw.size(300, zero=True)]
        cos = sin = None
        if draw.chance(0.3):
            shape = [*([draw.size(3, zero=True)] * draw.randint(0, 2)), draw.size(40, zero=True), draw.size(4)]
            shape.append(2 * draw.size(90))
            cos, sin = self.tables(shape)
        return {
            "x": self.tensor("x", shape),
            "weight": self.tensor("weight", shape[-1:]),
            "residual": self.maybe("residual", shape) if cos is None else None,
            "eps": draw.choice([1e-6, 1e-5, 1e-3]),
            "offset": draw.choice([0.0, 0.0, 1.0, -0.3]),
            "cos": cos,
            "sin": sin,
            "interleaved": cos is not None and draw.chance(0.4),
        }

    def attention(self) -> dict[str, Any]:
        draw = self.draw
        dim, heads, budget = draw.size(256), draw.choice([1, 1, 2, 3, 4, 8, 16]), 3e6 if draw.chance(0.05) else 4e5
        plain = draw.chance(0.4)
        if not plain and draw.chance(0.5):
            dim += dim % 2  # so that there may be rotary tables
        most = min(max(1, int((budget / (heads * dim)) ** 0.5)), 300)
        own_lengths = not plain and draw.chance(0.5)
        heads_k = heads if plain or draw.chance(0.5) else draw.choice([n for n in (1, 2, 3, 4, 8) if heads % n == 0])
        bounds = longest = bounds_k = longest_k = None
        if draw.chance(0.5):
            count = draw.choice([0, 1, 1, 2, 3, 5])
            tokens, bounds, longest = self.segments(count, most)
            tokens_k = tokens
            if own_lengths:
                tokens_k, bounds_k, longest_k = self.segments(count, most)
            shape, shape_k = [tokens, heads, dim], [tokens_k, heads_k, dim]
        else:
            shape = [draw.size(3, zero=True), draw.size(most, zero=True), heads, dim]
            shape_k = [shape[0], draw.size(most, zero=True) if own_lengths else shape[1], heads_k, dim]
        factor = 1.0
        if draw.chance(0.12):
            # scores from a hundred to beyond 1e9
            factor, self.extreme = 10 ** draw.uniform(1, 5), True
        left = right = -1
        if not plain and draw.chance(0.6):
            left = draw.choice([-1, -1, 0, 3, 20, 10**9])
            right = draw.choice([0, 0, 0, -1, 2, 17, 2**40])
        # a segment of queries without keys, too, sees nothing
        self.hides = left >= 0 or right >= 0 or own_lengths
        cos = sin = cos_k = sin_k = None
        if not plain and dim % 2 == 0 and draw.chance(0.5):
            cos, sin = self.tables(shape)
            if own_lengths or draw.chance(0.3):
                cos_k, sin_k = self.tables(shape_k)
        return {
            "q": self.tensor("q", shape, factor, unit_last_stride=True),
            "k": self.tensor("k", shape_k, factor, unit_last_stride=True),
            "v": self.tensor("v", shape_k, unit_last_stride=True),
            "scale": draw.choice([None, None, 0.3, -0.4, 0.0, dim**-0.5]),
            "cu_seqlens": bounds,
            "max_seqlen": longest,
            "cu_seqlens_k": bounds_k,
            "max_seqlen_k": longest_k,
            "window_left": left,
            "window_right": right,
            "softcap": 0.0 if plain or draw.chance(0.6) else draw.choice([0.5, 5.0, 50.0]),
            "cos": cos,
            "sin": sin,
            "cos_k": cos_k,
            "sin_k": sin_k,
            "interleaved": cos is not None and draw.chance(0.4),
        }

    def segments(self, count: int, most: int) -> tuple[int, Tensor, int]:
        """How many tokens there are, their bounds, and no less than the longest segment."""
        draw = self.draw
        lengths = [0 if draw.chance(0.1) else draw.size(most, zero=True) for _ in range(count)]
        bounds = self.arena.tensor(torch.tensor([0, *lengths]).cumsum(0), torch.int32, distinct=True)
        return sum(lengths), bounds, max(lengths, default=0) + draw.choice([0, 0, 1, 1000])

    def tables(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines for heads [..., N, H, D]: of tokens, or of all leading dimensions, of half of D or of D."""
        leading = shape[:-2] if self.draw.chance(0.4) else shape[-3:-2]
        angles = self.draw.fractions([*leading, shape[-1] // 2]) * 200 - 100
        if self.draw.chance(0.4):
            angles = torch.cat([angles, angles], -1)
        cos, sin = (
            self.arena.tensor(values, torch.float32, unit_last_stride=True, distinct=True)
            for values in (angles.cos(), angles.sin())
        )
        return cos, sin

    def attention_pool(self) -> dict[str, Any]:
        draw = self.draw
        heads = draw.choice([1, 1, 1, 2, 3, 4, 16])
        key, value = (draw.size(limit) for limit in ((24, 40) if heads < 4 else (8, 8)))
        grid, window = [draw.size(7), draw.size(7)], [draw.randint(1, 3), draw.randint(1, 3)]
        tiles, layers, channels = draw.size(3, zero=True), draw.choice([1, 2, 2, 3]), draw.size(70, zero=True)
        outputs, width = draw.size(40, zero=True), layers * channels
        factor = max(width, 1) ** -0.5
        windows = tiles * math.ceil(grid[0] / window[0]) * math.ceil(grid[1] / window[1])
        mask = pad_embed = keep = None
        if draw.chance(0.5):
            dtype = draw.choice(MASK_DTYPES)
            values = torch.tensor(draw.choices(MASK_VALUES, k=tiles * grid[0] * grid[1]), dtype=torch.float64)
            values = values.abs() if dtype == torch.uint8 else values
            mask = self.arena.tensor(values.reshape(tiles, grid[0] * grid[1]), dtype)
        if mask is not None:
            pad_embed = self.tensor("pad_embed", [2, width])
        if draw.chance(0.4):
            chosen = [draw.randrange(windows) for _ in range(draw.choice([0, 1, 2, 5, 12]))] if windows else []
            keep = self.arena.tensor(torch.tensor(chosen, dtype=torch.int64), torch.int64, distinct=True)
        return {
            "features": [
                self.tensor(f"features[{i}]", [tiles, grid[0] * grid[1], channels], unit_last_stride=True)
                for i in range(layers)
            ],
            "w_q": self.tensor("w_q", [heads * key, width], factor),
            "b_q": self.maybe("b_q", [heads * key]),
            "w_kv": self.tensor("w_kv", [heads * (key + value), width], factor),
            "b_kv": self.maybe("b_kv", [heads * (key + value)]),
            "w_o": self.tensor("w_o", [outputs, heads * value], (heads * value) ** -0.5),
            "b_o": self.maybe("b_o", [outputs]),
            "grid": grid,
            "num_heads": heads,
            "window": window,
            "pad_embed": pad_embed,
            "mask": mask,
            "keep": keep,
        }
