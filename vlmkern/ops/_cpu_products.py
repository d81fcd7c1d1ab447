"""Matrix products on CPUs, for every op and gradient that has some: y = act(x W^T + bias) + residual by the routes of
`vlmkern.dispatch.routes`, whose table says which is the fastest where.

oneDNN is reached through torch's own `mkldnn` ops, not through F.linear: in float32 that calls MKL, and it has no
epilogues. Both take from `torch.set_float32_matmul_precision` and `torch.backends.mkldnn.matmul.fp32_precision` what
torch itself takes: at "medium" and "bf16" oneDNN may multiply float32 in bfloat16, which it does on CPUs with AMX
(errors of 1e-3 of the largest value) and not on others (1.4e-6 on Zen 4, as at the default); "high" and "tf32" change
something on CPUs with AMX-FP16 only. A few rows are always multiplied in float32: their time is that of reading the
weight.

Weights of packed modules are kept in oneDNN's blocked layout, where the route is oneDNN's: 4 to 10 % faster, at the
price of a copy (see `vlmkern.packing`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import routes
from ..dispatch.extension import dtype_code, extension, extents, lacks
from ..packing import packed
from . import _algebra

_POST_OPS = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}

# of a panel of weights. Zen 4, 729 rows: with panels of 256 outputs the rows are read more often, which takes 3 to 9 %
# longer; with 2,000 the panels leave the caches, 5 to 30 % where there are few rows
_PANEL_OUTPUTS = 1024
_PANEL_BYTES = 8 << 20
# of x that are converted at once: a panel's results stay in the cache, and converting the weights again costs 1 %
_BLOCK_ROWS = 2048


def route(rows: int, weight: Tensor) -> str:
    """By which route `linear` goes for so many rows."""
    if weight.is_mkldnn:
        return "oneDNN"
    if rows == 0 or weight.numel() == 0:
        return "torch"
    return "few_rows" if rows <= routes.few_rows(weight.dtype) else routes.here(weight.dtype)


def linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """act(rows weight^T + bias) + residual of rows [M, C], weight [E, C], bias [E] and residual [M, E], any strides, to
    [M, E], dense."""
    way = route(len(rows), weight)
    if way == "few_rows":
        y = _activate_(_few_rows(rows, weight, bias), activation)
        return y if residual is None else y.add_(residual)
    if way == "panels":
        return _in_panels(rows, weight, bias, activation, residual, rows.dtype)
    if way == "oneDNN":
        return _by_onednn(rows, _for_onednn(weight), bias, activation, residual)
    return _by_torch(rows, weight, bias, activation, residual)


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b^T + bias of matrices [M, K] and [N, K], any strides: the products of backwards. Nothing is packed, as weights
    that are trained change before they come back."""
    way = "torch" if a.numel() == 0 or b.numel() == 0 else routes.here(a.dtype)
    if way == "panels":
        return _in_panels(a, b, bias, "none", None, a.dtype)
    # oneDNN reads transposed operands in place; other dtypes' products reach it through torch
    if way == "oneDNN" and a.dtype == torch.float32:
        return _by_onednn(dense(a), dense(b), bias, "none", None)
    return _by_torch(a, b, bias, "none", None)


def swiglu_mlp_in_panels(
    rows: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None
) -> Tensor:
    """(silu(gate) * value) w_down^T + b_down, [M, E], with the hidden values in float32, of a block of rows at a
    time."""
    y = rows.new_empty(len(rows), len(w_down))
    w_value, w_gate = w_up.chunk(2)
    b_value, b_gate = (None, None) if b_up is None else b_up.chunk(2)
    for block, out in zip(rows.split(_BLOCK_ROWS), y.split(_BLOCK_ROWS), strict=True):
        block = block.float()
        hidden = block.new_empty(len(block), len(w_gate))
        halves = zip(_panels(w_value, b_value), _panels(w_gate, b_gate), strict=True)
        for (features, *of_value), (_, *of_gate) in halves:
            torch.mul(_float32(block, *of_gate, "silu"), _float32(block, *of_value), out=hidden[:, features])
        out.copy_(_in_panels(hidden, w_down, b_down, "none", None, rows.dtype))
    return y


def onednn_packed(weight: Tensor) -> Tensor:
    """A copy in oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def dense(matrix: Tensor) -> Tensor:
    """The matrix, copied if it is a view with gaps between rows: oneDNN takes a thousand times as long for some, and
    with AMX torch reads past their rows."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


def _in_panels(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`linear` in float32 and rounded once, to `dtype`. The rows may be float32 already."""
    y = rows.new_empty(len(rows), len(weight), dtype=dtype)
    for first in range(0, len(rows), _BLOCK_ROWS):
        block = slice(first, first + _BLOCK_ROWS)
        x = dense(rows[block].float())
        for outputs, *of_panel in _panels(weight, bias):
            panel = _float32(x, *of_panel, activation)
            y[block, outputs] = panel if residual is None else panel.add_(residual[block, outputs])
    return y


def _panels(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Weight and bias in float32, some outputs at a time, about as many each time: (which, theirs, theirs).
    The next ones take the place of those before."""
    outputs, inputs = weight.shape
    most = min(_PANEL_OUTPUTS, max(16, _PANEL_BYTES // (4 * inputs)))
    each = -(-outputs // (16 * -(-outputs // most))) * 16
    # one buffer for all: a new one for each is mapped into memory each time in many a process, at five times the cost
    buffer = torch.empty_like(weight[:each], dtype=torch.float32)
    for first in range(0, outputs, each):
        which = slice(first, first + each)
        panel = buffer[: outputs - first].copy_(weight[which])
        yield which, dense(panel), None if bias is None else bias[which].float()


def _float32(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    way = _by_onednn if routes.here(torch.float32) == "oneDNN" else _by_torch
    return way(rows, weight, bias, activation, None)


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    onednn, bias = torch.ops.mkldnn._linear_pointwise, _dense_vector(bias)
    if residual is not None and activation == "none":
        return onednn.binary(rows, residual, weight, bias, "add")
    fused = activation if activation in routes.epilogues() else "none"
    name, algorithm = _POST_OPS[fused]
    y = onednn(rows, weight, bias, name, [], algorithm)
    if fused != activation:
        _activate_(y, activation)
    return y if residual is None else y.add_(residual)


def _by_torch(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    y = _activate_(F.linear(dense(rows), dense(weight), bias), activation)
    return y if residual is None else y.add_(residual)


def _activate_(y: Tensor, activation: str) -> Tensor:
    """In place, of a dense result."""
    if activation != "quick_gelu" or lacks(y.dtype) is not None:
        return _algebra.activate_(y, activation)
    extension().quick_gelu(dtype_code(y.dtype), y.data_ptr(), y.numel(), torch.get_num_threads(), extents(y))
    return y


def _few_rows(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, weight = _unit_last_stride(rows), _unit_last_stride(weight)
    bias = _dense_vector(bias)
    y = rows.new_empty(len(rows), len(weight))
    most = extension().max_linear_rows
    for x, out in zip(rows.split(most), y.split(most), strict=True):
        extension().linear_few_rows(
            dtype_code(x.dtype),
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            len(x),
            weight.shape[1],
            len(weight),
            torch.get_num_threads(),
            extents(x, weight, bias, out),
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
