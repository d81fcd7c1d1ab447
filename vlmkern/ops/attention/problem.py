"""What is asked of `ops.attention`, and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """softmax(cap(scale * q k^T) + mask) v and the log-sum-exp of what the softmax was taken of."""

    q: Tensor  # [B, N, H, D], or packed [T, H, D]
    k: Tensor  # [B, M, H_kv, D], or packed [T_k, H_kv, D]
    v: Tensor
    scale: float
    cu_seqlens: Tensor | None = None  # int32 [S + 1], of packed tensors
    max_seqlen: int | None = None
    cu_seqlens_k: Tensor | None = None  # those of q where None
    max_seqlen_k: int | None = None
    window_left: int = -1  # keys before and after a query's own place that it sees, -1 for all
    window_right: int = -1
    softcap: float = 0.0  # 0 for none
    cos: Tensor | None = None  # float32 [N, D/2] or [N, D], [B, N, ..] too; packed [T, ..]
    sin: Tensor | None = None
    cos_k: Tensor | None = None  # those of q where None
    sin_k: Tensor | None = None
    interleaved: bool = False

    @classmethod
    def example(cls, dtype: torch.dtype) -> Attention:
        """One crop of jina-vlm, of shapes only."""
        q, k, v = torch.empty(1, 729, 3, 16, 72, dtype=dtype, device="meta").unbind(2)
        return cls(q, k, v, 72**-0.5)

    @property
    def bounds_k(self) -> Tensor | None:
        """The bounds of packed keys."""
        return self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k

    @property
    def longest_k(self) -> int | None:
        """The longest segment of packed keys, or more."""
        return self.max_seqlen if self.cu_seqlens_k is None else self.max_seqlen_k

    @property
    def tables_k(self) -> tuple[Tensor | None, Tensor | None]:
        """Cosines and sines that turn k."""
        return (self.cos, self.sin) if self.cos_k is None else (self.cos_k, self.sin_k)

    @property
    def extra(self) -> str | None:
        """What is asked beyond softmax(scale * q k^T) v of equal lengths and heads, if anything."""
        q, k = self.q, self.k
        if self.cu_seqlens_k is not None or (self.cu_seqlens is None and q.shape[1] != k.shape[1]):
            return "lengths of k other than q's"
        if k.shape[-2] != q.shape[-2]:
            return "fewer heads of k than of q"
        if self.window_left >= 0 or self.window_right >= 0:
            return "causal or window"
        if self.softcap:
            return "softcap"
        return None if self.cos is None else "rotary"


class AttentionGradient(NamedTuple):
    """Its gradients by q, k and v."""

    grad: Tensor  # like out
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor  # [B, H, N] or [H, T]
    scale: float
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    cos: Tensor | None = None
    sin: Tensor | None = None
    cos_k: Tensor | None = None
    sin_k: Tensor | None = None
    interleaved: bool = False

    @property
    def forward(self) -> Attention:
        """What this is the gradient of."""
        return Attention(self.q, self.k, self.v, *self[6:])
