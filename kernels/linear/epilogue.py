"""What follows a library's product in a linear layer, in one pass: y = act(product + bias) + residual, in place, and
the gradient by the layer's value before its activation.

GELU: Hendrycks and Gimpel (2016), by the error function or, as in SigLIP, its tanh approximation or, as in CLIP, a
sigmoid; SiLU: as there.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import Kernel, launch, select
from ..blocks import constants
from ..blocks.strides import in_elements, in_units

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _sigmoid(b_x):
    # in base 2, which is the hardware's; an exponential that overflows gives the limit, 0
    return 1 / (1 + tl.exp2(-b_x * constants.LOG2_E))


@triton.jit
def _activate(b_x, ACTIVATION: tl.constexpr):
    """act(x) in float32."""
    if ACTIVATION == "gelu_tanh":
        b_exponent = -b_x * (constants.GELU_TANH_LINEAR + constants.GELU_TANH_CUBIC * b_x * b_x)
        return b_x / (1 + tl.exp2(b_exponent * constants.LOG2_E))
    elif ACTIVATION == "gelu":
        return b_x * (0.5 * (1 + tl.erf(b_x * constants.SQRT_HALF)))
    elif ACTIVATION == "silu":
        return b_x / (1 + tl.exp2(-b_x * constants.LOG2_E))
    elif ACTIVATION == "quick_gelu":
        return b_x / (1 + tl.exp2(-b_x * (constants.QUICK_GELU * constants.LOG2_E)))
    else:
        return b_x


@triton.jit
def _slope(b_x, ACTIVATION: tl.constexpr):
    """act'(x) in float32."""
    if ACTIVATION == "gelu_tanh":
        b_sigmoid = _sigmoid(b_x * (constants.GELU_TANH_LINEAR + constants.GELU_TANH_CUBIC * b_x * b_x))
        # beyond 30 the sigmoid's own slope is 0, which a square that overflows would turn into NaN
        b_near = tl.minimum(tl.maximum(b_x, -30.0), 30.0)
        b_steepness = constants.GELU_TANH_LINEAR + 3 * constants.GELU_TANH_CUBIC * b_near * b_near
        b_rise = b_sigmoid * (1 - b_sigmoid) * b_steepness
        return b_sigmoid + b_x * b_rise
    elif ACTIVATION == "gelu":
        b_normal = constants.NORMAL_AT_0 * tl.exp2(b_x * b_x * (-0.5 * constants.LOG2_E))
        return 0.5 * (1 + tl.erf(b_x * constants.SQRT_HALF)) + b_x * b_normal
    else:
        # silu, or quick GELU, which is silu(c x) / c
        STEEPNESS: tl.constexpr = constants.QUICK_GELU if ACTIVATION == "quick_gelu" else 1.0
        b_sigmoid = _sigmoid(b_x * STEEPNESS)
        # c x may overflow where x does not, and the sigmoid's own slope is 0 there
        return b_sigmoid + b_x * (b_sigmoid * (1 - b_sigmoid) * STEEPNESS)


