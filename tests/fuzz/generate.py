"""Random tensors: values of all sorts in views of all sorts, inside larger buffers whose other elements are watched."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .judge import Failure

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUES = ("normal", "tiny", "large", "constant", "zeros", "denormal", "mixed", "nan", "inf")
_VALUE_WEIGHTS = (50, 5, 6, 5, 5, 5, 6, 9, 9)
# sizes around the widths of vectors, tiles and blocks
_CORNERS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 72, 80, 96, 127, 128, 129, 255, 256, 257)


class Draw(random.Random):
    """The random numbers of one case, the same on every machine: they depend on nothing but the seed and the index."""

    def __init__(self, op: str, seed: int, index: int):
        super().__init__(f"{op} {seed} {index}")
        self.generator = torch.Generator().manual_seed(self.getrandbits(62))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def size(self, limit: int, *, zero: bool = False) -> int:
        """1 to `limit`, half the time a corner; 0 now and then where that is a size."""
        if zero and self.chance(0.03):
            return 0
        corners = [n for n in _CORNERS if n <= limit]
        return self.choice(corners) if self.chance(0.5) else self.randint(1, limit)

    def values_kind(self) -> str:
        return self.choices(VALUES, _VALUE_WEIGHTS)[0]

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)

    def fractions(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)

    def values(self, shape: Sequence[int], kind: str, factor: float = 1.0) -> Tensor:
        """float64, of size `factor` where the kind does not say otherwise."""
        x = self.normal(shape) * factor
        if kind == "tiny":
            return x * 1e-30
        if kind == "large":
            return x * 1e4
        if kind == "denormal":
            return x * 1e-39
        if kind == "zeros":
            return x * (self.fractions(shape) < self.choice([0.0, 0.5])).double()
        if kind == "constant":
            return x.mean(-1, keepdim=True).expand(tuple(shape)) if x.numel() else x
        if kind == "mixed" and x.dim() > 0:
            return x * 10.0 ** (self.fractions([*shape[:-1], 1]) * 12 - 8)
        return x

    def sprinkle(self, x: Tensor, kind: str) -> None:
        """Puts one to three NaN or infinities into elements of `x` that share their memory with no other."""
        for _ in range(self.randint(1, 3)):
            index = tuple(self.randrange(size) for size in x.shape)
            x[index] = torch.nan if kind == "nan" else self.choice([torch.inf, -torch.inf])


class Arena:
    """The memory of one case's arguments. Every tensor is a view into a buffer that is filled with NaN (or with wild
    integers) around it; `verify` tells whether a call has changed a bit, of the arguments or beside them."""

    def __init__(self, draw: Draw):
        self.draw = draw
        # ids of the views whose elements share their memory with each other; the views live as long as this
        self.overlapping: set[int] = set()
        self._shared = draw.chance(0.2)
        self._slabs: dict[torch.dtype, tuple[Tensor, int]] = {}
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []

    def tensor(
        self,
        values: Tensor,
        dtype: torch.dtype,
        *,
        unit_last_stride: bool = False,
        distinct: bool = False,
        plain: bool = False,
    ) -> Tensor:
        """A view of random strides that holds the values in `dtype`. Views whose elements overlap hold other values
        than those given, of the same kind; there are none with `distinct`. `plain`: dense, in a buffer of its own."""
        draw, shape = self.draw, tuple(values.shape)
        if dtype.is_floating_point:
            values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        style = draw.choices(("dense", "strided", "expanded", "overlapping"), (45, 40, 9, 6))[0]
        if plain or (distinct and style in ("expanded", "overlapping")) or values.dim() == 0 or values.numel() == 0:
            style = "dense"
        if style == "expanded":
            kept = len(shape) - 1 if unit_last_stride else len(shape)
            index = tuple(slice(0, 1) if d < kept and draw.chance(0.5) else slice(None) for d in range(len(shape)))
            base = self.tensor(values[index], dtype, unit_last_stride=unit_last_stride, distinct=True)
            view = base.expand(shape)
            self.overlapping.add(id(view))
            return view
        if style == "overlapping":
            strides = self._overlapping(shape, unit_last_stride)
        else:
            strides = self._strides(shape, unit_last_stride, style == "strided")
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if values.numel() else 0
        buffer, offset = self._room(extent, dtype)
        view = buffer.as_strided(shape, strides, offset)
        if style == "overlapping":
            self.overlapping.add(id(view))
            flat = values.reshape(-1)
            buffer[offset : offset + extent] = flat.repeat(-(-extent // len(flat)))[:extent].to(dtype)
        else:
            view.copy_(values)
        return view

    def seal(self) -> None:
        """From here on the buffers must stay as they are."""
        self._before = [_bits(buffer).clone() for buffer in self._buffers]

    def verify(self) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=False):
            if not torch.equal(_bits(buffer), before):
                raise Failure("the call wrote to its arguments, or to memory beside them")

    def _strides(self, shape: tuple[int, ...], unit_last_stride: bool, gaps: bool) -> tuple[int, ...]:
        draw, order = self.draw, list(range(len(shape)))
        if gaps and draw.chance(0.6):
            draw.shuffle(order)
            if unit_last_stride:
                order.remove(len(shape) - 1)
                order.append(len(shape) - 1)
        step = draw.choice([1, 1, 2, 3]) if gaps and not unit_last_stride else 1
        strides = [0] * len(shape)
        for d in reversed(order):
            # nothing is ever reached by the stride of a dimension of one element: torch leaves any number there
            strides[d] = draw.choice([step, 0, 1, 7, 12345]) if gaps and shape[d] == 1 else step
            step *= max(1, shape[d])
            if gaps and d != order[0]:
                step += draw.choice([0, 0, 1, 3, 8])
        return tuple(strides)

    def _overlapping(self, shape: tuple[int, ...], unit_last_stride: bool) -> tuple[int, ...]:
        dense = self._strides(shape, unit_last_stride, gaps=False)
        strides = [self.draw.randint(1, max(1, stride)) for stride in dense]
        if unit_last_stride:
            strides[-1] = 1
        return tuple(strides)

    def _room(self, extent: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """A buffer with `extent` free elements from an offset on, and elements of poison on both sides of them."""
        before, after = self.draw.randint(8, 24), self.draw.randint(8, 24)
        slab, used = self._slabs.get(dtype, (None, 0))
        if slab is not None and used + extent + after <= len(slab):
            self._slabs[dtype] = (slab, used + extent + after)
            return slab, used
        length = before + extent + after + (extent * 4 if self._shared else 0)
        if dtype.is_floating_point or dtype.is_complex:
            buffer = torch.full((length,), torch.nan, dtype=dtype)
        else:
            buffer = torch.full((length,), torch.iinfo(dtype).max // 2 if dtype != torch.bool else 1, dtype=dtype)
        self._buffers.append(buffer)
        if self._shared:
            self._slabs[dtype] = (buffer, before + extent + after)
        return buffer, before


def _bits(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8)
