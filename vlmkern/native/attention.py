"""Attention on CPU: the C++ kernel of csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.attention import lse_shape
from . import dtype_code, extension, require_dtype


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """See `vlmkern.reference.attention.attention`."""
    require_dtype("attention", q.dtype)
    out, lse = q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=torch.float32)
    batch, tokens, heads, head_dim = q.shape if cu_seqlens is None else (1, *q.shape)
    bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
    strides = [t.stride()[:3] if bounds is None else (0, *t.stride()[:2]) for t in (q, k, v)]
    extension().attention_fwd(
        dtype_code(q.dtype),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        *strides,
        out.data_ptr(),
        lse.data_ptr(),
        batch,
        tokens,
        heads,
        head_dim,
        0 if bounds is None else bounds.data_ptr(),
        0 if bounds is None else len(bounds) - 1,
        scale,
        torch.get_num_threads(),
    )
    return out, lse
