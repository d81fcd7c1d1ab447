"""SwiGLU on GPUs: one Triton product for both halves of the gate, or library products around an elementwise kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import BackendUnavailable
from ..kernels import swiglu_mlp as kernels
from ..ops import _algebra
from ..ops._algebra import as_rows


def swiglu_mlp(x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None) -> Tensor:
    """See `vlmkern.reference.swiglu_mlp.swiglu_mlp`."""
    _require("swiglu_mlp", x.dtype)
    rows = as_rows(x)
    if not kernels.takes(rows, w_up):
        return _algebra.swiglu_mlp(x, w_up, w_down, b_up, b_down, silu_mul=kernels.silu_mul)
    hidden = kernels.swiglu_mlp_fwd(rows, w_up, b_up)
    return F.linear(hidden, w_down, b_down).view(*x.shape[:-1], len(w_down))


def swiglu_mlp_bwd(grad: Tensor, *args: Any) -> list[Tensor]:
    """See `vlmkern.reference.swiglu_mlp.swiglu_mlp_bwd`."""
    _require("swiglu_mlp_bwd", grad.dtype)
    return _algebra.swiglu_mlp_bwd(grad, *args, silu_mul_bwd=kernels.silu_mul_bwd)


def _require(op: str, dtype: torch.dtype) -> None:
    if dtype not in kernels.DTYPES:
        raise BackendUnavailable(f"backend 'triton' has no {op} kernel for {dtype}")
