"""Self-attention of a vision tower over `vlmkern.ops.attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional


class TileAttention(nn.Module):
    """Multi-head self-attention inside each tile, with one fused qkv projection that attention reads in place.

    Args:
        hidden_size: C.
        num_heads: H.
        head_dim: D.

    Parameters: `qkv_w.weight` [3*H*D, C] with the rows of q, k and v one after the other, `q_b`, `k_b`,
    `v_b` [H*D], `out.weight` [C, H*D], `out.bias` [C].
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.qkv_w = nn.Linear(hidden_size, 3 * inner, bias=False)
        self.q_b = nn.Parameter(torch.zeros(inner))
        self.k_b = nn.Parameter(torch.zeros(inner))
        self.v_b = nn.Parameter(torch.zeros(inner))
        self.out = nn.Linear(inner, hidden_size)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, C], or packed [T, C] with `cu_seqlens` and `max_seqlen` -> the same shape, plus `residual`."""
        bias = torch.cat([self.q_b, self.k_b, self.v_b])
        return functional.self_attention(
            x,
            [(self.qkv_w.weight, bias)],
            (self.out.weight, self.out.bias),
            self.num_heads,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            residual=residual,
        )
