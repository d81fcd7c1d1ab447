"""SwiGLU's first product with both halves of its gate in the epilogue: hidden = silu(x Wg^T + bg) * (x Wv^T + bv), and
the elementwise kernels between library products. Shazeer (2020), eq. 6.

Writing [value | gate] and reading it again takes 6 bytes for each byte of `hidden`; here the halves never leave the
registers. Where the fused product is not used, `silu_mul_fwd_kernel` reads the halves once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import (
    Kernel,
    Launch,
    descriptor,
    descriptor_like,
    launch,
    planned,
    select,
    select_for,
    split,
    start,
)
from ..blocks import operands
from ..blocks.strides import in_elements, in_units

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# with fewer rows than half a tile, the product is a reading of the weights, which libraries split along C as well; in
# float32 it would have to be made without tensor cores, as their tf32 is not float32
FEWEST_ROWS = 64
_PRODUCT_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _load_rows(p_rows, o_row, stride, i_col, cols, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """WIDTH columns from i_col on of the rows o_row, zeros from column `cols` on unless EVEN says there are none."""
    o_col = i_col + tl.arange(0, WIDTH)[None, :]
    p_tile = p_rows + o_row.to(tl.int64)[:, None] * stride + o_col
    if EVEN:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_col < cols) & (o_row >= 0)[:, None], other=0)


@triton.jit
def _hidden_tile(
    tensors,
    i_tile,
    sizes,
    stride_x,
    STRIDE_W: tl.constexpr,
    TILE: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile number i_tile of `hidden`; tiles of rows take turns at the same weights, which stay in the cache."""
    x, w_up, p_bias, hidden = tensors
    rows, channels, features = sizes
    row_tiles = tl.cdiv(rows, TILE.M)
    group = TILE.GROUP * tl.cdiv(features, TILE.N)
    i_first = i_tile // group * TILE.GROUP
    group_rows = tl.minimum(row_tiles - i_first, TILE.GROUP)
    i_row = (i_first + i_tile % group % group_rows) * TILE.M
    i_col = i_tile % group // group_rows * TILE.N
    o_row = i_row + tl.arange(0, TILE.M)
    o_col = i_col + tl.arange(0, TILE.N)
    # rows and columns beyond the last repeat it, and are not stored
    o_x = tl.minimum(o_row, rows - 1)
    o_half = tl.arange(0, 2 * TILE.N)
    o_w = tl.minimum(i_col + o_half % TILE.N, features - 1) + o_half // TILE.N * features
    # without it the compiler clears the accumulator between the products' start and end, which puts them in series
    tl.assume(channels > 0)
    # value and gate side by side, so that one matrix instruction is as wide as the hardware has it
    b_acc = tl.zeros([TILE.M, 2 * TILE.N], tl.float32)
    for i_k in range(0, channels, TILE.K):
        if TMA:
            b_x = x.load([i_row, i_k])
            b_w = w_up.load([0, i_col, i_k]).reshape(2 * TILE.N, TILE.K)
        else:
            b_x = _load_rows(x, o_x, stride_x, i_k, channels, TILE.K, EVEN_K)
            b_w = _load_rows(w_up, o_w, STRIDE_W, i_k, channels, TILE.K, EVEN_K)
        b_acc = tl.dot(b_x, b_w.T, b_acc)
    b_value, b_gate = b_acc.reshape(TILE.M, 2, TILE.N).permute(0, 2, 1).split()  # [BM, BN] each
    if BIAS:
        m_col = o_col < features
        b_value += tl.load(p_bias + o_col, mask=m_col, other=0).to(tl.float32)[None, :]
        b_gate += tl.load(p_bias + features + o_col, mask=m_col, other=0).to(tl.float32)[None, :]
    # rounded to the tensor's dtype before the product, as eager torch does
    DTYPE: tl.constexpr = hidden.dtype if TMA else hidden.dtype.element_ty
    b_silu = (b_gate / (1 + tl.exp(-b_gate))).to(DTYPE).to(tl.float32)
    b_hidden = (b_silu * b_value).to(DTYPE)
    if TMA:
        hidden.store([i_row, i_col], b_hidden)
    else:
        p_tile = hidden + o_row.to(tl.int64)[:, None] * features + o_col[None, :]
        tl.store(p_tile, b_hidden, mask=(o_row < rows)[:, None] & (o_col < features)[None, :])


