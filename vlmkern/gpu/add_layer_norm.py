"""Residual sum and layer norm on GPUs: the Triton kernels of `vlmkern.kernels.add_layer_norm`."""

from __future__ import annotations

from torch import Tensor

from .._backends import BackendUnavailable
from ..kernels import add_layer_norm as kernels


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `vlmkern.reference.add_layer_norm.add_layer_norm`."""
    _require("add_layer_norm", x)
    normed, summed = kernels.add_layer_norm_fwd(x, residual, weight, bias, eps)
    return normed, x.new_empty(0) if summed is None else summed


def add_layer_norm_bwd(
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    """See `vlmkern.reference.add_layer_norm.add_layer_norm_bwd`."""
    _require("add_layer_norm_bwd", summed)
    d_x, *parameters = kernels.add_layer_norm_bwd(grad, grad_summed, summed, weight, eps, any(wanted[1:]))
    found = (d_x, *(None if share is None else share.to(summed.dtype) for share in parameters))
    return [x for x, want in zip(found, wanted, strict=True) if want]


def _require(op: str, x: Tensor) -> None:
    if x.dtype not in kernels.DTYPES or not 0 < x.shape[-1] <= kernels.MAX_COLS:
        raise BackendUnavailable(
            f"backend 'triton' has no {op} kernel for {x.shape[-1]} columns of {x.dtype}; it takes up to "
            f"{kernels.MAX_COLS} in float32, bfloat16 and float16"
        )
