"""SwiGLU MLP over `vlmkern.ops.swiglu_mlp`."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class SwiGLUMLP(nn.Module):
    """down(silu(gate) * value) with [value | gate] = up(x), without biases.

    Args:
        input_size: C.
        hidden_size: F.
        output_size: E; C when None.

    Parameters: `up.weight` [2F, C] with the rows of `value` first, `down.weight` [E, F].
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(input_size, 2 * hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, output_size or input_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., E]."""
        return ops.swiglu_mlp(x, self.up.weight, self.down.weight)
