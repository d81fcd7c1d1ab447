"""Packed segments of a sequence, whose bounds are not trusted."""

import triton
import triton.language as tl

from . import operands
from .rows import store_rows, zero_rows


@triton.jit
def _bound(segments, i_bound):
    """One of the bounds; untrusted ones reach no token outside the tensors."""
    return tl.minimum(tl.maximum(tl.load(segments.p_bounds + i_bound), 0), segments.tokens)


@triton.jit
def segment(segments, i_batch, PACKED: tl.constexpr):
    """First token and length of an image: of the packed segment, no longer than counts, else of a [B, N, ...] tensor's
    tokens."""
    if PACKED:
        start = _bound(segments, i_batch)
        end = _bound(segments, i_batch + 1)
        return start.to(tl.int64), tl.minimum(tl.maximum(end - start, 0), segments.longest)
    else:
        return tl.zeros([], tl.int64), segments.tokens


@triton.jit
def clear_gaps(rows, p_lse, segments, i_batch, i_block, blocks, is_last, COLUMNS: tl.constexpr):
    """Zeros in one head's rows, and -inf in its log-sum-exp unless that is None, where no segment is: before the first,
    after what counts of this one and, if it is the last, after its end. This is the share of program i_block of a
    segment's.

    Bounds lead from the first token to the last in steps up and down, so each token is in a gap or passed by a step up.
    """
    # few at a time, as there should be none
    ROWS: tl.constexpr = 4
    start = _bound(segments, i_batch)
    end = _bound(segments, i_batch + 1)
    b_zeros = zero_rows(COLUMNS, ROWS)
    o_row = tl.arange(0, ROWS)
    for i_gap in tl.static_range(2):
        if i_gap == 0:
            first = tl.zeros_like(start)
            end_of_gap = tl.where(i_batch == 0, start, 0)
        else:
            first = tl.minimum(start + tl.minimum(segments.longest, segments.tokens - start), end)
            end_of_gap = tl.where(is_last, segments.tokens, end)
        for i_row in range(first + i_block * ROWS, end_of_gap, blocks * ROWS):
            gap = operands.Rows(rows.first + tl.cast(i_row, tl.int64) * rows.stride, rows.stride, end_of_gap - i_row)
            store_rows(gap, b_zeros, COLUMNS, ROWS)
            if p_lse is not None:
                b_lse = tl.full([ROWS], float("-inf"), tl.float32)
                tl.store(p_lse + i_row + o_row, b_lse, mask=o_row < gap.count)
