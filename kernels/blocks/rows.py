"""Blocks of rows of a matrix whose width is no power of two, by pointers or by descriptors.

Such a block is a tuple: of LO columns, or of LO and of HI, each a power of two. What is done to both is a loop over
`tl.static_range(len(block))`, in which column blocks are multiplied with one another.
"""

import triton
import triton.language as tl

from . import operands


@triton.jit
def load_rows(rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The first ROWS rows, with zeros beyond the last; each column once, with zeros in HI for those that LO has."""
    # HI first: the other way, the gradient by k and v at D 72 is a register over what sm_90 has
    b_hi = ()
    if COLUMNS.HI:
        HI_COL: tl.constexpr = COLUMNS.LO if COLUMNS.TMA else COLUMNS.D - COLUMNS.HI
        b_hi = (_load(rows, HI_COL, COLUMNS.LO, COLUMNS.HI, COLUMNS, ROWS, True),)
    b_lo = (_load(rows, 0, 0, COLUMNS.LO, COLUMNS, ROWS, True),)
    return b_lo + b_hi


@triton.jit
def store_rows(rows, b_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The reverse of `load_rows`, converting to the tensor's dtype."""
    _store(rows, b_rows[0], 0, 0, COLUMNS.LO, COLUMNS, ROWS)
    if COLUMNS.HI:
        HI_COL: tl.constexpr = COLUMNS.LO if COLUMNS.TMA else COLUMNS.D - COLUMNS.HI
        _store(rows, b_rows[1], HI_COL, COLUMNS.LO, COLUMNS.HI, COLUMNS, ROWS)


@triton.jit
def stream_rows(stream, i_row, COLUMNS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """ROWS rows from i_row on, zeros beyond the last if MASKED or by descriptors.

    By pointers, HI has columns that LO has as well: whoever they are multiplied with has zeros there.
    """
    if COLUMNS.TMA:
        b_rows = (stream.lo.load([stream.i_batch, stream.i_head, i_row, 0]).reshape(ROWS, COLUMNS.LO),)
        if COLUMNS.HI:
            b_hi = stream.hi.load([stream.i_batch, stream.i_head, i_row, COLUMNS.LO])
            b_rows += (b_hi.reshape(ROWS, COLUMNS.HI),)
    else:
        rows = operands.Rows(stream.lo + tl.cast(i_row, tl.int64) * stream.stride, stream.stride, stream.count - i_row)
        b_rows = (_load(rows, 0, 0, COLUMNS.LO, COLUMNS, ROWS, MASKED),)
        if COLUMNS.HI:
            b_rows += (_load(rows, COLUMNS.D - COLUMNS.HI, 0, COLUMNS.HI, COLUMNS, ROWS, MASKED),)
    return b_rows


@triton.jit
def zero_rows(COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of float32 zeros."""
    b_rows = (tl.zeros([ROWS, COLUMNS.LO], tl.float32),)
    if COLUMNS.HI:
        b_rows += (tl.zeros([ROWS, COLUMNS.HI], tl.float32),)
    return b_rows


@triton.jit
def _load(
    rows,
    COL: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns COL to COL + WIDTH of ROWS rows; zeros before column FIRST and from D on and, if MASKED, beyond the last
    row."""
    o_row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    p_tile = rows.first + o_row * rows.stride + o_col
    if COL >= FIRST and COL + WIDTH <= COLUMNS.D:
        if MASKED:
            return tl.load(p_tile, mask=o_row < rows.count, other=0)
        else:
            return tl.load(p_tile)
    m_col = (o_col >= FIRST) & (o_col < COLUMNS.D)
    if MASKED:
        return tl.load(p_tile, mask=m_col & (o_row < rows.count), other=0)
    else:
        return tl.load(p_tile, mask=m_col & (o_row >= 0), other=0)


@triton.jit
def _store(
    rows,
    b_rows,
    COL: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The reverse of a masked `_load`."""
    o_row = tl.arange(0, ROWS)[:, None]
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    mask = (o_row < rows.count) & (o_col >= FIRST) & (o_col < COLUMNS.D)
    tl.store(rows.first + o_row * rows.stride + o_col, b_rows.to(rows.first.dtype.element_ty), mask=mask)
