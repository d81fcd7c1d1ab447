"""Rotary position embedding of queries and keys (Su et al., 2021, eq. 34), and back again.

The forward kernel turns q where it loads it, once a block: the channels that are paired with its own are in the cache
then. Wider heads than 128 would take more registers than there are: their q is turned beforehand, by a kernel of its
own, as is what kernels loop over, which they would turn once for every block: k, and for gradients q. Gradients come
from their kernels in float32 and are turned back before they are rounded: in registers a pair's channels lie in
different threads and, at head dimensions that are no power of two, in different blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import Kernel, launch, select
from ..blocks.strides import in_elements, in_units

patch_interpreter()


class Tables(NamedTuple):
    """Cosines and sines [N, D / 2] or more columns, of each image its own if `stride_image` is not 0, and what pairs of
    channels they turn: neighbours, or those D / 2 apart."""

    cos: Tensor | None
    sin: Tensor | None
    stride_image: int | None
    stride_token: int | None
    interleaved: bool


NO_TABLES = Tables(None, None, None, None, False)


def tables_of(cos: Tensor, sin: Tensor, interleaved: bool) -> Tables:
    """`Tables` of float32 [N, ..] or [B, N, ..], with a last stride of 1."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return Tables(cos, sin, cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2), interleaved)


@triton.jit
def load_turned_rows(rows, cos_rows, sin_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """`load_rows` of rows that are turned by their tables' rows, rounded to their dtype."""
    b_hi = ()
    if COLUMNS.HI:
        HI_COL: tl.constexpr = COLUMNS.LO if COLUMNS.TMA else COLUMNS.D - COLUMNS.HI
        b_hi = (_turned(rows, cos_rows, sin_rows, HI_COL, COLUMNS.LO, COLUMNS.HI, COLUMNS.D, ROWS, INTERLEAVED),)
    b_lo = (_turned(rows, cos_rows, sin_rows, 0, 0, COLUMNS.LO, COLUMNS.D, ROWS, INTERLEAVED),)
    return b_lo + b_hi


@triton.jit
def _turned(
    rows,
    cos_rows,
    sin_rows,
    COL: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Columns COL to COL + WIDTH; zeros before column FIRST, from D on, and beyond the last row."""
    o_row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    if INTERLEAVED:
        o_pair, o_other, is_first = o_col // 2, o_col ^ 1, o_col % 2 == 0
    else:
        is_first = o_col < D // 2
        o_other = tl.where(is_first, o_col + D // 2, o_col - D // 2)
        o_pair = tl.minimum(o_col, o_other)
    mask = (o_row < rows.count) & (o_col >= FIRST) & (o_col < D)
    p_rows, p_angles = rows.first + o_row * rows.stride, o_row * cos_rows.stride + o_pair
    b_own = tl.load(p_rows + o_col, mask=mask, other=0)
    b_other = tl.load(p_rows + o_other, mask=mask, other=0).to(tl.float32)
    b_cos = tl.load(cos_rows.first + p_angles, mask=mask, other=0)
    b_sin = tl.load(sin_rows.first + p_angles, mask=mask, other=0)
    b_turned = b_own.to(tl.float32) * b_cos + b_other * tl.where(is_first, -b_sin, b_sin)
    return b_turned.to(b_own.dtype)


_PER_CALL = ("rows", "tokens", "heads", "stride_xb", "stride_x", "stride_xh", "stride_tb", "stride_t")


@triton.jit(do_not_specialize=_PER_CALL)
def attention_rotary_kernel(
    p_x,
    p_turned,
    p_cos,
    p_sin,
    rows,
    tokens,
    heads,
    stride_xb,
    stride_x,
    stride_xh,
    stride_tb,
    stride_t,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [B, N, H, D], strides in units of UNIT elements -> the same turned, or turned BACK, dense, of another dtype
    if that is wanted. Grid: blocks of the rows that there are, B * N * H. PAIRS: a power of two, D / 2 or more."""
    o_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < rows
    o_token, o_head = o_row // heads, o_row % heads
    o_image, o_token = o_token // tokens, o_token % tokens
    o_first = o_image * in_elements(stride_xb, UNIT) + o_token * in_elements(stride_x, UNIT)
    o_first += o_head * in_elements(stride_xh, UNIT)
    o_angle = o_image.to(tl.int64) * stride_tb + o_token.to(tl.int64) * stride_t
    o_pair = tl.arange(0, PAIRS)[None, :]
    mask = m_row[:, None] & (o_pair < D // 2)
    o_one = 2 * o_pair if INTERLEAVED else o_pair
    o_other = o_one + (1 if INTERLEAVED else D // 2)
    b_one = tl.load(p_x + o_first[:, None] + o_one, mask=mask).to(tl.float32)
    b_other = tl.load(p_x + o_first[:, None] + o_other, mask=mask).to(tl.float32)
    b_cos = tl.load(p_cos + o_angle[:, None] + o_pair, mask=mask)
    b_sin = tl.load(p_sin + o_angle[:, None] + o_pair, mask=mask)
    if BACK:
        b_sin = -b_sin
    p_row = p_turned + o_row[:, None].to(tl.int64) * D
    dtype = p_turned.dtype.element_ty
    tl.store(p_row + o_one, (b_one * b_cos - b_other * b_sin).to(dtype), mask=mask)
    tl.store(p_row + o_other, (b_other * b_cos + b_one * b_sin).to(dtype), mask=mask)


def turned(x: Tensor, tables: Tables, dtype: torch.dtype, back: bool = False) -> Tensor:
    """x [B, N, H, D] or packed [T, H, D], each pair of its channels turned by its token's angle, or turned back, in
    float32: dense, rounded to a dtype."""
    out = x.new_empty(x.shape, dtype=dtype)
    if not x.numel():
        return out
    images = x.shape[0] if x.dim() == 4 else 1
    tokens, heads, head_dim = x.shape[-3:]
    stride_image = x.stride(0) if images > 1 else 0
    unit, in_unit = in_units(x.dtype, stride_image, *x.stride()[-3:-1])
    rows = images * tokens * heads
    config = select("attention_rotary_kernel", x, tokens=tokens, head_dim=head_dim)
    launch(
        attention_rotary_kernel,
        (triton.cdiv(rows, config["BLOCK"]),),
        (x, out, *tables[:2], rows, tokens, heads, *in_unit, *tables[2:]),
        config,
        UNIT=unit,
        D=head_dim,
        PAIRS=triton.next_power_of_2(head_dim // 2),
        BACK=back,
    )
    return out


def _example(dtype: torch.dtype, device: str, tokens: int, head_dim: int, back: bool = False) -> Callable[[], Tensor]:
    x = torch.randn(13, tokens, 3, 16, head_dim, dtype=dtype, device=device)[:, :, 0]
    tables = tables_of(*torch.randn(2, tokens, head_dim // 2, device=device), False)
    return lambda: turned(x, tables, dtype, back)


def _cost(size: int, tokens: int, head_dim: int) -> tuple[float, float]:
    elements = 13 * 16 * tokens * head_dim
    return 3 * elements, 2 * elements * size + tokens * head_dim * 4


KERNELS = (
    Kernel(
        attention_rotary_kernel,
        _example,
        {"tokens": 729, "head_dim": 72},
        _cost,
        tuple({"BLOCK": block, "num_warps": warps} for block in (16, 32, 64, 128) for warps in (2, 4, 8)),
        shapes=({"tokens": 729, "head_dim": 128},),
        variants=({}, {"back": True}),
    ),
)
