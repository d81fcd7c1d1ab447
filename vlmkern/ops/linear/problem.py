"""What is asked of `ops.linear`, and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Linear(NamedTuple):
    """act(x weight^T + bias) + residual."""

    x: Tensor  # [..., C]
    weight: Tensor  # [E, C]
    bias: Tensor | None  # [E]
    activation: str
    residual: Tensor | None  # [..., E]

    @classmethod
    def example(cls, dtype: torch.dtype) -> Linear:
        """Out of the MLP of a tower block, of shapes only."""
        x, weight, bias, residual = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((729, 4304), (1152, 4304), (1152,), (729, 1152))
        )
        return cls(x, weight, bias, "none", residual)


class LinearGradient(NamedTuple):
    """Its gradients by (x, weight, bias, residual), those that are wanted, in this order."""

    grad: Tensor  # [..., E]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    wanted: list[bool]
    before: Tensor | None  # [..., E], what the activation was applied to, if it was kept

    @property
    def forward(self) -> Linear:
        """What this is the gradient of."""
        return Linear(self.x, self.weight, self.bias, self.activation, None)
