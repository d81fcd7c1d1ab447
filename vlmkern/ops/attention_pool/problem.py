"""What is asked of `ops.attention_pool`, and of its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .windows import windows_per_tile


class AttentionPool(NamedTuple):
    """Pooling of the windows of L hidden states' patch grids: all M of each tile, or those in `keep`."""

    features: list[Tensor]  # L of [T, N, C]
    w_q: Tensor  # [H*Dk, L*C]
    b_q: Tensor | None  # [H*Dk]
    w_kv: Tensor  # [H*Dk + H*Dv, L*C]
    b_kv: Tensor | None  # [H*Dk + H*Dv]
    w_o: Tensor  # [Co, H*Dv]
    b_o: Tensor | None  # [Co]
    grid: list[int]  # rows and columns of patches, N of them
    num_heads: int  # H
    window: list[int]  # rows and columns of slots
    pad_embed: Tensor | None  # [2, L*C]
    mask: Tensor | None  # [T, N]
    keep: Tensor | None  # int64 [K], flat indices into T * M windows

    @property
    def width(self) -> int:
        """L*C, of a slot."""
        return self.features[0].shape[2] * len(self.features)

    @property
    def windows_shape(self) -> tuple[Any, ...]:
        """[T, M], or [K]."""
        if self.keep is not None:
            return (self.keep.shape[0],)
        return self.features[0].shape[0], windows_per_tile(self.grid, self.window)

    @property
    def scale(self) -> float:
        """Factor on the scores, Dk ** -0.5."""
        return (self.w_q.shape[0] // self.num_heads) ** -0.5

    @classmethod
    def example(cls, dtype: torch.dtype) -> AttentionPool:
        """Two hidden states of one crop of jina-vlm, of shapes only."""
        features = [torch.empty(1, 729, 1152, dtype=dtype, device="meta") for _ in range(2)]
        w_q, w_kv, w_o = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((1152, 2304), (2304, 2304), (1152, 1152))
        )
        return cls(features, w_q, None, w_kv, None, w_o, None, [27, 27], 16, [2, 2], None, None, None)


class AttentionPoolGradient(NamedTuple):
    """Its gradients by (*features, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed), those that are wanted, in this order."""

    grad: Tensor  # like the result
    features: list[Tensor]
    w_q: Tensor
    b_q: Tensor | None
    w_kv: Tensor
    b_kv: Tensor | None
    w_o: Tensor
    grid: list[int]
    num_heads: int
    window: list[int]
    pad_embed: Tensor | None
    mask: Tensor | None
    keep: Tensor | None
    wanted: list[bool]

    @property
    def forward(self) -> AttentionPool:
        """What this is the gradient of."""
        _, features, w_q, b_q, w_kv, b_kv, w_o, *rest, _ = self
        return AttentionPool(features, w_q, b_q, w_kv, b_kv, w_o, None, *rest)

    @property
    def shapes(self) -> list[tuple[Any, ...]]:
        """Of all gradients, wanted or not."""
        weights = [shape for w in (self.w_q, self.w_kv, self.w_o) for shape in (w.shape, w.shape[:1])]
        return [*(x.shape for x in self.features), *weights, (2, self.forward.width)]
