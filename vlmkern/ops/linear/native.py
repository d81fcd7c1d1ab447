"""Linear layers on CPU: the C++ kernel of csrc/cpu/linear/few_rows.cpp for a few rows, for more oneDNN with fused
epilogues.

oneDNN is reached through torch's own `mkldnn` ops, not through F.linear: in float32 that calls MKL, which takes a slow
path on other vendors' CPUs (100 against 235 GFLOP/s a core on Zen 5), and it has no epilogues.

Weights of packed modules are kept in oneDNN's blocked layout: 4 to 10 % faster, at the price of a copy (see
`vlmkern.packing`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch.extension import dtype_code, extension, extents, lacks
from ...dispatch.targets import Target, of_device, onednn_has
from ...packing import packed
from .. import _algebra
from .._algebra import activate, as_rows
from .problem import Linear, LinearGradient

_POST_OPS = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}


def supports(p: Linear, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return _lacks(p.x, p.weight, target)


def supports_bwd(p: LinearGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.grad.dtype)


def kernel(p: Linear) -> str:
    """Which of them runs."""
    few = p.x.shape[:-1].numel() <= extension().max_linear_rows and not p.weight.is_mkldnn
    return "linear_few_rows" if few else "oneDNN"


def linear(p: Linear) -> Tensor:
    """See reference.py."""
    return _linear(*p)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    if x.numel() == 0 or weight.numel() == 0:
        y = activate(F.linear(x, weight, bias), activation)
        return y if residual is None else y.add_(residual)
    outputs = len(weight)
    rows = as_rows(x)
    if len(rows) <= extension().max_linear_rows and not weight.is_mkldnn:
        y = activate(_few_rows(rows, weight, bias), activation).view(*x.shape[:-1], outputs)
        return y if residual is None else y.add_(residual)
    weight, bias = _for_onednn(weight), _dense_vector(bias)
    onednn = torch.ops.mkldnn._linear_pointwise
    if residual is not None and activation == "none":
        return onednn.binary(rows, as_rows(residual), weight, bias, "add").view(*x.shape[:-1], outputs)
    name, algorithm = _POST_OPS[activation]
    y = onednn(rows, weight, bias, name, [], algorithm).view(*x.shape[:-1], outputs)
    return y if residual is None else y.add_(residual)


def linear_bwd(p: LinearGradient) -> list[Tensor]:
    """See reference.py."""
    return _algebra.linear_bwd(*p, product=product)


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b^T + bias of matrices [M, K] and [N, K], any strides: the products of backwards. Nothing is packed, as weights
    that are trained change before they come back."""
    # oneDNN reads transposed operands in place; other dtypes' products reach it through torch, which with AMX reads
    # past the rows of views with gaps
    if a.dtype != torch.float32 or a.numel() == 0 or b.numel() == 0 or not onednn_has(a.dtype):
        return F.linear(dense(a), dense(b), bias)
    return torch.ops.mkldnn._linear_pointwise(dense(a), dense(b), _dense_vector(bias), "none", [], "")


def dense(matrix: Tensor) -> Tensor:
    """The matrix, copied if it is a view with gaps between rows: oneDNN takes a thousand times as long for some."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


def takes_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Whether x W^T of rows [M, C] and weight [E, C] is oneDNN's to compute."""
    return (
        len(rows) > extension().max_linear_rows and rows.numel() > 0 and weight.numel() > 0 and onednn_has(rows.dtype)
    )


def onednn_packed(weight: Tensor) -> Tensor:
    """A copy in oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear_or_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, by torch where there is no native way."""
    if _lacks(x, weight, of_device("cpu")) is None:
        return _linear(x, weight, bias, "none", None)
    return F.linear(x, dense(weight), bias)


def _lacks(x: Tensor, weight: Tensor, target: Target) -> str | None:
    reason = lacks(x.dtype)
    if reason is not None or x.dtype in target.onednn or weight.is_mkldnn:
        return reason
    rows, most = x.shape[:-1].numel(), extension().max_linear_rows
    if rows <= most or x.shape[-1] == 0 or len(weight) == 0:
        return None
    return f"it has no kernel for {rows} rows of {x.dtype}: its own takes up to {most}, and oneDNN none on this CPU"


def _few_rows(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, weight = _unit_last_stride(rows), _unit_last_stride(weight)
    bias = _dense_vector(bias)
    y = rows.new_empty(len(rows), weight.shape[0])
    extension().linear_few_rows(
        dtype_code(rows.dtype),
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        len(rows),
        weight.shape[1],
        weight.shape[0],
        torch.get_num_threads(),
        extents(rows, weight, bias, y),
    )
    return y


def _unit_last_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def _dense_vector(bias: Tensor | None) -> Tensor | None:
    # oneDNN and the kernels take a bias for dense, whatever its stride
    return None if bias is None else bias.contiguous()


def _for_onednn(weight: Tensor) -> Tensor:
    """The weight in oneDNN's layout where its module is packed, else the weight itself."""
    if weight.is_mkldnn:
        return weight
    copy = packed("onednn", (weight,), lambda: onednn_packed(weight.detach()))
    return dense(weight) if copy is None else copy
