"""Linear layers on GPUs: a library's product, then, where something is left to do, one pass of a Triton kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import BackendUnavailable
from ..kernels import linear as kernels
from ..ops import _algebra
from ..ops._algebra import activate, as_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """See `vlmkern.reference.linear.linear`."""
    _require("linear", x.dtype)
    if activation == "none" and residual is None:
        return F.linear(x, weight, bias)
    if x.numel() == 0 or weight.numel() == 0:
        y = activate(F.linear(x, weight, bias), activation)
        return y if residual is None else y + residual
    rows, outputs = as_rows(x), len(weight)
    if activation == "gelu_tanh" and bias is not None and residual is None and x.is_cuda:
        # cuBLASLt's own epilogue, which saves a pass; on CPUs the same function of torch's is the other GELU
        y = torch._addmm_activation(bias, rows, weight.T, use_gelu=True)
    else:
        others = None if residual is None else as_rows(residual)
        y = kernels.finish_(F.linear(rows, weight), bias, activation, others)
    return y.view(*x.shape[:-1], outputs)


def linear_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, wanted: list[bool]
) -> list[Tensor]:
    """See `vlmkern.reference.linear.linear_bwd`."""
    _require("linear_bwd", x.dtype)
    if activation == "none" or not any(wanted[:3]) or grad.numel() == 0:
        return _algebra.linear_bwd(grad, x, weight, bias, activation, wanted)
    d_out, before = as_rows(grad), F.linear(as_rows(x), weight)
    d_linear = kernels.activation_bwd_(d_out, before, bias, activation)
    grads = _algebra.linear_bwd(d_linear, x, weight, bias, "none", [*wanted[:3], False])
    if wanted[3]:
        # a copy: an op's result must not share memory with its arguments
        grads.append(grad.clone(memory_format=torch.contiguous_format))
    return grads


def _require(op: str, dtype: torch.dtype) -> None:
    if dtype not in kernels.DTYPES:
        raise BackendUnavailable(f"backend 'triton' has no {op} kernel for {dtype}")
