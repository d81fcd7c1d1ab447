"""What comes between the products of queries and keys and their softmax: a cap, and who sees whom.

Scores are a matrix for each head. Its rows are queries and its columns keys, or the reverse where a block of keys loops
over queries: `operands.Window` says which columns a row sees. Whole blocks of columns that no row of a block sees are
left out, and those alone are masked of which some row does not see some column.
"""

import triton
import triton.language as tl

from ..blocks import constants, operands


@triton.jit
def span_of(i_row, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr):
    """The `Span` of the rows from i_row on, in blocks of COLUMNS; unless SPLIT, all of it counts as edges."""
    end, whole_end = window.columns, window.columns
    first, whole = 0, 0
    if window.before is not None or window.after is not None:
        place = i_row + (window.columns - window.rows)
        last_place = tl.minimum(i_row + ROWS, window.rows) - 1 + (window.columns - window.rows)
        if window.after is not None:
            end = tl.minimum(end, last_place + window.after + 1)
            whole_end = tl.minimum(end, place + window.after + 1)
        if window.before is not None:
            first = tl.maximum(place - window.before, 0) // COLUMNS * COLUMNS
            whole = tl.cdiv(tl.maximum(last_place - window.before, 0), COLUMNS) * COLUMNS
        # rounding down is towards zero
        whole_end = tl.maximum(whole_end, 0)
    if SPLIT:
        whole_end = whole_end // COLUMNS * COLUMNS
        if window.before is not None:
            is_empty = whole_end < whole
            whole = tl.where(is_empty, first, whole)
            whole_end = tl.where(is_empty, first, whole_end)
        return operands.Span(whole, whole_end, whole_end - (whole - first), end)
    else:
        return operands.Span(first, first, first, end)


@triton.jit
def edge_column(i_edge, span, window):
    """The column that is meant by one of the edges' count: those before the whole blocks are counted as if they lay
    right before the ones behind, so that one loop goes through both."""
    if window.before is None:
        return i_edge
    else:
        return tl.where(i_edge < span.whole_end, i_edge - (span.whole_end - span.whole), i_edge)


@triton.jit
def seen(o_row, o_col, window):
    """Whether a row sees a column, [rows, columns] or, where all rows see the same, [1, columns]."""
    if window.before is None and window.after is None:
        return o_col[None, :] < window.columns
    o_place = o_row + (window.columns - window.rows)
    if window.after is None:
        m_seen = o_col[None, :] < window.columns
    else:
        m_seen = o_col[None, :] < tl.minimum(o_place + window.after + 1, window.columns)[:, None]
    if window.before is not None:
        m_seen &= o_col[None, :] >= (o_place - window.before)[:, None]
    return m_seen


@triton.jit
def sees_any(o_row, window):
    """Whether a row that there is sees any column, [rows]."""
    m_any = (o_row < window.rows) & (window.columns > 0)
    if window.after is not None:
        m_any &= o_row + (window.columns - window.rows) + window.after >= 0
    return m_any


@triton.jit
def capped(b_s, steepness, EXACT: tl.constexpr):
    """tanh(b_s * steepness / (2 log2(e))), and its slope by what tanh is taken of. The error of tanh is 1e-7, which the
    cap multiplies, or if EXACT that share of it: near 0 float32 has more digits."""
    # (1 - tanh) / 2 of one exponential, whose overflow and underflow are the limits on both sides; of a difference from
    # tanh itself the slope would lose its digits
    b_rest = 1.0 / (1.0 + tl.exp2(b_s * steepness))
    b_tanh = 1.0 - 2.0 * b_rest
    if EXACT:
        # its series, to the eleventh power
        b_x = b_s * (steepness * (0.5 * constants.LN_2))
        b_square = b_x * b_x
        b_series = 62 / 2835 - b_square * (1382 / 155925)
        b_series = b_square * (2 / 15 - b_square * (17 / 315 - b_square * b_series)) - 1 / 3
        b_tanh = tl.where(b_square < 0.125, b_x + b_x * b_square * b_series, b_tanh)
    return b_tanh, 4.0 * b_rest * (1.0 - b_rest)
