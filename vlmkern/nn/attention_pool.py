"""Attention pooling of concatenated hidden states over `vlmkern.ops.attention_pool`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops


class AttentionPool(nn.Module):
    """Pools each window of patches by attention with the window's mean as the query.

    Args:
        input_size: L*C, width of the concatenated hidden states.
        num_heads: H.
        head_dim: Dk.
        output_size: Co; H*Dv when None.
        value_dim: Dv; Dk when None.
        grid: patch rows and columns.
        window: slot rows and columns of a window.
        bias: the released model has biases; eq. 3 of the paper (one head, Dk = 1152, Dv = 2304) has none.

    Parameters: `q_w.weight` [H*Dk, L*C], `kv_w.weight` [H*Dk + H*Dv, L*C] keys first, `out.weight`
    [Co, H*Dv]; with `bias` also `q_b`, `k_b`, `v_b`, `out.bias`.
    """

    # keys and values are never projected as a linear layer would: see `vlmkern.pack`
    plain_weights = ("q_w", "kv_w", "out")

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        head_dim: int,
        output_size: int | None = None,
        *,
        grid: tuple[int, int],
        window: tuple[int, int] = (2, 2),
        value_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.grid, self.window = num_heads, tuple(grid), tuple(window)
        key_size, value_size = num_heads * head_dim, num_heads * (value_dim or head_dim)
        self.q_w = nn.Linear(input_size, key_size, bias=False)
        self.kv_w = nn.Linear(input_size, key_size + value_size, bias=False)
        self.out = nn.Linear(value_size, output_size or value_size, bias=bias)
        for name, size in (("q_b", key_size), ("k_b", key_size), ("v_b", value_size)):
            self.register_parameter(name, nn.Parameter(torch.zeros(size)) if bias else None)

    def forward(
        self,
        features: Sequence[Tensor],
        pad_embed: Tensor | None = None,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """features L x [T, N, C] -> [T, M, Co], or [K, Co] for the windows in `keep`; see `ops.attention_pool`."""
        return ops.attention_pool(
            features,
            self.q_w.weight,
            self.q_b,
            self.kv_w.weight,
            None if self.k_b is None else torch.cat([self.k_b, self.v_b]),
            self.out.weight,
            self.out.bias,
            grid=self.grid,
            num_heads=self.num_heads,
            window=self.window,
            pad_embed=pad_embed,
            mask=mask,
            keep=keep,
        )
