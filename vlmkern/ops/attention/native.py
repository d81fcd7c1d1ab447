"""Attention on CPU: the C++ kernels of csrc/cpu/attention/forward.cpp and csrc/cpu/attention/backward.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch.extension import dtype_code, extension, extents, lacks
from ...dispatch.targets import Target
from .._algebra import lse_shape
from .problem import Attention, AttentionGradient


def supports(p: Attention, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.q.dtype) or (p.extra and f"it has no kernel for {p.extra}")


def supports_bwd(p: AttentionGradient, target: Target) -> str | None:
    """The same of its gradients."""
    return supports(p.forward, target)


def attention(p: Attention) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    q, k, v, scale, cu_seqlens = p[:5]
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


def attention_bwd(p: AttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.py."""
    grad, q, k, v, out, lse, scale, cu_seqlens = p[:8]
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
