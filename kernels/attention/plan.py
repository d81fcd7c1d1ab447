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
    "tokens_k",
    "longest_k",
    "left",
    "right",
    *(f"stride_{x}{dimension}" for x in "qkv" for dimension in ("b", "", "h")),
    "stride_tb",
    "stride_t",
)

# of float32, whose products are unrolled multiply-adds: larger blocks are thousands of instructions, and spill
WIDE_CANDIDATES = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "TMA": False, "num_warps": warps, "num_stages": 1}
    for m, n, warps in ((32, 32, 8), (32, 32, 4), (32, 64, 8), (64, 32, 8))
)

# more keys than there are, to which places can be added in 32 bits
_FAR = 2**30

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
    shape_k: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
    segments: int | None,
    longest: int | None,
    longest_k: int | None,
    form: tuple[int, int, float],
    streamed: tuple[tuple[int, ...], ...],
    aligned: bool,
) -> Plan:
    """How one of attention's kernels is launched on q, and on k and v, of these strides.

    Args:
        block: the block size that programs are counted by, "BLOCK_M" of queries or "BLOCK_N" of keys; the kernel loops
            over the other.
        segments: how many are packed; None if the tensors are dense.
        longest: tokens of a segment that count, and of one of keys where these have bounds of their own.
        form: how many keys before and behind its own place a query sees, -1 for all; the cap, 0 for none.
        streamed: strides of the tensors that the kernel loops over.
        aligned: whether they start at multiples of 16 bytes.
    """
    (tokens, heads, head_dim), (tokens_k, heads_k, _) = shape[-3:], shape_k[-3:]
    packed = segments is not None
    images = segments if packed else shape[0]
    same = longest_k is None if packed else tokens == tokens_k
    longest = tokens if longest is None else min(longest, tokens)
    longest_k = longest if same else tokens_k if longest_k is None else min(longest_k, tokens_k)
    over_keys = block == "BLOCK_M"
    left, right, softcap = form
    # packed keys end inside the tensor, where a descriptor would fetch the next segment's, be they NaN
    strided = all(s > 0 and s * dtype.itemsize % 16 == 0 for x in streamed for s in x[:-1])
    tma = not packed and aligned and strided and tokens > 0 and tokens_k > 0
    config = dict(select_for(kernel, dtype, device, tma, tokens=max(longest, longest_k), head_dim=head_dim))
    if left >= 0:
        # edges on both sides take registers that a limit would spill
        config.pop("maxnreg", None)
    lo = config.pop("LO", max(16, 1 << head_dim.bit_length() - 1))
    hi = 0 if head_dim <= lo else max(16, 1 << (head_dim - lo - 1).bit_length())
    counted, of_heads = (longest, heads) if over_keys else (longest_k, heads_k)
    unit, in_unit = in_units(dtype, *(stride for x in strides for stride in (0 if packed else x[0], x[-3], x[-2])))
    constants = {
        "UNIT": unit,
        "D": head_dim,
        "LO": lo,
        "HI": hi,
        "GROUP": heads // heads_k if heads_k else 1,
        "PACKED": packed,
        # masks where none are needed cost less than the registers that a second copy of a block's code would: of
        # float32 and of wide heads, and by keys of capped scores
        "SPLIT": dtype != torch.float32 and head_dim <= 128 and (over_keys or not softcap),
        "NEGATED": scale < 0,
    }
    descriptors: tuple[Any, ...] = ()
    if config["TMA"]:
        dense = [images, heads_k, tokens_k, head_dim] if over_keys else [images, heads, tokens, head_dim]
        rows = config["BLOCK_N" if over_keys else "BLOCK_M"]
        descriptors = tuple(
            tuple(descriptor_like(dtype, dense, (x[0], x[2], x[1], 1), [1, 1, rows, width]) for width in (lo, hi or lo))
            for x in streamed
        )
    return Plan(
        (heads, tokens) if packed else (images, heads, tokens),
        (-(-counted // config[block]) * of_heads * images,),
        (
            tokens,
            longest,
            heads,
            *_slopes(scale, softcap),
            *in_unit,
            *((None, None) if same else (tokens_k, longest_k)),
            *(None if count < 0 else min(count, _FAR) for count in (left, right)),
        ),
        *split(config, constants),
        descriptors,
    )


def _slopes(scale: float, softcap: float) -> tuple[float, float | None]:
    """What kernels multiply by, which is never 0, as masked scores are -inf: products, to have the logarithm of weights
    in base 2; or the tanh that caps them, and its argument, in base 2 and doubled, before it."""
    size = max(abs(scale), 1e-30)
    if not softcap:
        return size * _LOG2_E, None
    return max(softcap, 1e-30) * _LOG2_E, min(2 * _LOG2_E * size / softcap, 1e30)


# of examples: forms whose code is another
VARIANTS = ({}, {"packed": True}, {"causal": True}, {"causal": True, "heads_k": 8, "softcap": 50.0})


class Example(NamedTuple):
    """q, k, v as views of one projection of 13 crops with 16 heads, and what else a call takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    options: dict[str, Any]


def example(
    dtype: torch.dtype,
    device: str,
    tokens: int,
    head_dim: int,
    *,
    packed: bool = False,
    heads_k: int = 16,
    causal: bool = False,
    softcap: float = 0.0,
) -> Example:
    """`Example` of a shape, packed or dense, and a form."""
    heads = (16, heads_k, heads_k)
    q, k, v = torch.randn(13, tokens, sum(heads), head_dim, dtype=dtype, device=device).split(heads, 2)
    options = {"right": 0 if causal else -1, "softcap": softcap}
    if not packed:
        return Example(q, k, v, None, None, options)
    bounds = torch.arange(14, dtype=torch.int32, device=device) * tokens
    return Example(*(x.flatten(0, 1) for x in (q, k, v)), bounds, tokens, options)
