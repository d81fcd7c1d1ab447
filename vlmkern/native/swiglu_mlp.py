"""SwiGLU on CPU: native linear layers, with the C++ kernel of csrc/cpu/swiglu_mlp.cpp between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import swiglu_mlp as reference
from . import dtype_code, extension, require_dtype
from .linear import linear_or_torch


def swiglu_mlp(x: Tensor, *args: Any) -> Tensor:
    """See `vlmkern.reference.swiglu_mlp.swiglu_mlp`."""
    require_dtype("swiglu_mlp", x.dtype)
    return reference.swiglu_mlp(x, *args, silu_mul=silu_mul, linear=linear_or_torch)


def swiglu_mlp_bwd(grad: Tensor, *args: Any) -> list[Tensor]:
    """See `vlmkern.reference.swiglu_mlp.swiglu_mlp_bwd`."""
    require_dtype("swiglu_mlp_bwd", grad.dtype)
    return reference.swiglu_mlp_bwd(grad, *args, silu_mul_bwd=silu_mul_bwd)


def silu_mul(up: Tensor) -> Tensor:
    """[..., 2F] = [value | gate] -> silu(gate) * value, [..., F], dense."""
    rows = up.reshape(-1, up.shape[-1])
    features = up.shape[-1] // 2
    out = up.new_empty((*up.shape[:-1], features))
    extension().silu_mul_fwd(
        dtype_code(up.dtype),
        rows.data_ptr(),
        _row_stride(rows),
        out.data_ptr(),
        len(rows),
        features,
        torch.get_num_threads(),
    )
    return out


def silu_mul_bwd(grad: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient by `up`, [M, 2F], and the recomputed output, [M, F], of rows `up` [M, 2F], grad [M, F]."""
    grad = grad.contiguous()
    grad_up, hidden = torch.empty_like(up), torch.empty_like(grad)
    extension().silu_mul_bwd(
        dtype_code(up.dtype),
        grad.data_ptr(),
        up.data_ptr(),
        _row_stride(up),
        grad_up.data_ptr(),
        hidden.data_ptr(),
        len(up),
        grad.shape[1],
        torch.get_num_threads(),
    )
    return grad_up, hidden


def _row_stride(rows: Tensor) -> int:
    # a single row may carry any stride, as nothing is ever reached by it
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]
