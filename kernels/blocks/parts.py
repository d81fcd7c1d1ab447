"""Rows that a program holds whole, in two parts: LO + HI columns, each a power of two, HI being 0 where LO are all.

1152 = 1024 + 128 leaves no lane idle where 2048 would leave 44 %. A block of rows is a tuple of its parts, [BM, LO] and
[BM, HI], in float32. Rows are told of by pointers to their first elements and by which of them are there, both [BM, 1].
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def load(p_rows, m_rows, PART: tl.constexpr, COLS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The LO columns, or of PART 1 the HI ones, in float32; zeros beyond the last column and where there is no row."""
    o_col = LO * PART + tl.arange(0, HI if PART else LO)[None, :]
    mask = m_rows
    if PART == 1 and LO + HI > COLS:
        mask = mask & (o_col < COLS)
    return tl.load(p_rows + o_col, mask=mask, other=0).to(tl.float32)


@triton.jit
def load_vector(p_x, PART: tl.constexpr, COLS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The same of a vector, as one row."""
    return load(p_x + tl.zeros([1, 1], tl.int64), tl.full([1, 1], True, tl.int1), PART, COLS, LO, HI)


@triton.jit
def store(p_rows, m_rows, b_part, PART: tl.constexpr, COLS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The reverse of `load`, converting to the tensor's dtype."""
    o_col = LO * PART + tl.arange(0, HI if PART else LO)[None, :]
    mask = m_rows
    if PART == 1 and LO + HI > COLS:
        mask = mask & (o_col < COLS)
    tl.store(p_rows + o_col, b_part.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def row_sum(b_rows):
    """Of each row, [BM, 1]."""
    b_sum = tl.sum(b_rows[0], 1)[:, None]
    for i in tl.static_range(1, len(b_rows)):
        b_sum += tl.sum(b_rows[i], 1)[:, None]
    return b_sum


@triton.jit
def product(b_x, b_y):
    """Part by part."""
    b_product = ()
    for i in tl.static_range(len(b_x)):
        b_product += (b_x[i] * b_y[i],)
    return b_product


@triton.jit
def zero_row(LO: tl.constexpr, HI: tl.constexpr):
    """One row of zeros."""
    b_row = (tl.zeros([1, LO], tl.float32),)
    if HI:
        b_row += (tl.zeros([1, HI], tl.float32),)
    return b_row


def columns(cols: int) -> dict[str, Any]:
    """The constants of that many columns."""
    lo = 1 << cols.bit_length() - 1
    return {"COLS": cols, "LO": lo, "HI": 0 if cols == lo else 1 << (cols - lo - 1).bit_length()}
