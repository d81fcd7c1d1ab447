"""FLOPs of `ops.linear`: products alone, a multiply-add as two."""

from __future__ import annotations

from .problem import Linear, LinearGradient


def linear(p: Linear) -> int:
    """The product."""
    return 2 * p.x.shape[:-1].numel() * p.weight.numel()


linear_keep = linear


def linear_bwd(p: LinearGradient) -> int:
    """The product again where an activation follows it that it was not kept for, then what is wanted."""
    of_x, of_weight, of_bias, _ = p.wanted
    again = p.activation != "none" and p.before is None and (of_x or of_weight or of_bias)
    return 2 * p.x.shape[:-1].numel() * p.weight.numel() * (again + of_x + of_weight)
