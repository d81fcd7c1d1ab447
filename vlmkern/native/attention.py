"""Attention on CPU: the C++ kernels of csrc/cpu/attention.cpp and csrc/cpu/attention_bwd.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._algebra import lse_shape
from . import dtype_code, extension, require_dtype
from .memory import extents


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """See `vlmkern.reference.attention.attention`."""
    require_dtype("attention", q.dtype)
    out, lse = q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=torch.float32)
    bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
    inputs = (q, k, v)
    extension().attention_fwd(
        dtype_code(q.dtype),
        *(t.data_ptr() for t in inputs),
        *(_strides(t) for t in inputs),
        out.data_ptr(),
        lse.data_ptr(),
        *_sizes(q),
        *_segments(bounds),
        scale,
        torch.get_num_threads(),
        extents(*inputs, out, lse, bounds),
    )
    return out, lse


def attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `vlmkern.reference.attention.attention_bwd`."""
    require_dtype("attention_bwd", q.dtype)
    grads = tuple(q.new_empty(q.shape) for _ in range(3))
    bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
    # the gradient comes as autograd made it: of a sum, for one, with strides of zero
    inputs = (grad if grad.stride(-1) == 1 else grad.contiguous(), q, k, v, out)
    lse = lse.contiguous()
    extension().attention_bwd(
        dtype_code(q.dtype),
        *(t.data_ptr() for t in inputs),
        *(_strides(t) for t in inputs),
        lse.data_ptr(),
        *(t.data_ptr() for t in grads),
        *_sizes(q),
        *_segments(bounds),
        scale,
        torch.get_num_threads(),
        extents(*inputs, lse, *grads, bounds),
    )
    return grads


def _sizes(q: Tensor) -> tuple[int, ...]:
    """Batch, tokens, heads and head dimension; one batch when packed."""
    return tuple(q.shape) if q.dim() == 4 else (1, *q.shape)


def _strides(t: Tensor) -> tuple[int, ...]:
    return t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2])


def _segments(bounds: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bounds is None else (bounds.data_ptr(), len(bounds) - 1)
