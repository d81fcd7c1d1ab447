"""A residual sum and the RMS norm of it in one pass, and its gradient. Zhang and Sennrich (2019).

A row is read once and kept in registers, in two parts (`blocks.parts`). Rows are counted through up to three sizes
(`_rows`), so that a head's view of a fused projection is read in place.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _rows
from .._interpreter import patch_interpreter
from .._launch import Config, Kernel, launch, select
from ..blocks import parts
from ..blocks.strides import in_elements, in_units

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLS = 8192
# they are counted in 32 bits, with a block beyond the last
MAX_ROWS = 2**30

# of the examples: a prompt of nine tiles for each of eight images, whose heads are as many rows again
_ROWS, _HEADS = 8 * 1744, 16


@triton.jit
def _row_pointers(p_x, o_row, middle, inner, outer_stride, middle_stride, inner_stride, LEVELS: tl.constexpr):
    """To the first elements of rows, [BM, 1], that are counted through LEVELS sizes."""
    o_first = tl.zeros_like(o_row).to(tl.int64)
    o_left = o_row
    if LEVELS == 1:
        o_first += o_left.to(tl.int64) * inner_stride
    else:
        o_first += (o_left % inner).to(tl.int64) * inner_stride
        o_left = o_left // inner
        if LEVELS == 2:
            o_first += o_left.to(tl.int64) * middle_stride
        else:
            o_first += (o_left % middle).to(tl.int64) * middle_stride
            o_first += (o_left // middle).to(tl.int64) * outer_stride
    return p_x + o_first


@triton.jit
def _normed(b_rows, eps, COLS: tl.constexpr):
    """Rows of mean square 1, and the inverse of what its root was, [BM, 1]."""
    b_scale = 1 / tl.sqrt(parts.row_sum(parts.product(b_rows, b_rows)) / COLS + eps)
    return [b * b_scale for b in b_rows], b_scale


# what calls of one model differ by, for which kernels are not to be compiled again
_SIZES = ("rows", "middle", "inner")


def _strides_of(*tensors: str) -> tuple[str, ...]:
    return tuple(f"{level}_{tensor}" for tensor in tensors for level in ("outer", "middle", "inner"))


@triton.jit(do_not_specialize=[*_SIZES, *_strides_of("x", "residual")])
def rms_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_normed,
    p_summed,
    rows,
    middle,
    inner,
    outer_x,
    middle_x,
    inner_x,
    outer_residual,
    middle_residual,
    inner_residual,
    eps,
    offset,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    COLS: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """x and residual [rows, COLS], counted through LEVELS sizes of which the last are middle and inner, of strides in
    units of UNIT -> summed = x + residual and its RMS norm times weight [COLS] + offset, both dense; residual, and with
    it summed, may be None.

    Grid: blocks of rows. FLOPs: about 6 an element. Bytes: each tensor once.
    """
    PARTS: tl.constexpr = 2 if HI else 1
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_row = o_row < rows
    o_dense = o_row.to(tl.int64) * COLS
    outer_x, middle_x = in_elements(outer_x, UNIT), in_elements(middle_x, UNIT)
    p_rows = _row_pointers(p_x, o_row, middle, inner, outer_x, middle_x, in_elements(inner_x, UNIT), LEVELS)
    b_rows = ()
    for i in tl.static_range(PARTS):
        b_sum = parts.load(p_rows, m_row, i, COLS, LO, HI)
        if p_residual is not None:
            outer, between = in_elements(outer_residual, UNIT), in_elements(middle_residual, UNIT)
            within = in_elements(inner_residual, UNIT)
            p_others = _row_pointers(p_residual, o_row, middle, inner, outer, between, within, LEVELS)
            b_sum += parts.load(p_others, m_row, i, COLS, LO, HI)
            # as rounded when stored
            b_sum = b_sum.to(p_summed.dtype.element_ty)
            parts.store(p_summed + o_dense, m_row, b_sum, i, COLS, LO, HI)
        b_rows += (b_sum.to(tl.float32),)
    b_rows, _ = _normed(b_rows, eps, COLS)
    for i in tl.static_range(PARTS):
        b_normed = b_rows[i] * (parts.load_vector(p_weight, i, COLS, LO, HI) + offset)
        parts.store(p_normed + o_dense, m_row, b_normed, i, COLS, LO, HI)


@triton.jit(do_not_specialize=[*_SIZES, *_strides_of("grad", "grad_summed", "summed")])
def rms_norm_bwd_kernel(
    p_grad,
    p_grad_summed,
    p_summed,
    p_weight,
    p_d_x,
    p_d_weight,
    rows,
    middle,
    inner,
    outer_grad,
    middle_grad,
    inner_grad,
    outer_grad_summed,
    middle_grad_summed,
    inner_grad_summed,
    outer_summed,
    middle_summed,
    inner_summed,
    eps,
    offset,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    COLS: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad by normed, grad_summed by summed, which may be None, and summed [rows, COLS], counted and strided as the
    forward's -> d_x, dense, and with PARAMETERS each program's share of d_weight [programs, COLS] in float32.

    The mean square is computed again from the row at hand. Grid: n programs, each with every n-th block of rows, so
    that the shares are few and their sum is always made in the same order. FLOPs: about 12 an element. Bytes: grad,
    grad_summed, summed and d_x once.
    """
    PARTS: tl.constexpr = 2 if HI else 1
    outer_grad, middle_grad = in_elements(outer_grad, UNIT), in_elements(middle_grad, UNIT)
    inner_grad, inner_summed = in_elements(inner_grad, UNIT), in_elements(inner_summed, UNIT)
    outer_summed, middle_summed = in_elements(outer_summed, UNIT), in_elements(middle_summed, UNIT)
    b_d_weight = parts.zero_row(LO, HI)
    for i_block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        m_row = o_row < rows
        p_grads = _row_pointers(p_grad, o_row, middle, inner, outer_grad, middle_grad, inner_grad, LEVELS)
        p_rows = _row_pointers(p_summed, o_row, middle, inner, outer_summed, middle_summed, inner_summed, LEVELS)
        b_grad, b_weighted, b_rows = (), (), ()
        for i in tl.static_range(PARTS):
            b_grad += (parts.load(p_grads, m_row, i, COLS, LO, HI),)
            b_weighted += (b_grad[i] * (parts.load_vector(p_weight, i, COLS, LO, HI) + offset),)
            b_rows += (parts.load(p_rows, m_row, i, COLS, LO, HI),)
        b_rows, b_scale = _normed(b_rows, eps, COLS)
        b_along = parts.row_sum(parts.product(b_weighted, b_rows)) / COLS
        for i in tl.static_range(PARTS):
            b_d_x = (b_weighted[i] - b_rows[i] * b_along) * b_scale
            if p_grad_summed is not None:
                outer, between = in_elements(outer_grad_summed, UNIT), in_elements(middle_grad_summed, UNIT)
                within = in_elements(inner_grad_summed, UNIT)
                p_others = _row_pointers(p_grad_summed, o_row, middle, inner, outer, between, within, LEVELS)
                b_d_x += parts.load(p_others, m_row, i, COLS, LO, HI)
            parts.store(p_d_x + o_row.to(tl.int64) * COLS, m_row, b_d_x, i, COLS, LO, HI)
        if PARAMETERS:
            b_sums = ()
            for i in tl.static_range(PARTS):
                b_sums += (b_d_weight[i] + tl.sum(b_grad[i] * b_rows[i], 0)[None, :],)
            b_d_weight = b_sums
    if PARAMETERS:
        p_share = p_d_weight + tl.program_id(0).to(tl.int64) * COLS + tl.zeros([1, 1], tl.int64)
        for i in tl.static_range(PARTS):
            parts.store(p_share, tl.full([1, 1], True, tl.int1), b_d_weight[i], i, COLS, LO, HI)


