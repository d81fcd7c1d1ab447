"""Layer norm and RMS norm on CPU, by the C++ kernels of csrc/cpu/norms: layer norm is RMS norm of centred rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch.extension import dtype_code, extension, extents
from ..kernels import _rows


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """x and residual [..., C] -> the norm of their sum, times weight + offset, plus bias, and the sum; without
    residual, [0] for that."""
    normed = x.new_empty(x.shape)
    summed = x.new_empty(0 if residual is None else x.shape)
    if x.numel() == 0:
        return normed, summed
    rows = _rows.of(x, residual)
    weight, bias = _dense(weight), _dense(bias)
    extension().norm_fwd(
        dtype_code(x.dtype),
        centred,
        *_addresses(rows, x.shape[-1]),
        _pointer(weight),
        _pointer(bias),
        normed.data_ptr(),
        0 if residual is None else summed.data_ptr(),
        eps,
        offset,
        torch.get_num_threads(),
        extents(*rows.tensors, weight, bias, normed, None if residual is None else summed),
    )
    return normed, summed


def norm_bwd(
    grad: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    wanted: Sequence[bool],
    centred: bool,
) -> list[Tensor]:
    """Gradients by (x or residual, which are the same, weight, bias), those that are wanted, in this order."""
    cols = summed.shape[-1]
    if summed.numel() == 0:
        shapes = (summed.shape, cols, cols)
        return [summed.new_zeros(shape) for shape, want in zip(shapes, wanted, strict=False) if want]
    d_x = summed.new_empty(summed.shape)
    d_weight, d_bias = (summed.new_empty(cols) if want else None for want in (*wanted[1:], False)[:2])
    rows = _rows.of(grad, grad_summed, summed)
    weight = _dense(weight)
    extension().norm_bwd(
        dtype_code(summed.dtype),
        centred,
        *_addresses(rows, cols),
        _pointer(weight),
        d_x.data_ptr(),
        _pointer(d_weight),
        _pointer(d_bias),
        eps,
        offset,
        torch.get_num_threads(),
        extents(*rows.tensors, weight, d_x, d_weight, d_bias),
    )
    return [t for t, want in zip((d_x, d_weight, d_bias), wanted, strict=False) if want]


def _addresses(rows: _rows.Rows, cols: int) -> tuple[object, ...]:
    """Sizes, and an address and strides for each tensor."""
    strides = (_rows.padded(s, 0) for s in rows.strides)
    return (*_rows.padded(rows.sizes, 1), cols), *zip(map(_pointer, rows.tensors), strides, strict=True)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
