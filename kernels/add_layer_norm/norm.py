"""A residual sum and the layer norm of it in one pass, and its gradient. Ba, Kiros and Hinton (2016).

A row is read once and kept in registers as LO + HI columns, each a power of two: 1152 = 1024 + 128 leaves no lane idle
where 2048 would leave 44 %. Mean and variance are those of two passes over the registers.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import Config, Kernel, launch, select
from ..blocks.strides import in_elements, in_units

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLS = 8192

# of the examples: 13 crops of 27 x 27 patches
_ROWS = 13 * 729


@triton.jit
def _load(p_rows, o_row, stride, rows, COL: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """WIDTH columns from COL on of the rows o_row, [BM, 1], in float32; zeros beyond the last row and column."""
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    mask = o_row < rows
    if COL + WIDTH > COLS:
        mask = mask & (o_col < COLS)
    return tl.load(p_rows + o_row * stride + o_col, mask=mask, other=0).to(tl.float32)


@triton.jit
def _store(p_rows, o_row, stride, rows, b_rows, COL: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The reverse of `_load`, converting to the tensor's dtype."""
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    mask = o_row < rows
    if COL + WIDTH > COLS:
        mask = mask & (o_col < COLS)
    tl.store(p_rows + o_row * stride + o_col, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def _sum(b_rows):
    return tl.sum(b_rows, 1)[:, None]


@triton.jit
def _centred(b_rows, b_mean, COL: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The rows less their mean; zeros beyond the last column."""
    b_rows = b_rows - b_mean
    if COL + WIDTH > COLS:
        b_rows = tl.where((COL + tl.arange(0, WIDTH))[None, :] < COLS, b_rows, 0.0)
    return b_rows


@triton.jit
def _standardised(b_lo, b_hi, eps, COLS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """Rows of mean 0 and variance 1, and the inverse of what was their standard deviation, [BM, 1]."""
    b_mean = _sum(b_lo)
    if HI:
        b_mean += _sum(b_hi)
    b_mean = b_mean / COLS
    b_lo = _centred(b_lo, b_mean, 0, LO, COLS)
    b_squares = _sum(b_lo * b_lo)
    if HI:
        b_hi = _centred(b_hi, b_mean, LO, HI, COLS)
        b_squares += _sum(b_hi * b_hi)
    b_scale = 1 / tl.sqrt(b_squares / COLS + eps)
    return b_lo * b_scale, b_hi * b_scale, b_scale


@triton.jit
def _add_part(
    p_x,
    p_residual,
    p_summed,
    o_row,
    stride_x,
    stride_residual,
    rows,
    COL: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
):
    """WIDTH columns of x + residual, as rounded when stored."""
    b_sum = _load(p_x, o_row, stride_x, rows, COL, WIDTH, COLS)
    if p_residual is not None:
        b_sum += _load(p_residual, o_row, stride_residual, rows, COL, WIDTH, COLS)
        b_sum = b_sum.to(p_summed.dtype.element_ty)
        _store(p_summed, o_row, COLS, rows, b_sum, COL, WIDTH, COLS)
    return b_sum.to(tl.float32)


@triton.jit
def _store_normed(
    p_normed,
    p_weight,
    p_bias,
    o_row,
    rows,
    b_rows,
    COL: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
):
    """WIDTH columns of rows * weight + bias."""
    if p_weight is not None:
        b_rows *= _load(p_weight, tl.zeros([1, 1], tl.int32), 0, 1, COL, WIDTH, COLS)
    if p_bias is not None:
        b_rows += _load(p_bias, tl.zeros([1, 1], tl.int32), 0, 1, COL, WIDTH, COLS)
    _store(p_normed, o_row, COLS, rows, b_rows, COL, WIDTH, COLS)


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
    stride_x, stride_residual = in_elements(stride_x, UNIT), in_elements(stride_residual, UNIT)
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    b_lo = _add_part(p_x, p_residual, p_summed, o_row, stride_x, stride_residual, rows, 0, LO, COLS)
    b_hi = b_lo
    if HI:
        b_hi = _add_part(p_x, p_residual, p_summed, o_row, stride_x, stride_residual, rows, LO, HI, COLS)
    b_lo, b_hi, _ = _standardised(b_lo, b_hi, eps, COLS, LO, HI)
    _store_normed(p_normed, p_weight, p_bias, o_row, rows, b_lo, 0, LO, COLS)
    if HI:
        _store_normed(p_normed, p_weight, p_bias, o_row, rows, b_hi, LO, HI, COLS)


@triton.jit
def _load_part(
    p_grad,
    p_summed,
    p_weight,
    o_row,
    stride_grad,
    stride_summed,
    rows,
    COL: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
):
    """WIDTH columns of the gradient by normed, the same times weight, and of summed."""
    b_grad = _load(p_grad, o_row, stride_grad, rows, COL, WIDTH, COLS)
    b_weighted = b_grad
    if p_weight is not None:
        b_weighted = b_grad * _load(p_weight, tl.zeros([1, 1], tl.int32), 0, 1, COL, WIDTH, COLS)
    return b_grad, b_weighted, _load(p_summed, o_row, stride_summed, rows, COL, WIDTH, COLS)


@triton.jit
def _store_gradient(
    p_d_x,
    p_grad_summed,
    o_row,
    stride_grad_summed,
    rows,
    b_d_x,
    COL: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
):
    if p_grad_summed is not None:
        b_d_x += _load(p_grad_summed, o_row, stride_grad_summed, rows, COL, WIDTH, COLS)
    _store(p_d_x, o_row, COLS, rows, b_d_x, COL, WIDTH, COLS)


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
    stride_grad, stride_summed = in_elements(stride_grad, UNIT), in_elements(stride_summed, UNIT)
    stride_grad_summed = in_elements(stride_grad_summed, UNIT)
    b_d_weight_lo = tl.zeros([1, LO], tl.float32)
    b_d_bias_lo = tl.zeros([1, LO], tl.float32)
    b_d_weight_hi, b_d_bias_hi = b_d_weight_lo, b_d_bias_lo
    if HI:
        b_d_weight_hi = tl.zeros([1, HI], tl.float32)
        b_d_bias_hi = tl.zeros([1, HI], tl.float32)
    for i_block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        o_row = tl.cast(i_block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        b_grad_lo, b_weighted_lo, b_lo = _load_part(
            p_grad, p_summed, p_weight, o_row, stride_grad, stride_summed, rows, 0, LO, COLS
        )
        b_grad_hi, b_weighted_hi, b_hi = b_grad_lo, b_weighted_lo, b_lo
        if HI:
            b_grad_hi, b_weighted_hi, b_hi = _load_part(
                p_grad, p_summed, p_weight, o_row, stride_grad, stride_summed, rows, LO, HI, COLS
            )
        b_lo, b_hi, b_scale = _standardised(b_lo, b_hi, eps, COLS, LO, HI)
        b_mean = _sum(b_weighted_lo)
        b_along = _sum(b_weighted_lo * b_lo)
        if HI:
            b_mean += _sum(b_weighted_hi)
            b_along += _sum(b_weighted_hi * b_hi)
        b_mean, b_along = b_mean / COLS, b_along / COLS
        b_d_x = (b_weighted_lo - b_mean - b_lo * b_along) * b_scale
        _store_gradient(p_d_x, p_grad_summed, o_row, stride_grad_summed, rows, b_d_x, 0, LO, COLS)
        if HI:
            b_d_x = (b_weighted_hi - b_mean - b_hi * b_along) * b_scale
            _store_gradient(p_d_x, p_grad_summed, o_row, stride_grad_summed, rows, b_d_x, LO, HI, COLS)
        if PARAMETERS:
            b_d_weight_lo += tl.sum(b_grad_lo * b_lo, 0)[None, :]
            b_d_bias_lo += tl.sum(b_grad_lo, 0)[None, :]
            if HI:
                b_d_weight_hi += tl.sum(b_grad_hi * b_hi, 0)[None, :]
                b_d_bias_hi += tl.sum(b_grad_hi, 0)[None, :]
    if PARAMETERS:
        o_share = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
        shares = tl.num_programs(0)
        _store(p_d_weight, o_share, COLS, shares, b_d_weight_lo, 0, LO, COLS)
        _store(p_d_bias, o_share, COLS, shares, b_d_bias_lo, 0, LO, COLS)
        if HI:
            _store(p_d_weight, o_share, COLS, shares, b_d_weight_hi, LO, HI, COLS)
            _store(p_d_bias, o_share, COLS, shares, b_d_bias_hi, LO, HI, COLS)


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
        launch(add_layer_norm_fwd_kernel, grid, args, config, UNIT=unit, **_columns(x.shape[-1]))
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
    launch(add_layer_norm_bwd_kernel, (programs,), args, config, PARAMETERS=parameters, UNIT=unit, **_columns(cols))
    return d_x, *(None if share is None else share.sum(0) for share in shares)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _columns(cols: int) -> dict[str, Any]:
    lo = 1 << cols.bit_length() - 1
    return {"COLS": cols, "LO": lo, "HI": 0 if cols == lo else 1 << (cols - lo - 1).bit_length()}


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
