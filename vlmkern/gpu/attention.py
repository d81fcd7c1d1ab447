"""Attention on GPUs: the Triton kernels of `vlmkern.kernels.attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._backends import BackendUnavailable
from ..kernels import attention as kernels
from ..kernels import attention_bwd as kernels_bwd


def attention(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """See `vlmkern.reference.attention.attention`."""
    _require("attention", q)
    return kernels.attention_fwd(q, *args)


def attention_bwd(grad: Tensor, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `vlmkern.reference.attention.attention_bwd`."""
    _require("attention_bwd", q)
    return kernels_bwd.attention_bwd(grad, q, *args)


def _require(op: str, q: Tensor) -> None:
    if q.dtype not in kernels.DTYPES or q.shape[-1] > kernels.MAX_HEAD_DIM:
        raise BackendUnavailable(
            f"backend 'triton' has no {op} kernel for head dimension {q.shape[-1]} in {q.dtype}; it takes up to "
            f"{kernels.MAX_HEAD_DIM} in float32, bfloat16 and float16"
        )
