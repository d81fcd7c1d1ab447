"""Linear layers on GPUs: a library's product, then, where something is left to do, one pass of a Triton kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch.targets import Target
from ...kernels.linear import epilogue as kernels
from .. import _algebra
from .._algebra import activate, as_rows
from .problem import Linear, LinearGradient


def supports(p: Linear, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return None if p.x.dtype in kernels.DTYPES else f"it has no kernel for {p.x.dtype}"


supports_bwd = supports


def linear(p: Linear) -> Tensor:
    """See reference.py."""
    x, weight, bias, activation, residual = p
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


def linear_keep(p: Linear) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    x, weight, bias, activation, residual = p
    before = F.linear(x, weight, bias)
    if before.numel() == 0:
        return activate(before.clone(), activation), before
    others = None if residual is None else as_rows(residual)
    return kernels.finish_(as_rows(before).clone(), None, activation, others).view(before.shape), before


def linear_bwd(p: LinearGradient) -> list[Tensor]:
    """See reference.py."""
    grad, x, weight, bias, activation, wanted, before = p
    if activation == "none" or not any(wanted[:3]) or grad.numel() == 0:
        return _algebra.linear_bwd(*p)
    d_out = as_rows(grad)
    if before is None:
        d_linear = kernels.activation_bwd_(d_out, F.linear(as_rows(x), weight), bias, activation)
    else:
        # a copy: what is kept belongs to autograd
        mine = as_rows(before).clone(memory_format=torch.contiguous_format)
        d_linear = kernels.activation_bwd_(d_out, mine, None, activation)
    grads = _algebra.linear_bwd(d_linear, x, weight, bias, "none", [*wanted[:3], False])
    if wanted[3]:
        # a copy: an op's result must not share memory with its arguments
        grads.append(grad.clone(memory_format=torch.contiguous_format))
    return grads