@triton.jit(do_not_specialize=["rows", "blocks", "stride_residual"])
def linear_fwd_kernel(
    p_y,
    p_bias,
    p_residual,
    rows,
    cols,
    blocks,
    stride_residual,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [rows, cols], dense -> act(y + bias) + residual in its place; bias [cols] or None, residual [rows, cols] of row
    stride stride_residual, in units of UNIT, or None.

    Grid: blocks of columns, fastest, then of rows. FLOPs: about 12 an element. Bytes: y twice, residual and bias once.
    """
    o_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (o_row < rows) & (o_col < cols)  # [BM, BN]
    p_tile = p_y + o_row * cols + o_col
    b_y = tl.load(p_tile, mask=mask, other=0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_col, mask=o_col < cols, other=0).to(tl.float32)
    b_y = _activate(b_y, ACTIVATION)
    if p_residual is not None:
        p_added = p_residual + o_row * in_elements(stride_residual, UNIT) + o_col
        b_y += tl.load(p_added, mask=mask, other=0).to(tl.float32)
    tl.store(p_tile, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "blocks"])
def linear_bwd_kernel(
    p_grad,
    p_y,
    p_bias,
    rows,
    cols,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad and y [rows, cols], dense -> grad * act'(y + bias) in the place of y; bias [cols] or None.

    Grid: blocks of columns, fastest, then of rows. FLOPs: about 20 an element. Bytes: y twice, grad and bias once.
    """
    o_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (o_row < rows) & (o_col < cols)  # [BM, BN]
    o_tile = o_row * cols + o_col
    b_y = tl.load(p_y + o_tile, mask=mask, other=0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_col, mask=o_col < cols, other=0).to(tl.float32)
    b_grad = tl.load(p_grad + o_tile, mask=mask, other=0).to(tl.float32) * _slope(b_y, ACTIVATION)
    tl.store(p_y + o_tile, b_grad.to(p_y.dtype.element_ty), mask=mask)


def finish_(y: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """y [M, E], dense, becomes act(y + bias) + residual, and is returned. bias [E] or None, residual [M, E] or None."""
    if y.numel():
        stride = 0
        if residual is not None:
            residual = residual if residual.stride(1) == 1 else residual.contiguous()
            stride = residual.stride(0)
        unit, strides = in_units(y.dtype, stride)
        _over_tiles(linear_fwd_kernel, (y, _dense(bias), residual), y, strides, activation, UNIT=unit)
    return y


def activation_bwd_(grad: Tensor, y: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y [M, E], dense, becomes grad * act'(y + bias), and is returned; activation is not "none"."""
    if y.numel():
        _over_tiles(linear_bwd_kernel, (grad.contiguous(), y, _dense(bias)), y, (), activation)
    return y


def _over_tiles(
    kernel: Any, tensors: tuple[Tensor | None, ...], y: Tensor, strides: tuple[int, ...], activation: str, **unit: int
) -> None:
    rows, cols = y.shape
    config = select(kernel.__name__, y, rows=rows, cols=cols)
    blocks = triton.cdiv(cols, config["BLOCK_N"])
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * blocks,)
    launch(kernel, grid, (*tensors, rows, cols, blocks, *strides), config, ACTIVATION=activation, **unit)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _forward_example(
    dtype: torch.dtype, device: str, rows: int, cols: int, activation: str = "gelu_tanh", residual: bool = True
) -> Callable[[], Tensor]:
    y, other = torch.randn(2, rows, cols, dtype=dtype, device=device)
    bias = torch.randn(cols, dtype=dtype, device=device)
    # a copy, as each call writes over its argument
    return lambda: finish_(y.clone(), bias, activation, other if residual else None)


def _backward_example(
    dtype: torch.dtype, device: str, rows: int, cols: int, activation: str = "gelu_tanh"
) -> Callable[[], Tensor]:
    y, grad = torch.randn(2, rows, cols, dtype=dtype, device=device)
    bias = torch.randn(cols, dtype=dtype, device=device)
    return lambda: activation_bwd_(grad, y.clone(), bias, activation)


def _kernel(
    function: Any, example: Callable[..., Any], flops: int, elements: int, variants: tuple[dict[str, Any], ...]
) -> Kernel:
    def cost(size: int, rows: int, cols: int) -> tuple[float, float]:
        return flops * rows * cols, (elements * rows + 1) * cols * size

    return Kernel(
        function,
        example,
        {"rows": 9477, "cols": 4304},
        cost,
        tuple(
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps}
            for m, n, warps in (
                (2, 512, 4),
                (4, 256, 2),
                (4, 256, 4),
                (8, 128, 2),
                (8, 128, 4),
                (8, 256, 4),
                (8, 256, 8),
                (4, 512, 4),
                (4, 512, 8),
                (16, 128, 4),
                (16, 256, 8),
                (2, 1024, 4),
            )
        ),
        shapes=({"rows": 9477, "cols": 1152},),
        variants=variants,
    )


KERNELS = (
    _kernel(
        linear_fwd_kernel,
        _forward_example,
        12,
        3,
        ({}, {"activation": "none"}, {"activation": "gelu"}, {"activation": "silu", "residual": False}),
    ),
    _kernel(linear_bwd_kernel, _backward_example, 20, 3, ({}, {"activation": "gelu"}, {"activation": "silu"})),
)
