"""Attention on CPU: the C++ kernels of csrc/cpu/attention/forward.cpp and csrc/cpu/attention/backward.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch.extension import dtype_code, extension, extents, lacks
from ...dispatch.targets import Target
from .._algebra import lse_shape
from .problem import Attention, AttentionGradient


def supports(p: Attention | AttentionGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.q.dtype)


supports_bwd = supports


def attention(p: Attention) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    q, k, v = p.q, p.k, p.v
    out, lse = q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=torch.float32)
    asked = _Asked(p)
    extension().attention_fwd(
        dtype_code(q.dtype),
        *(_strided(t) for t in (q, k, v)),
        out.data_ptr(),
        lse.data_ptr(),
        *asked.values(),
        torch.get_num_threads(),
        extents(q, k, v, out, lse, *asked.tensors()),
    )
    return out, lse


def attention_bwd(p: AttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.py."""
    q, k, v, out, lse = p.q, p.k, p.v, p.out, p.lse.contiguous()
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v))
    # the gradient comes as autograd made it: of a sum, for one, with strides of zero
    grad = p.grad if p.grad.stride(-1) == 1 else p.grad.contiguous()
    asked = _Asked(p.forward)
    extension().attention_bwd(
        dtype_code(q.dtype),
        *(_strided(t) for t in (grad, q, k, v, out)),
        lse.data_ptr(),
        *(t.data_ptr() for t in grads),
        *asked.values(),
        torch.get_num_threads(),
        extents(grad, q, k, v, out, lse, *grads, *asked.tensors()),
    )
    return grads


class _Asked:
    """What the forward and its gradients are told alike, and the tensors of it, which it keeps alive."""

    def __init__(self, p: Attention) -> None:
        self._p = p
        self._bounds = [None if t is None else t.contiguous() for t in (p.cu_seqlens, p.cu_seqlens_k)]
        self._tables = () if p.cos is None else (p.cos, p.sin, *p.tables_k)

    def values(self) -> tuple[Any, ...]:
        p = self._p
        first = self._bounds[0]
        segments = 0 if first is None else len(first) - 1
        return (
            _sizes(p.q, p.k),
            (*(0 if t is None else t.data_ptr() for t in self._bounds), segments),
            (p.scale, p.softcap, p.window_left, p.window_right),
            ([_table(t) for t in self._tables], p.interleaved),
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (*self._bounds, *(self._tables or (None,) * 4))


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Batch, queries, keys, heads, heads of keys and head dimension; one batch when packed."""
    batch = q.shape[0] if q.dim() == 4 else 1
    return batch, q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1]


def _strided(t: Tensor) -> tuple[int, tuple[int, ...]]:
    return t.data_ptr(), (t.stride()[:3] if t.dim() == 4 else (0, *t.stride()[:2]))


def _table(t: Tensor) -> tuple[int, int, int]:
    """Address, strides of images and tokens."""
    return t.data_ptr(), (t.stride(0) if t.dim() == 3 else 0), t.stride(-2)
