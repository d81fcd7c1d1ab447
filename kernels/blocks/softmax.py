"""A softmax over a few slots, and what it leaves of a bias."""

import triton
import triton.language as tl


@triton.jit
def softmax_slots(b_s, scale, o_slot, J: tl.constexpr):
    """Probabilities [BW, J_PADDED] of the first J slots, of their scores times `scale`."""
    b_s = tl.where((o_slot < J)[None, :], b_s, float("-inf"))
    # differences first: of large scores they are exact, where those of rounded products are not
    b_p = tl.exp((b_s - tl.max(b_s, 1)[:, None]) * scale)
    return b_p / tl.sum(b_p, 1)[:, None]


@triton.jit
def trace_of_bias(p_bias, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """What is left of a bias that drops out: 0, or NaN if one of its COUNT numbers is not finite."""
    b_trace = tl.zeros([BLOCK], tl.float32)
    for i_d in range(0, COUNT, BLOCK):
        o_d = i_d + tl.arange(0, BLOCK)
        b_trace += tl.load(p_bias + o_d, mask=o_d < COUNT, other=0).to(tl.float32) * 0
    return tl.sum(b_trace, 0)
