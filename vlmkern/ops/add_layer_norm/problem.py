"""What is asked of `ops.add_layer_norm`, and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AddLayerNorm(NamedTuple):
    """The layer norm of x + residual, and the sum."""

    x: Tensor  # [..., C]
    residual: Tensor | None  # [..., C]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float

    @classmethod
    def example(cls, dtype: torch.dtype) -> AddLayerNorm:
        """Between the halves of a tower block, of shapes only."""
        x, residual = torch.empty(2, 729, 1152, dtype=dtype, device="meta")
        weight, bias = torch.empty(2, 1152, dtype=dtype, device="meta")
        return cls(x, residual, weight, bias, 1e-6)


class AddLayerNormGradient(NamedTuple):
    """Its gradients by (x or residual, which are the same, weight, bias), those that are wanted, in this order."""

    grad: Tensor  # by the norm, [..., C]
    grad_summed: Tensor | None  # by the sum, [..., C]
    summed: Tensor  # [..., C]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    wanted: list[bool]

    @property
    def forward(self) -> AddLayerNorm:
        """What this is the gradient of."""
        return AddLayerNorm(self.summed, None, self.weight, self.bias, self.eps)
