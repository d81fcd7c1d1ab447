"""What is asked of `ops.rms_norm`, and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RMSNorm(NamedTuple):
    """The RMS norm of x + residual, and the sum."""

    x: Tensor  # [..., C]
    weight: Tensor  # [C]
    residual: Tensor | None  # [..., C]
    eps: float
    offset: float

    @classmethod
    def example(cls, dtype: torch.dtype) -> RMSNorm:
        """Between the halves of a decoder block, of shapes only."""
        x, residual = torch.empty(2, 1, 1744, 2048, dtype=dtype, device="meta")
        return cls(x, torch.empty(2048, dtype=dtype, device="meta"), residual, 1e-6, 0.0)


class RMSNormGradient(NamedTuple):
    """Its gradients by (x or residual, which are the same, weight), those that are wanted, in this order."""

    grad: Tensor  # by the norm, [..., C]
    grad_summed: Tensor | None  # by the sum, [..., C]
    summed: Tensor  # [..., C]
    weight: Tensor
    eps: float
    offset: float
    wanted: list[bool]

    @property
    def forward(self) -> RMSNorm:
        """What this is the gradient of."""
        return RMSNorm(self.summed, self.weight, None, self.eps, self.offset)
