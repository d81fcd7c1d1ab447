"""What becomes of the values of a formula: kept as they are, rounded as plain torch rounds them, or shaken at random.

`stored` is what happens to values that are kept in the tensors' dtype on the way, `computed` to values of sums that
are kept in the wider dtype which they are computed in.
"""

from __future__ import annotations

import torch
from torch import Tensor

# what the vector units may flush to zero, whatever the dtype
SMALLEST = torch.finfo(torch.float32).smallest_normal


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_size(x: Tensor) -> float:
    """Roundings of a sum over the last dimension, next to those of its terms."""
    return max(1.0, x.shape[-1] ** 0.5 / 2)


class Exact:
    """No rounding."""

    def stored(self, x: Tensor) -> Tensor:
        return x

    def computed(self, x: Tensor, size: Tensor | float = 1.0) -> Tensor:
        return x


class Plain(Exact):
    """Rounded to the dtype where plain torch stores a tensor."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    def stored(self, x: Tensor) -> Tensor:
        return x.to(self._dtype).to(x.dtype)


class Shaken(Exact):
    """Moved by up to half a unit in the last place of what a value is kept in, at random."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator):
        self._stored, self._computed = torch.finfo(dtype).eps / 2, torch.finfo(accumulator(dtype)).eps / 2
        self._generator = generator
        self._subnormal = torch.finfo(dtype).smallest_normal * self._stored
        self._floor = 0.0 if dtype == torch.float64 else SMALLEST

    def stored(self, x: Tensor) -> Tensor:
        return x * (1 + self._random(x.shape) * self._stored) + self._random(x.shape) * self._subnormal

    def computed(self, x: Tensor, size: Tensor | float = 1.0) -> Tensor:
        """`size`: how many roundings of one there are, or how large what was rounded is next to `x`."""
        return x * (1 + self._random(x.shape) * self._computed * size)

    def argument(self, x: Tensor, *, stored: bool) -> Tensor:
        """An input, as if it had been rounded: that moves sums over its rows as their own roundings do, which grow with
        the root of the length. A share is the same for all of a row: the roundings of sums of equal terms all go one
        way."""
        if x.numel() == 0:
            return x
        shared = max(8, x.shape[-1]) if bool((x == x[..., :1]).all()) else 8
        own = max(self._computed * sum_size(x), self._stored if stored else 0.0)
        moved = self._random(x.shape) * own + self._random([*x.shape[:-1], 1]) * shared * self._computed
        floor = max(self._floor, self._subnormal) if stored else self._floor
        return x * (1 + moved) + self._random(x.shape) * floor

    def _random(self, shape: torch.Size | list[int]) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64) * 2 - 1
