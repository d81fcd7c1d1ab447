"""FLOPs of `ops.swiglu_mlp`: products alone, a multiply-add as two."""

from __future__ import annotations

from .problem import SwiGLU, SwiGLUGradient


def swiglu_mlp(p: SwiGLU) -> int:
    """Both products."""
    return 2 * p.x.shape[:-1].numel() * (p.w_up.numel() + p.w_down.numel())


swiglu_mlp_keep = swiglu_mlp


def swiglu_mlp_bwd(p: SwiGLUGradient) -> int:
    """The up-projection again where it was not kept and the gradient by its result, then what is wanted."""
    of_x, of_up, of_down, of_b_up, _ = p.wanted
    by_hidden = of_x or of_up or of_down or of_b_up
    again = by_hidden and p.up is None
    products = (again + of_x + of_up) * p.w_up.numel() + (by_hidden + of_down) * p.w_down.numel()
    return 2 * p.x.shape[:-1].numel() * products
