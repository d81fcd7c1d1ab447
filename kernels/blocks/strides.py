"""Strides as kernels take them: in units of a few elements, a constant that says how wide loads may be.

As run-time arguments in elements, strides that are no multiple of 16, as a head's 72, cost vector loads and
asynchronous copies; as constants, they cost a compilation for every new one: where heads lie before tokens, for every
number of those. A unit is what a call's strides are all multiples of, up to the 16 bytes that a thread loads at once.
"""

import math

import torch
import triton
import triton.language as tl


def in_units(dtype: torch.dtype, *strides: int) -> tuple[int, tuple[int, ...]]:
    """The unit of some strides, a power of two, and the strides in it."""
    unit = math.gcd(16 // dtype.itemsize, *strides)
    return unit, tuple(stride // unit for stride in strides)


@triton.jit
def in_elements(stride, UNIT: tl.constexpr):
    """The reverse, in 64 bits."""
    return tl.cast(stride, tl.int64) * UNIT