def rms_norm_fwd(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of x + residual and that sum, dense and of x's shape; without residual, None in place of the sum."""
    normed = x.new_empty(x.shape)
    summed = None if residual is None else x.new_empty(x.shape)
    if x.numel():
        rows = _rows.of(x, residual)
        config = select("rms_norm_fwd_kernel", x, cols=x.shape[-1])
        counted, constants = _arguments(rows, x)
        grid = (triton.cdiv(counted[0], config["BLOCK_M"]),)
        args = (*rows.tensors, weight.contiguous(), normed, summed, *counted, eps, offset)
        launch(rms_norm_fwd_kernel, grid, args, config, **constants)
    return normed, summed


def rms_norm_bwd(
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    parameters: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients by x (and by the residual, the same) and weight; the last, float32, None unless wanted."""
    d_x, cols = summed.new_empty(summed.shape), summed.shape[-1]
    if summed.numel() == 0:
        return d_x, summed.new_zeros(cols, dtype=torch.float32) if parameters else None
    rows = _rows.of(grad, grad_summed, summed)
    counted, constants = _arguments(rows, summed)
    config = dict(select("rms_norm_bwd_kernel", summed, cols=cols))
    programs = min(config.pop("PROGRAMS"), triton.cdiv(counted[0], config["BLOCK_M"]))
    shares = summed.new_empty(programs, cols, dtype=torch.float32) if parameters else None
    args = (*rows.tensors, weight.contiguous(), d_x, shares, *counted, eps, offset)
    launch(rms_norm_bwd_kernel, (programs,), args, config, PARAMETERS=parameters, **constants)
    return d_x, None if shares is None else shares.sum(0)


def _arguments(rows: _rows.Rows, like: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """How many rows there are, their last two sizes, and the strides of all tensors, as both kernels take them; and
    constants."""
    unit, strides = in_units(like.dtype, *(s for strides in rows.strides for s in _rows.padded(strides, 0)))
    constants = {"UNIT": unit, "LEVELS": len(rows.sizes), **parts.columns(like.shape[-1])}
    return (rows.count, *_rows.padded(rows.sizes, 1)[1:], *strides), constants


def _example_rows(dtype: torch.dtype, device: str, cols: int, heads: bool) -> Tensor:
    """[rows, C], or [B, H, N, D] of heads in a fused projection."""
    if heads:
        qkv = torch.randn(8, _ROWS // 8, 3, _HEADS, cols, dtype=dtype, device=device)
        return qkv[:, :, 0].transpose(1, 2)
    return torch.randn(_ROWS, cols, dtype=dtype, device=device)


def _forward_example(
    dtype: torch.dtype, device: str, cols: int, residual: bool = True, heads: bool = False
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    x, weight = _example_rows(dtype, device, cols, heads), torch.randn(cols, dtype=dtype, device=device)
    other = torch.randn_like(x) if residual else None
    return lambda: rms_norm_fwd(x, weight, other, 1e-6, 0.0)


def _backward_example(
    dtype: torch.dtype, device: str, cols: int, parameters: bool = True, heads: bool = False
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    summed, weight = _example_rows(dtype, device, cols, heads), torch.randn(cols, dtype=dtype, device=device)
    grad, grad_summed = torch.randn(2, *summed.shape, dtype=dtype, device=device)
    return lambda: rms_norm_bwd(grad, grad_summed, summed, weight, 1e-6, 0.0, parameters)


def _kernel(
    function: Any, example: Callable[..., Any], flops: int, candidates: tuple[Config, ...], *variants: dict[str, Any]
) -> Kernel:
    def cost(size: int, cols: int) -> tuple[float, float]:
        return flops * _ROWS * cols, 4 * _ROWS * cols * size

    return Kernel(
        function,
        example,
        {"cols": 2048},
        cost,
        candidates,
        shapes=tuple({"cols": cols} for cols in (128, 1152, 4096, 8192)),
        variants=({}, {"heads": True}, *variants),
    )


KERNELS = (
    _kernel(
        rms_norm_fwd_kernel,
        _forward_example,
        6,
        tuple({"BLOCK_M": m, "num_warps": warps} for m in (1, 2, 4, 16) for warps in (1, 2, 4, 8)),
        {"residual": False},
    ),
    _kernel(
        rms_norm_bwd_kernel,
        _backward_example,
        12,
        tuple(
            {"BLOCK_M": m, "PROGRAMS": programs, "STAGES": stages, "num_warps": warps}
            for m, warps in ((1, 2), (1, 4), (1, 8), (2, 4), (8, 2), (8, 4))
            for programs in (528, 1056)
            for stages in (1, 2)
        ),
        {"parameters": False},
    ),
)
