"""How attention's kernels are launched, forward and backward: block sizes, strides, and descriptors of what they loop
over."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._launch import descriptor, descriptor_like, planned, select_for, split
from ..blocks.strides import in_units

# what calls of one model differ by, for which kernels are not to be compiled again
PER_CALL = (
    "tokens",
    "longest",
    "heads",
    *(f"stride_{x}{dimension}" for x in "qkv" for dimension in ("b", "", "h")),
)

# of float32, whose products are unrolled multiply-adds: larger blocks are thousands of instructions, and spill
WIDE_CANDIDATES = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "TMA": False, "num_warps": warps, "num_stages": 1}
    for m, n, warps in ((32, 32, 8), (32, 32, 4), (32, 64, 8), (64, 32, 8))
)

_LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    """All of a launch but its tensors."""

    lse_shape: tuple[int, ...]
    grid: tuple[int]
    sizes: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    descriptors: tuple[tuple[Any, Any], ...]

    def streams(self, *tensors: Tensor) -> list[tuple[Any, Any]]:
        """What kernels take of the tensors that they loop over: descriptors in blocks of LO and of HI columns, or the
        tensors, as pointers."""
        if not self.descriptors:
            return [(x, x) for x in tensors]
        pairs = zip(self.descriptors, tensors, strict=True)
        return [(descriptor(lo, x), descriptor(hi, x)) for (lo, hi), x in pairs]


@planned
def plan(
    kernel: str,
    block: str,
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
    segments: int | None,
    max_seqlen: int | None,
    streamed: tuple[tuple[int, ...], ...],
    aligned: bool,
) -> Plan:
    """How one of attention's kernels is launched on q, k, v of these strides.

    Args:
        block: the block size that programs are counted by, "BLOCK_M" or "BLOCK_N"; the kernel loops over the other.
        segments: how many are packed; None if the tensors are dense.
        streamed: strides of the tensors that the kernel loops over.
        aligned: whether they start at multiples of 16 bytes.
    """
    tokens, heads, head_dim = shape[-3:]
    packed = segments is not None
    images = segments if packed else shape[0]
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    # packed keys end inside the tensor, where a descriptor would fetch the next segment's, be they NaN
    strided = all(s > 0 and s * dtype.itemsize % 16 == 0 for x in streamed for s in x[:-1])
    tma = not packed and aligned and strided
    config = dict(select_for(kernel, dtype, device, tma, tokens=longest, head_dim=head_dim))
    lo = config.pop("LO", max(16, 1 << head_dim.bit_length() - 1))
    hi = 0 if head_dim <= lo else max(16, 1 << (head_dim - lo - 1).bit_length())
    blocks = -(-longest // config[block])
    unit, in_unit = in_units(dtype, *(stride for x in strides for stride in (0 if packed else x[0], x[-3], x[-2])))
    constants = {
        "UNIT": unit,
        "D": head_dim,
        "LO": lo,
        "HI": hi,
        "PACKED": packed,
        "SPLIT_TAIL": dtype != torch.float32,
        "NEGATED": scale < 0,
    }
    rows = config["BLOCK_N" if block == "BLOCK_M" else "BLOCK_M"]
    descriptors: tuple[Any, ...] = ()
    if config["TMA"]:
        dense = [images, heads, tokens, head_dim]
        descriptors = tuple(
            tuple(descriptor_like(dtype, dense, (x[0], x[2], x[1], 1), [1, 1, rows, width]) for width in (lo, hi or lo))
            for x in streamed
        )
    return Plan(
        (heads, tokens) if packed else (images, heads, tokens),
        (blocks * heads * images,),
        (
            tokens,
            longest,
            heads,
            # masked scores are -inf, which a factor of zero would turn into NaN; kernels multiply by its size
            max(abs(scale), 1e-30) * _LOG2_E,
            *in_unit,
        ),
        *split(config, constants),
        descriptors,
    )


def fused_qkv(dtype: torch.dtype, device: str, tokens: int, head_dim: int, packed: bool) -> tuple:
    """q, k, v as views of one projection of 13 crops with 16 heads, and the bounds of packed ones."""
    q, k, v = torch.randn(13, tokens, 3, 16, head_dim, dtype=dtype, device=device).unbind(2)
    if not packed:
        return q, k, v, None, None
    bounds = torch.arange(14, dtype=torch.int32, device=device) * tokens
    return *(x.flatten(0, 1) for x in (q, k, v)), bounds, tokens
