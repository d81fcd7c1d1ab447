"""Packed segments of a sequence, whose bounds are not trusted."""

import triton
import triton.language as tl

from .rows import store_rows


@triton.jit
def _bound(p_cu_seqlens, i_bound, tokens):
    """One of the bounds; untrusted ones reach no token outside the tensors."""
    return tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_bound), 0), tokens)


@triton.jit
def segment(p_cu_seqlens, i_batch, tokens, longest, PACKED: tl.constexpr):
    """First token and length of an image: of the packed segment, else of [B, N, ...] tensors flattened to rows. Of a
    segment, no more than the `longest` tokens count that the grid was made for."""
    if PACKED:
        start = _bound(p_cu_seqlens, i_batch, tokens)
        end = _bound(p_cu_seqlens, i_batch + 1, tokens)
        return start.to(tl.int64), tl.minimum(tl.maximum(end - start, 0), longest)
    else:
        return tl.zeros([], tl.int64), tokens


@triton.jit
def clear_gaps(
    p_rows,
    p_lse,
    stride,
    p_cu_seqlens,
    i_batch,
    i_block,
    blocks,
    is_last,
    tokens,
    longest,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
):
    """Zeros in one head's rows, and -inf in its log-sum-exp unless that is None, where no segment is: before the first,
    after what counts of this one and, if it is the last, after its end. This is the share of program i_block of a
    segment's.

    Bounds lead from the first token to the last in steps up and down, so each token is in a gap or passed by a step up.
    """
    # few at a time, as there should be none
    ROWS: tl.constexpr = 4
    start = _bound(p_cu_seqlens, i_batch, tokens)
    end = _bound(p_cu_seqlens, i_batch + 1, tokens)
    b_lo = tl.zeros([ROWS, LO], tl.float32)
    o_row = tl.arange(0, ROWS)
    for i_gap in tl.static_range(2):
        if i_gap == 0:
            first = tl.zeros_like(start)
            end_of_gap = tl.where(i_batch == 0, start, 0)
        else:
            first = tl.minimum(start + tl.minimum(longest, tokens - start), end)
            end_of_gap = tl.where(is_last, tokens, end)
        for i_row in range(first + i_block * ROWS, end_of_gap, blocks * ROWS):
            p_gap = p_rows + tl.cast(i_row, tl.int64) * stride
            store_rows(p_gap, stride, end_of_gap - i_row, b_lo, 0, 0, D, ROWS, LO)
            if HI:
                store_rows(p_gap, stride, end_of_gap - i_row, tl.zeros([ROWS, HI], tl.float32), LO, LO, D, ROWS, HI)
            if p_lse is not None:
                b_lse = tl.full([ROWS], float("-inf"), tl.float32)
                tl.store(p_lse + i_row + o_row, b_lse, mask=o_row < end_of_gap - i_row)
