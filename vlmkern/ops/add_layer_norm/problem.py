"""What is asked of `ops.add_layer_norm`, and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AddLayerNorm(NamedTuple):
    """The layer norm of x + residual, and the sum."""

    x: Tensor  # [..., C]
    residual: Tensor | None  # [..., C]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float


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
