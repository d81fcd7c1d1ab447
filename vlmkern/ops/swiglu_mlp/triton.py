"""SwiGLU on GPUs: one Triton product for both halves of the gate, or library products around an elementwise kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...dispatch.targets import Target
from ...kernels.swiglu_mlp import gate as kernels
from .. import _algebra
from .._algebra import as_rows
from .problem import SwiGLU, SwiGLUGradient


def supports(p: SwiGLU, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return None if p.x.dtype in kernels.DTYPES else f"it has no kernel for {p.x.dtype}"


supports_bwd = supports


def kernel(p: SwiGLU) -> str:
    """Which of them runs."""
    return "swiglu_mlp_fwd_kernel" if kernels.takes(as_rows(p.x), p.w_up) else "silu_mul_fwd_kernel"


def swiglu_mlp(p: SwiGLU) -> Tensor:
    """See reference.py."""
    rows = as_rows(p.x)
    if not kernels.takes(rows, p.w_up):
        return _algebra.swiglu_mlp(*p, silu_mul=kernels.silu_mul)
    hidden = kernels.swiglu_mlp_fwd(rows, p.w_up, p.b_up)
    return F.linear(hidden, p.w_down, p.b_down).view(*p.x.shape[:-1], len(p.w_down))


def swiglu_mlp_keep(p: SwiGLU) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    return _algebra.swiglu_mlp_keep(*p, silu_mul=kernels.silu_mul)


def swiglu_mlp_bwd(p: SwiGLUGradient) -> list[Tensor]:
    """See reference.py."""
    return _algebra.swiglu_mlp_bwd(*p, silu_mul_bwd=kernels.silu_mul_bwd)
