"""One head of an image or a packed segment: its rows of the tensors that attention's kernels take."""

import triton
import triton.language as tl

from ..blocks import operands
from ..blocks.strides import in_elements


@triton.jit
def strides_of(stride_image, stride_token, stride_head, UNIT: tl.constexpr):
    """`Strides` of those that a kernel takes."""
    image, token = in_elements(stride_image, UNIT), in_elements(stride_token, UNIT)
    return operands.Strides(image, token, in_elements(stride_head, UNIT))


@triton.jit
def head_rows(p_x, strides, head, i_row):
    """A head's rows of a tensor of any strides, from i_row on."""
    first = p_x + _image_head(strides, head) + (head.start + i_row) * strides.token
    return operands.Rows(first, strides.token, head.tokens - i_row)


@triton.jit
def head_stream(x, x_hi, strides, head, TMA: tl.constexpr):
    """All of a head's rows of a tensor of any strides, given by a pointer or by descriptors."""
    if TMA:
        return operands.Stream(x, x_hi, strides.token, head.tokens, head.i_batch, head.i_head)
    else:
        # summed before the pointer is moved, as loops would repeat the sum of two moves
        first = x + (_image_head(strides, head) + head.start * strides.token)
        return operands.Stream(first, first, strides.token, head.tokens, head.i_batch, head.i_head)


@triton.jit
def later_head(stream, heads, stride, TMA: tl.constexpr):
    """The stream of the head that is so many `heads` after a stream's, of `stride` elements each."""
    if TMA:
        i_head = stream.i_head + heads
        return operands.Stream(stream.lo, stream.hi, stream.stride, stream.count, stream.i_batch, i_head)
    else:
        first = stream.lo + heads * stride
        return operands.Stream(first, first, stream.stride, stream.count, stream.i_batch, stream.i_head)


@triton.jit
def _image_head(strides, head):
    return head.i_batch * strides.image + head.i_head * strides.head


@triton.jit
def dense_rows(p_x, dense, head, i_row, D: tl.constexpr, PACKED: tl.constexpr):
    """A head's rows of a dense tensor, from i_row on."""
    o_first = _dense_head(dense, head, D, PACKED) + tl.cast(i_row, tl.int64) * dense.stride
    return operands.Rows(p_x + o_first, dense.stride, head.tokens - i_row)


@triton.jit
def dense_stream(x, x_hi, dense, head, D: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr):
    """All of a head's rows of a dense tensor, given by a pointer or by descriptors."""
    if TMA:
        return operands.Stream(x, x_hi, dense.stride, head.tokens, head.i_batch, head.i_head)
    else:
        first = x + _dense_head(dense, head, D, PACKED)
        return operands.Stream(first, first, dense.stride, head.tokens, head.i_batch, head.i_head)


@triton.jit
def _dense_head(dense, head, D: tl.constexpr, PACKED: tl.constexpr):
    i_first = head.i_batch.to(tl.int64) * dense.tokens * (not PACKED) + head.start
    return i_first * dense.stride + head.i_head * D


@triton.jit
def statistics(p_x, dense, head, i_row, PACKED: tl.constexpr):
    """Where a head's numbers from row i_row on are in a dense tensor [B, H, N] or, packed, [H, T]."""
    i_head = head.i_batch.to(tl.int64) * dense.heads * (not PACKED) + head.i_head
    return p_x + (i_head * dense.tokens + (head.start + i_row))
