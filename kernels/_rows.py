"""Rows of tensors as kernels address them: counted through a few sizes, with a stride for each.

The rows of a dense matrix have one size and one stride; those of a head's view of a fused projection, [B, N, H, D],
two; with its dimensions in another order, [B, H, N, D], three. So they need not be copied to be read.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

LEVELS = 3


class Rows(NamedTuple):
    """Tensors of one shape, of which some may be None, as rows.

    Attributes:
        tensors: themselves, or dense copies where neighbours in a row are apart in memory, or rows cannot be counted.
        sizes: how many rows there are, outermost first: LEVELS of them, or fewer, as many as it takes.
        strides: of each tensor over these sizes, in elements; of None any.
    """

    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many rows there are."""
        found = 1
        for size in self.sizes:
            found *= size
        return found


def of(first: Tensor, *others: Tensor | None) -> Rows:
    """Rows are the last dimension of tensors [..., C] that have elements."""
    tensors = (first, *others)
    for t in tensors:
        if t is not None and not t.is_contiguous():
            break
    else:
        return _dense(tensors)
    tensors = tuple(t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors)
    found = _counted(tensors)
    if len(found.sizes) > LEVELS:
        return _dense(tuple(None if t is None else t.contiguous() for t in tensors))
    return found


def padded(numbers: Sequence[int], filler: int) -> tuple[int, ...]:
    """Sizes or strides for kernels that take LEVELS of them."""
    return (filler,) * (LEVELS - len(numbers)) + tuple(numbers)


def _dense(tensors: tuple[Tensor | None, ...]) -> Rows:
    cols = tensors[0].shape[-1]
    return Rows(tensors, (tensors[0].numel() // cols,), ((cols,),) * len(tensors))


def _counted(tensors: tuple[Tensor | None, ...]) -> Rows:
    """With dimensions that are one in all tensors taken for one."""
    sizes: list[int] = []
    strides: list[tuple[int, ...]] = []  # of each size, over the tensors
    for dimension, size in reversed(list(enumerate(tensors[0].shape[:-1]))):
        if size == 1:
            continue
        here = tuple(0 if t is None else t.stride(dimension) for t in tensors)
        if sizes and here == tuple(stride * sizes[-1] for stride in strides[-1]):
            sizes[-1] *= size
        else:
            sizes.append(size)
            strides.append(here)
    if not sizes:
        return _dense(tensors)
    return Rows(tensors, tuple(reversed(sizes)), tuple(zip(*reversed(strides), strict=True)))
