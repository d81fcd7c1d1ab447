"""What is asked of `ops.swiglu_mlp`, and of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SwiGLU(NamedTuple):
    """(silu(gate) * value) w_down^T + b_down with [value | gate] = x w_up^T + b_up."""

    x: Tensor  # [..., C]
    w_up: Tensor  # [2F, C]
    w_down: Tensor  # [E, F]
    b_up: Tensor | None  # [2F]
    b_down: Tensor | None  # [E]

    @classmethod
    def example(cls, dtype: torch.dtype) -> SwiGLU:
        """The projector of jina-vlm, of shapes only."""
        shapes = (196, 1152), (2 * 6144, 1152), (2048, 6144)
        return cls(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), None, None)


class SwiGLUGradient(NamedTuple):
    """Its gradients by (x, w_up, w_down, b_up, b_down), those that are wanted, in this order."""

    grad: Tensor  # [..., E]
    x: Tensor
    w_up: Tensor
    w_down: Tensor
    b_up: Tensor | None
    wanted: list[bool]
    up: Tensor | None  # [..., 2F], the up-projection, if it was kept

    @property
    def forward(self) -> SwiGLU:
        """What this is the gradient of."""
        return SwiGLU(self.x, self.w_up, self.w_down, self.b_up, None)
