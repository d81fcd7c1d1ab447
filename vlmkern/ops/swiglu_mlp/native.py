"""SwiGLU on CPU: two products by the routes of ops/_cpu_products.py, with the gate where the first one's route likes it
best: fused into oneDNN's products, in the panels, or a C++ kernel between the two."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import routes
from ...dispatch.extension import dtype_code, extension, extents, lacks
from ...dispatch.targets import Target
from ...packing import packed
from .. import _algebra, _cpu_products
from .._algebra import as_rows
from .._cpu_products import dense, onednn_packed
from .problem import SwiGLU, SwiGLUGradient


def supports(p: SwiGLU, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.x.dtype)


supports_bwd = supports


def kernel(p: SwiGLU) -> str:
    """Which of them runs."""
    if _takes_halves(p):
        return "oneDNN, halves apart"
    route = _route(p)
    return "panels in float32" if route == "panels" else f"{route}, silu_mul_fwd"


def swiglu_mlp(p: SwiGLU) -> Tensor:
    """See reference.py."""
    rows, shape = as_rows(p.x), (*p.x.shape[:-1], len(p.w_down))
    if _takes_halves(p):
        return _cpu_products.linear(_hidden(rows, p.w_up, p.b_up), p.w_down, p.b_down).view(shape)
    if _route(p) == "panels" and p.w_down.numel() > 0:
        return _cpu_products.swiglu_mlp_in_panels(rows, p.w_up, p.b_up, p.w_down, p.b_down).view(shape)
    return _algebra.swiglu_mlp(*p, silu_mul=silu_mul, product=_cpu_products.linear)


def _route(p: SwiGLU) -> str:
    return _cpu_products.route(p.x.shape[:-1].numel(), p.w_up)


def _takes_halves(p: SwiGLU) -> bool:
    return _route(p) == "oneDNN" and not p.w_up.is_mkldnn and "silu" in routes.epilogues()


def _hidden(rows: Tensor, w_up: Tensor, b_up: Tensor | None) -> Tensor:
    """silu(gate) * value, [M, F]: the activation in the gate's product, the factor in the value's. Against one product
    for both halves and a pass over its result: 1 to 4 % less time from 200 to 2,548 rows in bfloat16."""
    halves = packed("onednn_halves", (w_up,), lambda: [onednn_packed(half) for half in w_up.detach().chunk(2)])
    value, gate = dense(w_up).chunk(2) if halves is None else halves
    b_value, b_gate = (None, None) if b_up is None else b_up.contiguous().chunk(2)
    activated = torch.ops.mkldnn._linear_pointwise(rows, gate, b_gate, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(rows, activated, value, b_value, "mul")


def swiglu_mlp_keep(p: SwiGLU) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    return _algebra.swiglu_mlp_keep(*p, silu_mul=silu_mul, product=_cpu_products.linear)


def swiglu_mlp_bwd(p: SwiGLUGradient) -> list[Tensor]:
    """See reference.py."""
    return _algebra.swiglu_mlp_bwd(*p, silu_mul_bwd=silu_mul_bwd, product=_cpu_products.product)


def silu_mul(up: Tensor) -> Tensor:
    """Rows [M, 2F] = [value | gate] -> silu(gate) * value, [M, F], dense."""
    features = up.shape[1] // 2
    out = up.new_empty(len(up), features)
    extension().silu_mul_fwd(
        dtype_code(up.dtype),
        up.data_ptr(),
        _row_stride(up),
        out.data_ptr(),
        len(up),
        features,
        torch.get_num_threads(),
        extents(up, out),
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
        extents(grad, up, grad_up, hidden),
    )
    return grad_up, hidden


def _row_stride(rows: Tensor) -> int:
    # a single row may carry any stride, as nothing is ever reached by it
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]
