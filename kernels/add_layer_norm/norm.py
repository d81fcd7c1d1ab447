"""A residual sum and the layer norm of it in one pass, and its gradient. Ba, Kiros and Hinton (2016).

A row is read once and kept in registers, in two parts (`blocks.parts`). Mean and variance are those of two passes over
the registers.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import Config, Kernel, launch, select
from ..blocks import parts
from ..blocks.strides import in_elements, in_units

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLS = 8192

# of the examples: 13 crops of 27 x 27 patches
_ROWS = 13 * 729


@triton.jit
def _standardised(b_rows, eps, COLS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """Rows of mean 0 and variance 1, and the inverse of what was their standard deviation, [BM, 1]."""
    b_mean = parts.row_sum(b_rows) / COLS
    b_centred = (b_rows[0] - b_mean,)
    if HI:
        b_hi = b_rows[1] - b_mean
        if LO + HI > COLS:
            b_hi = tl.where((LO + tl.arange(0, HI))[None, :] < COLS, b_hi, 0.0)
        b_centred += (b_hi,)
    b_scale = 1 / tl.sqrt(parts.row_sum(parts.product(b_centred, b_centred)) / COLS + eps)
    return [b * b_scale for b in b_centred], b_scale


@triton.jit(do_not_specialize=["rows", "stride_x", "stride_residual"])
def add_layer_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_normed,
    p_summed,
    rows,
    stride_x,
    stride_residual,
    eps,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """x and residual [rows, COLS] of row strides stride_x and stride_residual, in units of UNIT -> summed = x +
    residual and its layer norm, both dense; residual, and with it summed, weight [COLS] and bias [COLS] may be None.

    Grid: blocks of rows. FLOPs: about 10 an element. Bytes: each tensor once.
    """
    PARTS: tl.constexpr = 2 if HI else 1
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_row, o_dense = o_row < rows, o_row * COLS
    b_rows = ()
    for i in tl.static_range(PARTS):
        b_sum = parts.load(p_x + o_row * in_elements(stride_x, UNIT), m_row, i, COLS, LO, HI)
        if p_residual is not None:
            b_sum += parts.load(p_residual + o_row * in_elements(stride_residual, UNIT), m_row, i, COLS, LO, HI)
            # as rounded when stored
            b_sum = b_sum.to(p_summed.dtype.element_ty)
            parts.store(p_summed + o_dense, m_row, b_sum, i, COLS, LO, HI)
        b_rows += (b_sum.to(tl.float32),)
    b_rows, _ = _standardised(b_rows, eps, COLS, LO, HI)
    for i in tl.static_range(PARTS):
        b_normed = b_rows[i]
        if p_weight is not None:
            b_normed *= parts.load_vector(p_weight, i, COLS, LO, HI)
        if p_bias is not None:
            b_normed += parts.load_vector(p_bias, i, COLS, LO, HI)
        parts.store(p_normed + o_dense, m_row, b_normed, i, COLS, LO, HI)


@triton.jit(do_not_specialize=["rows", "stride_grad", "stride_grad_summed", "stride_summed"])
def add_layer_norm_bwd_kernel(
    p_grad,
    p_grad_summed,
    p_summed,
    p_weight,
    p_d_x,
    p_d_weight,
    p_d_bias,
    rows,
    stride_grad,
    stride_grad_summed,
    stride_summed,
    eps,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad by normed, grad_summed by summed, which may be None, and summed [rows, COLS], of these row strides in units
    of UNIT -> d_x, dense, and with PARAMETERS each program's share of d_weight and d_bias [programs, COLS] in float32.

    The statistics are computed again from the row at hand. Grid: n programs, each with every n-th block of rows, so
    that the shares are few and their sum is always made in the same order. FLOPs: about 20 an element. Bytes: grad,
    grad_summed, summed and d_x once.
    """
    PARTS: tl.constexpr = 2 if HI else 1
    stride_grad, stride_summed = in_elements(stride_grad, UNIT), in_elements(stride_summed, UNIT)
    b_d_weight = parts.zero_row(LO, HI)
    b_d_bias = b_d_weight
    for i_block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        o_row = tl.cast(i_block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        m_row = o_row < rows
        b_grad, b_weighted, b_rows = (), (), ()
        for i in tl.static_range(PARTS):
            b_grad += (parts.load(p_grad + o_row * stride_grad, m_row, i, COLS, LO, HI),)
            if p_weight is None:
                b_weighted += (b_grad[i],)
            else:
                b_weighted += (b_grad[i] * parts.load_vector(p_weight, i, COLS, LO, HI),)
            b_rows += (parts.load(p_summed + o_row * stride_summed, m_row, i, COLS, LO, HI),)
        b_rows, b_scale = _standardised(b_rows, eps, COLS, LO, HI)
        b_mean, b_along = parts.row_sum(b_weighted), parts.row_sum(parts.product(b_weighted, b_rows))
        b_mean, b_along = b_mean / COLS, b_along / COLS
        for i in tl.static_range(PARTS):
            b_d_x = (b_weighted[i] - b_mean - b_rows[i] * b_along) * b_scale
            if p_grad_summed is not None:
                p_others = p_grad_summed + o_row * in_elements(stride_grad_summed, UNIT)
                b_d_x += parts.load(p_others, m_row, i, COLS, LO, HI)
            parts.store(p_d_x + o_row * COLS, m_row, b_d_x, i, COLS, LO, HI)
        if PARAMETERS:
            b_weight_sums, b_bias_sums = (), ()
            for i in tl.static_range(PARTS):
                b_weight_sums += (b_d_weight[i] + tl.sum(b_grad[i] * b_rows[i], 0)[None, :],)
                b_bias_sums += (b_d_bias[i] + tl.sum(b_grad[i], 0)[None, :],)
            b_d_weight, b_d_bias = b_weight_sums, b_bias_sums
    if PARAMETERS:
        o_share = tl.program_id(0).to(tl.int64) * COLS + tl.zeros([1, 1], tl.int64)
        m_share = tl.full([1, 1], True, tl.int1)
        for i in tl.static_range(PARTS):
            parts.store(p_d_weight + o_share, m_share, b_d_weight[i], i, COLS, LO, HI)
            parts.store(p_d_bias + o_share, m_share, b_d_bias[i], i, COLS, LO, HI)


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Layer norm of x + residual and that sum, dense and of x's shape; without residual, None in place of the sum."""
    normed = x.new_empty(x.shape)
    summed = None if residual is None else x.new_empty(x.shape)
    if x.numel():
        rows = _rows(x)
        others = None if residual is None else _rows(residual)
        config = select("add_layer_norm_fwd_kernel", x, cols=x.shape[-1])
        unit, strides = in_units(x.dtype, rows.stride(0), 0 if others is None else others.stride(0))
        args = (rows, others, _dense(weight), _dense(bias), normed, summed, len(rows), *strides, eps)
        grid = (triton.cdiv(len(rows), config["BLOCK_M"]),)
        launch(add_layer_norm_fwd_kernel, grid, args, config, UNIT=unit, **parts.columns(x.shape[-1]))
    return normed, summed


def add_layer_norm_bwd(
    grad: Tensor, grad_summed: Tensor | None, summed: Tensor, weight: Tensor | None, eps: float, parameters: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients by x (and by the residual, the same), weight and bias; the last two, float32, None unless wanted."""
    d_x, cols = summed.new_empty(summed.shape), summed.shape[-1]
    if summed.numel() == 0:
        zeros = (summed.new_zeros(cols, dtype=torch.float32) for _ in range(2))
        return d_x, *(zeros if parameters else (None, None))
    rows, d_out, d_summed = _rows(summed), _rows(grad), None if grad_summed is None else _rows(grad_summed)
    config = dict(select("add_layer_norm_bwd_kernel", summed, cols=cols))
    programs = min(config.pop("PROGRAMS"), triton.cdiv(len(rows), config["BLOCK_M"]))
    shares = [summed.new_empty(programs, cols, dtype=torch.float32) if parameters else None for _ in range(2)]
    given = (d_out, d_summed, rows)
    unit, strides = in_units(summed.dtype, *(0 if x is None else x.stride(0) for x in given))
    args = (*given, _dense(weight), d_x, *shares, len(rows), *strides, eps)
    constants = {"PARAMETERS": parameters, "UNIT": unit, **parts.columns(cols)}
    launch(add_layer_norm_bwd_kernel, (programs,), args, config, **constants)
    return d_x, *(None if share is None else share.sum(0) for share in shares)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _forward_example(
    dtype: torch.dtype, device: str, cols: int, residual: bool = True
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    x, other = torch.randn(2, _ROWS, cols, dtype=dtype, device=device)
    weight, bias = torch.randn(2, cols, dtype=dtype, device=device)
    return lambda: add_layer_norm_fwd(x, other if residual else None, weight, bias, 1e-6)


def _backward_example(
    dtype: torch.dtype, device: str, cols: int, parameters: bool = True
) -> Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]:
    grad, grad_summed, summed = torch.randn(3, _ROWS, cols, dtype=dtype, device=device)
    weight = torch.randn(cols, dtype=dtype, device=device)
    return lambda: add_layer_norm_bwd(grad, grad_summed, summed, weight, 1e-6, parameters)


def _kernel(
    function: Any, example: Callable[..., Any], flops: int, candidates: tuple[Config, ...], variant: dict[str, Any]
) -> Kernel:
    def cost(size: int, cols: int) -> tuple[float, float]:
        return flops * _ROWS * cols, 4 * _ROWS * cols * size

    return Kernel(
        function,
        example,
        {"cols": 1152},
        cost,
        candidates,
        shapes=tuple({"cols": cols} for cols in (288, 4096, 8192)),
        variants=({}, variant),
    )


KERNELS = (
    _kernel(
        add_layer_norm_fwd_kernel,
        _forward_example,
        10,
        tuple({"BLOCK_M": m, "num_warps": warps} for m in (1, 2, 4) for warps in (1, 2, 4, 8)),
        {"residual": False},
    ),
    _kernel(
        add_layer_norm_bwd_kernel,
        _backward_example,
        20,
        tuple(
            {"BLOCK_M": m, "PROGRAMS": programs, "STAGES": stages, "num_warps": warps}
            for m, warps in ((1, 2), (1, 4), (2, 4))
            for programs in (528, 1056)
            for stages in (1, 2)
        ),
        {"parameters": False},
    ),
)
