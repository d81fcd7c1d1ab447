"""What is asked of `ops.attention`, and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """softmax(scale * q k^T) v and the log-sum-exp of the scaled scores."""

    q: Tensor  # [B, N, H, D], or packed [T, H, D]
    k: Tensor
    v: Tensor
    scale: float
    cu_seqlens: Tensor | None  # int32 [S + 1], of packed tensors
    max_seqlen: int | None

    @classmethod
    def example(cls, dtype: torch.dtype) -> Attention:
        """One crop of jina-vlm, of shapes only."""
        q, k, v = torch.empty(1, 729, 3, 16, 72, dtype=dtype, device="meta").unbind(2)
        return cls(q, k, v, 72**-0.5, None, None)


class AttentionGradient(NamedTuple):
    """Its gradients by q, k and v."""

    grad: Tensor  # like out
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor  # [B, H, N] or [H, T]
    scale: float
    cu_seqlens: Tensor | None
    max_seqlen: int | None

    @property
    def forward(self) -> Attention:
        """What this is the gradient of."""
        return Attention(self.q, self.k, self.v, self.scale, self.cu_seqlens, self.max_seqlen)
