"""Blocks of rows of a matrix whose width is no power of two: read and written as LO + HI columns, by pointers or by
descriptors."""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    p_rows,
    stride,
    rows,
    COL: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns COL to COL + WIDTH of ROWS rows; zeros before column FIRST and from D on and, if MASKED, from row `rows`
    on."""
    o_row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    p_tile = p_rows + o_row * stride + o_col
    if COL >= FIRST and COL + WIDTH <= D:
        if MASKED:
            return tl.load(p_tile, mask=o_row < rows, other=0)
        else:
            return tl.load(p_tile)
    m_col = (o_col >= FIRST) & (o_col < D)
    if MASKED:
        return tl.load(p_tile, mask=m_col & (o_row < rows), other=0)
    else:
        return tl.load(p_tile, mask=m_col & (o_row >= 0), other=0)


@triton.jit
def store_rows(
    p_rows,
    stride,
    rows,
    b_rows,
    COL: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The reverse of `load_rows`, converting to the tensor's dtype."""
    o_row = tl.arange(0, ROWS)[:, None]
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    mask = (o_row < rows) & (o_col >= FIRST) & (o_col < D)
    tl.store(p_rows + o_row * stride + o_col, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def stream_rows(
    x,
    x_hi,
    stride,
    i_batch,
    i_head,
    i_row,
    rows,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """ROWS rows from i_row on of a tensor of `rows`: its first LO columns and, if there are HI, its last.

    Pointers take the HI columns that end at D, though some are in LO too, as that needs no mask: whoever they are
    multiplied with has zeros there. Descriptors take those from LO on and fill with zeros.
    """
    if TMA:
        b_lo = x.load([i_batch, i_head, i_row, 0]).reshape(ROWS, LO)
        b_hi = b_lo
        if HI:
            b_hi = x_hi.load([i_batch, i_head, i_row, LO]).reshape(ROWS, HI)
    else:
        p_rows = x + tl.cast(i_row, tl.int64) * stride
        b_lo = load_rows(p_rows, stride, rows - i_row, 0, 0, D, ROWS, LO, MASKED)
        b_hi = b_lo
        if HI:
            b_hi = load_rows(p_rows, stride, rows - i_row, D - HI, 0, D, ROWS, HI, MASKED)
    return b_lo, b_hi