@triton.jit(do_not_specialize=["rows", "stride_x"])
def swiglu_mlp_fwd_kernel(
    x,
    w_up,
    p_bias,
    hidden,
    rows,
    channels,
    features,
    stride_x,
    UNIT: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """x [rows, channels] and w_up [2 * features, channels] = [value | gate], of row strides stride_x, in units of UNIT,
    and STRIDE_W, and with BIAS p_bias [2 * features] -> hidden [rows, features], dense.

    With TMA, x and hidden are descriptors of their shapes and w_up one of [2, features, channels], in blocks of both
    halves; else pointers. Grid: tiles of `hidden`, or with PERSISTENT fewer programs that go through them, the copies
    for a tile begun while the one before it is finished.

    FLOPs: 4 * rows * channels * features. Least bytes: x, w_up and hidden once.
    """
    TILE: tl.constexpr = operands.Tile(BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)
    tensors, sizes = (x, w_up, p_bias, hidden), (rows, channels, features)
    stride_x = in_elements(stride_x, UNIT)
    if PERSISTENT:
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(features, BLOCK_N)
        for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _hidden_tile(tensors, i_tile, sizes, stride_x, STRIDE_W, TILE, BIAS, EVEN_K, TMA)
    else:
        _hidden_tile(tensors, tl.program_id(0), sizes, stride_x, STRIDE_W, TILE, BIAS, EVEN_K, TMA)


@triton.jit(do_not_specialize=["blocks", "stride_up"])
def silu_mul_fwd_kernel(p_up, p_out, cols, blocks, stride_up, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """up [rows, 2 * cols] = [value | gate] of row stride stride_up, in units of UNIT -> silu(gate) * value
    [rows, cols], dense.

    Grid: blocks of columns, fastest, then rows. FLOPs: 5 an element of the result. Bytes: 3 elements each.
    """
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    o_col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_col = o_col < cols
    p_row = p_up + i_row * in_elements(stride_up, UNIT)
    b_value = tl.load(p_row + o_col, mask=m_col, other=0).to(tl.float32)
    b_gate = tl.load(p_row + cols + o_col, mask=m_col, other=0).to(tl.float32)
    # rounded to the tensor's dtype before the product, as eager torch does
    b_silu = (b_gate / (1 + tl.exp(-b_gate))).to(p_out.dtype.element_ty).to(tl.float32)
    tl.store(p_out + i_row * cols + o_col, (b_silu * b_value).to(p_out.dtype.element_ty), mask=m_col)


@triton.jit(do_not_specialize=["blocks", "stride_up"])
def swiglu_mlp_bwd_kernel(
    p_grad, p_up, p_grad_up, p_hidden, cols, blocks, stride_up, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """grad [rows, cols] and up as above -> grad_up [rows, 2 * cols] and the forward's result again, dense.

    Grid: blocks of columns, fastest, then rows. FLOPs: 14 an element of grad. Bytes: 6 elements each.
    """
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    o_col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_col = o_col < cols
    p_row = p_up + i_row * in_elements(stride_up, UNIT)
    b_value = tl.load(p_row + o_col, mask=m_col, other=0).to(tl.float32)
    b_gate = tl.load(p_row + cols + o_col, mask=m_col, other=0).to(tl.float32)
    b_grad = tl.load(p_grad + i_row * cols + o_col, mask=m_col, other=0).to(tl.float32)
    b_sigmoid = 1 / (1 + tl.exp(-b_gate))
    b_silu = (b_gate * b_sigmoid).to(p_hidden.dtype.element_ty).to(tl.float32)
    b_grad_gate = b_grad * b_value * b_sigmoid * (1 + b_gate * (1 - b_sigmoid))
    p_out = p_grad_up + i_row * 2 * cols
    tl.store(p_out + o_col, (b_grad * b_silu).to(p_grad_up.dtype.element_ty), mask=m_col)
    tl.store(p_out + cols + o_col, b_grad_gate.to(p_grad_up.dtype.element_ty), mask=m_col)
    tl.store(p_hidden + i_row * cols + o_col, (b_silu * b_value).to(p_hidden.dtype.element_ty), mask=m_col)


class _Plan(NamedTuple):
    """All of a launch but its tensors; descriptors like those of x, w_up and hidden, where it takes any."""

    grid: tuple[int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    descriptors: tuple[Any, ...]


@planned
def _plan(
    rows: int,
    channels: int,
    features: int,
    stride_x: int,
    stride_w: int,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> _Plan:
    size = dtype.itemsize
    tma = aligned and all(stride * size % 16 == 0 for stride in (stride_x, stride_w, features))
    # rows that overlap, or are one, are not for descriptors
    tma = tma and min(stride_x, stride_w) >= channels
    shape = {"rows": rows, "channels": channels, "features": features}
    config = select_for("swiglu_mlp_fwd_kernel", dtype, device, tma, **shape)
    block_m, block_n, block_k = (config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(features, block_n)
    blocks: tuple[tuple[list[int], list[int], list[int]], ...] = ()
    if config["TMA"]:
        blocks = (
            ([rows, channels], [stride_x, 1], [block_m, block_k]),
            ([2, features, channels], [features * stride_w, stride_w, 1], [2, block_n, block_k]),
            ([rows, features], [features, 1], [block_m, block_n]),
        )
    unit, in_unit = in_units(dtype, stride_x)
    constants = {"UNIT": unit, "STRIDE_W": stride_w, "BIAS": bias, "EVEN_K": channels % block_k == 0}
    return _Plan(
        (min(tiles, _multiprocessors(device)) if config["PERSISTENT"] else tiles,),
        (rows, channels, features, *in_unit),
        *split(config, constants),
        tuple(descriptor_like(dtype, *block) for block in blocks),
    )


def _multiprocessors(device: torch.device) -> int:
    # an H200's, where there is none
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def takes(rows: Tensor, w_up: Tensor) -> bool:
    """Whether the fused product is for rows [M, C] and w_up [2F, C]."""
    return len(rows) >= FEWEST_ROWS and rows.dtype in _PRODUCT_DTYPES and w_up.numel() > 0 and w_up.stride(1) == 1


def swiglu_mlp_fwd(x: Tensor, w_up: Tensor, b_up: Tensor | None) -> Tensor:
    """hidden [M, F], dense, of x [M, C], w_up [2F, C] and b_up [2F] or None; copies x or w_up if its last stride is
    not 1."""
    x, w_up = _unit_last_stride(x), _unit_last_stride(w_up)
    rows, channels = x.shape
    features = len(w_up) // 2
    hidden = x.new_empty(rows, features)
    aligned = (x.data_ptr() | w_up.data_ptr()) % 16 == 0
    strides = x.stride(0), w_up.stride(0)
    how = _plan(rows, channels, features, *strides, b_up is not None, x.dtype, x.device, aligned)
    tensors = (x, w_up, hidden)
    if how.descriptors:
        tensors = tuple(descriptor(like, tensor) for like, tensor in zip(how.descriptors, tensors, strict=True))
    # without a bias, any tensor in its place: `start` asks the first for its device
    args = (*tensors[:2], hidden if b_up is None else b_up.contiguous(), tensors[2], *how.sizes)
    start(Launch(swiglu_mlp_fwd_kernel, how.grid, args, how.constants, how.options))
    return hidden


def silu_mul(up: Tensor) -> Tensor:
    """[..., 2F] = [value | gate] -> silu(gate) * value, [..., F], dense."""
    rows = _unit_last_stride(up.reshape(-1, up.shape[-1]))
    cols = up.shape[-1] // 2
    out = up.new_empty((*up.shape[:-1], cols))
    if out.numel():
        config = select("silu_mul_fwd_kernel", up, rows=len(rows), features=cols)
        blocks = triton.cdiv(cols, config["BLOCK"])
        unit, strides = in_units(up.dtype, rows.stride(0))
        args = (rows, out, cols, blocks, *strides)
        launch(silu_mul_fwd_kernel, (len(rows) * blocks,), args, config, UNIT=unit)
    return out


def silu_mul_bwd(grad: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient by `up`, [M, 2F], and the forward's result again, [M, F], of rows grad [M, F] and up [M, 2F]."""
    grad, up = grad.contiguous(), _unit_last_stride(up)
    rows, cols = grad.shape
    grad_up, hidden = grad.new_empty(rows, 2 * cols), torch.empty_like(grad)
    if hidden.numel():
        config = select("swiglu_mlp_bwd_kernel", grad, rows=rows, features=cols)
        blocks = triton.cdiv(cols, config["BLOCK"])
        unit, strides = in_units(up.dtype, up.stride(0))
        args = (grad, up, grad_up, hidden, cols, blocks, *strides)
        launch(swiglu_mlp_bwd_kernel, (rows * blocks,), args, config, UNIT=unit)
    return grad_up, hidden


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _product_example(
    dtype: torch.dtype, device: str, rows: int, channels: int, features: int, bias: bool = False
) -> Callable[[], Tensor]:
    x = torch.randn(rows, channels, dtype=dtype, device=device)
    w_up = torch.randn(2 * features, channels, dtype=dtype, device=device) * channels**-0.5
    b_up = torch.randn(2 * features, dtype=dtype, device=device) if bias else None
    return lambda: swiglu_mlp_fwd(x, w_up, b_up)


def _product_cost(size: int, rows: int, channels: int, features: int) -> tuple[float, float]:
    return 4 * rows * channels * features, (rows * (channels + features) + 2 * channels * features) * size


def _forward_example(dtype: torch.dtype, device: str, rows: int, features: int) -> Callable[[], Tensor]:
    up = torch.randn(rows, 2 * features, dtype=dtype, device=device)
    return lambda: silu_mul(up)


def _backward_example(dtype: torch.dtype, device: str, rows: int, features: int) -> Callable[[], tuple[Tensor, Tensor]]:
    up, grad = (torch.randn(rows, cols, dtype=dtype, device=device) for cols in (2 * features, features))
    return lambda: silu_mul_bwd(grad, up)


def _elementwise(
    function: Any, example: Callable[..., Any], flops: int, elements: int, rows: tuple[int, ...]
) -> Kernel:
    def cost(size: int, rows: int, features: int) -> tuple[float, float]:
        return flops * rows * features, elements * rows * features * size

    shape, *shapes = ({"rows": count, "features": 6144} for count in rows)
    return Kernel(
        function,
        example,
        shape,
        cost,
        tuple({"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8)),
        shapes=tuple(shapes),
    )


KERNELS = (
    Kernel(
        swiglu_mlp_fwd_kernel,
        _product_example,
        {"rows": 2548, "channels": 1152, "features": 6144},
        _product_cost,
        tuple(
            {
                "BLOCK_M": m,
                "BLOCK_N": n,
                "BLOCK_K": k,
                "GROUP_M": group,
                "TMA": tma,
                "PERSISTENT": persistent,
                "num_warps": warps,
                "num_stages": stages,
                **limit,
            }
            for m, n, k, warps, stages, group, tma, persistent, limit in (
                (128, 128, 64, 8, 4, 8, True, False, {}),
                (128, 128, 64, 8, 3, 8, True, False, {}),
                (128, 128, 64, 8, 4, 4, True, False, {}),
                (128, 128, 64, 8, 4, 16, True, False, {}),
                (128, 128, 64, 8, 4, 8, True, True, {}),
                (128, 128, 64, 8, 3, 8, True, True, {}),
                (128, 64, 64, 8, 3, 8, True, False, {"maxnreg": 128}),
                (128, 64, 64, 4, 3, 8, True, False, {}),
                (64, 128, 64, 4, 4, 8, True, False, {}),
                (64, 64, 64, 4, 4, 8, True, False, {}),
                (128, 128, 64, 8, 3, 8, False, False, {}),
                (128, 128, 32, 8, 4, 8, False, False, {}),
                (128, 64, 32, 4, 4, 8, False, False, {}),
                (64, 128, 32, 4, 4, 8, False, False, {}),
            )
        ),
        shapes=tuple({"rows": rows, "channels": 1152, "features": 6144} for rows in (196, 640, 8192)),
        variants=({}, {"bias": True}),
    ),
    _elementwise(silu_mul_fwd_kernel, _forward_example, 5, 3, (2548, 16)),
    _elementwise(swiglu_mlp_bwd_kernel, _backward_example, 14, 6, (2548,)),
)
