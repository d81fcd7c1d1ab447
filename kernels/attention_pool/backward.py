"""Gradients of attention pooling on GPUs, around the library's matrix products and without atomics.

    bwd       of one window: softmax again, then the gradients by query, keys and values
    scatter   from slots and means back to patches: each patch collects from the windows that hold it

A patch lies in one window of its grid, and in as many of the kept ones as name that window; they are found in the
sorted list and summed in its order.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Kernel, launch, select
from ..blocks import operands
from ..blocks.softmax import softmax_slots, trace_of_bias
from ..blocks.windows import patch_slot
from .windows import PER_CALL, Windows, blocks, example_windows, tiled


@triton.jit(do_not_specialize=PER_CALL)
def attention_pool_bwd_kernel(
    p_q,
    p_kv,
    p_bias,
    p_grad,
    p_context,
    p_dq,
    p_dkv,
    windows,
    scale,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    J: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    J_PADDED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q [W, H*DK], kv of the slots [W*J, H*(DK+DV)] without its bias [H*(DK+DV)], and the gradient by the context
    [W, H*DV] -> the context again, and the gradients by q and kv, all dense. Grid: heads, fastest, then blocks of
    windows."""
    i_head = tl.program_id(0) % H
    o_window = tl.program_id(0) // H * BLOCK_W + tl.arange(0, BLOCK_W)
    m_window = o_window < windows
    WIDTH: tl.constexpr = H * (DK + DV)
    o_slot = tl.arange(0, J_PADDED)
    i_window = o_window.to(tl.int64)
    i_row = (i_window[:, None] * J + o_slot[None, :])[:, :, None] * WIDTH  # [BW, J, 1]
    m_row = (m_window[:, None] & (o_slot < J)[None, :])[:, :, None]

    b_s = tl.zeros([BLOCK_W, J_PADDED], tl.float32)
    for i_d in range(0, DK, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_q = m_window[:, None] & (o_d < DK)[None, :]
        m_k = m_row & (o_d < DK)[None, None, :]
        o_col = i_head * DK + o_d
        b_q = tl.load(p_q + i_window[:, None] * (H * DK) + o_col[None, :], mask=m_q, other=0).to(tl.float32)
        b_k = tl.load(p_kv + i_row + o_col[None, None, :], mask=m_k, other=0).to(tl.float32)
        b_s += tl.sum(b_q[:, None, :] * b_k, 2)
    if HAS_BIAS:
        b_s += trace_of_bias(p_bias + i_head * DK, DK, BLOCK_D)
    b_p = softmax_slots(b_s, scale, o_slot, J)

    b_dp = tl.zeros([BLOCK_W, J_PADDED], tl.float32)
    for i_d in range(0, DV, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = m_window[:, None] & (o_d < DV)[None, :]
        m_v = m_row & (o_d < DV)[None, None, :]
        o_col = i_head * DV + o_d
        i_out = i_window[:, None] * (H * DV) + o_col[None, :]
        i_v = i_row + (H * DK + o_col)[None, None, :]
        b_v = tl.load(p_kv + i_v, mask=m_v, other=0).to(tl.float32)
        b_grad = tl.load(p_grad + i_out, mask=m_d, other=0).to(tl.float32)
        b_dp += tl.sum(b_grad[:, None, :] * b_v, 2)
        b_o = tl.sum(b_p[:, :, None] * b_v, 1)
        if HAS_BIAS:
            b_o += tl.load(p_bias + H * DK + o_col, mask=o_d < DV, other=0).to(tl.float32)[None, :]
        tl.store(p_context + i_out, b_o.to(p_context.dtype.element_ty), mask=m_d)
        b_dv = b_p[:, :, None] * b_grad[:, None, :]
        tl.store(p_dkv + i_v, b_dv.to(p_dkv.dtype.element_ty), mask=m_v)
    if HAS_BIAS:
        b_dp += trace_of_bias(p_bias + H * DK + i_head * DV, DV, BLOCK_D)
    # the biases of keys and values add the same to all of a window's slots, which the next line takes away again
    b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * scale

    for i_d in range(0, DK, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_q = m_window[:, None] & (o_d < DK)[None, :]
        m_k = m_row & (o_d < DK)[None, None, :]
        o_col = i_head * DK + o_d
        i_q = i_window[:, None] * (H * DK) + o_col[None, :]
        i_k = i_row + o_col[None, None, :]
        b_q = tl.load(p_q + i_q, mask=m_q, other=0).to(tl.float32)
        b_k = tl.load(p_kv + i_k, mask=m_k, other=0).to(tl.float32)
        b_dq = tl.sum(b_ds[:, :, None] * b_k, 1)
        tl.store(p_dq + i_q, b_dq.to(p_dq.dtype.element_ty), mask=m_q)
        b_dk = b_ds[:, :, None] * b_q[:, None, :]
        tl.store(p_dkv + i_k, b_dk.to(p_dkv.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["windows", "steps", "i_feature"])
def attention_pool_bwd_scatter_kernel(
    p_slots,
    p_mean,
    p_sorted,
    p_order,
    p_out,
    windows,
    steps,
    i_feature,
    L: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients by slots [W*J, L*C] and by means [W, L*C] -> those by the i_feature-th feature's patches [T*N, C],
    dense. Grid: blocks of columns, fastest, then patches.

    With HAS_KEEP, `sorted` are the kept windows in order and `order` where each of them was; 2^steps > W.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_patch = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_col = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_col = o_col < C
    o_wide = i_feature * C + o_col
    J: tl.constexpr = WINDOW_ROWS * WINDOW_COLS
    GRID: tl.constexpr = operands.Grid(ROWS, COLS, WINDOW_ROWS, WINDOW_COLS)
    i_window, i_slot = patch_slot(i_patch, GRID)
    begin, end = i_window, i_window + 1
    if HAS_KEEP:
        # the first of the sorted windows that is not below this patch's, and the first that is above
        begin, end = i_window * 0, i_window * 0
        for i_step in tl.range(0, steps, num_stages=1):
            step = 1 << (steps - 1 - i_step)
            i_begin, i_end = begin + step, end + step
            low = tl.load(p_sorted + i_begin - 1, mask=i_begin <= windows, other=1 << 62)
            high = tl.load(p_sorted + i_end - 1, mask=i_end <= windows, other=1 << 62)
            begin = tl.where(low < i_window, i_begin, begin)
            end = tl.where(high <= i_window, i_end, end)
    b_x = tl.zeros([BLOCK_C], tl.float32)
    for i_kept in range(begin, end):
        i_source = tl.cast(i_kept, tl.int64)
        if HAS_KEEP:
            i_source = tl.load(p_order + i_kept)
        b_x += tl.load(p_slots + (i_source * J + i_slot) * (L * C) + o_wide, mask=m_col, other=0).to(tl.float32)
        b_x += tl.load(p_mean + i_source * (L * C) + o_wide, mask=m_col, other=0).to(tl.float32) / J
    tl.store(p_out + i_patch * C + o_col, b_x.to(p_out.dtype.element_ty), mask=m_col)


def context_bwd(
    q: Tensor, kv: Tensor, b_kv: Tensor | None, grad: Tensor, slots: int, num_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Context [W, H*Dv], and gradients by q [W, H*Dk] and kv [W*J, H*(Dk+Dv)], of the gradient by the context."""
    grad = grad.contiguous()
    key_dim = q.shape[1] // num_heads
    value_dim = grad.shape[1] // num_heads
    context, dq, dkv = (x.new_empty(x.shape) for x in (grad, q, kv))
    config = select("attention_pool_bwd_kernel", q, windows=len(q), head_dim=max(key_dim, value_dim))
    config = tiled(config, "BLOCK_D", slots)
    launch(
        attention_pool_bwd_kernel,
        (-(-len(q) // config["BLOCK_W"]) * num_heads,),
        (q, kv, b_kv, grad, context, dq, dkv, len(q), scale),
        config,
        H=num_heads,
        DK=key_dim,
        DV=value_dim,
        J=slots,
        HAS_BIAS=b_kv is not None,
        J_PADDED=triton.next_power_of_2(slots),
    )
    return context, dq, dkv


def sorted_windows(windows: Windows) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The kept windows in order, and where in `keep` each of them is."""
    if windows.keep is None:
        return None, None
    return windows.keep.clamp(0, windows.of_all_tiles - 1).sort(stable=True)


def scatter(
    d_slots: Tensor, d_mean: Tensor, windows: Windows, kept: Tensor | None, order: Tensor | None, feature: int
) -> Tensor:
    """Gradient by one feature, [T, N, C], dense, of those by all slots [W*J, L*C] and by the means [W, L*C]; kept and
    order are `sorted_windows`."""
    tiles, patches, channels = windows.features[feature].shape
    out = d_slots.new_empty(tiles, patches, channels)
    config = select("attention_pool_bwd_scatter_kernel", d_slots, windows=windows.count, channels=channels)
    blocks = -(-channels // config["BLOCK_C"])
    constants = {key: value for key, value in windows.constants.items() if key != "HAS_PAD"}
    launch(
        attention_pool_bwd_scatter_kernel,
        (tiles * patches * blocks,),
        (d_slots, d_mean, kept, order, out, windows.count, windows.count.bit_length(), feature),
        config,
        L=len(windows.features),
        C=channels,
        HAS_KEEP=kept is not None,
        **constants,
    )
    return out


def _context_example(dtype: torch.dtype, device: str, windows: int, head_dim: int) -> Callable[[], Any]:
    heads = 1152 // head_dim
    q, grad, kv = (
        torch.randn(rows, columns * heads * head_dim, dtype=dtype, device=device)
        for rows, columns in ((windows, 1), (windows, 1), (4 * windows, 2))
    )
    b_kv = torch.randn(kv.shape[1], dtype=dtype, device=device)
    return lambda: context_bwd(q, kv, b_kv, grad, 4, heads, head_dim**-0.5)


def _scatter_example(
    dtype: torch.dtype, device: str, windows: int, channels: int, kept: bool = False
) -> Callable[[], Tensor]:
    given = example_windows(dtype, device, windows, kept, padded=False)
    d_slots, d_mean = (
        torch.randn(rows * given.count, given.width, dtype=dtype, device=device) for rows in (given.slots, 1)
    )
    return lambda: scatter(d_slots, d_mean, given, *sorted_windows(given), 1)


KERNELS = (
    Kernel(
        attention_pool_bwd_kernel,
        _context_example,
        {"windows": 2548, "head_dim": 72},
        lambda size, windows, head_dim: (40 * windows * 1152, 20 * windows * 1152 * size),
        blocks("BLOCK_D", 64, 128),
    ),
    Kernel(
        attention_pool_bwd_scatter_kernel,
        _scatter_example,
        {"windows": 2548, "channels": 1152},
        lambda size, windows, channels: (5 * windows * channels, 9 * windows * channels * size),
        tuple({"BLOCK_C": size, "num_warps": warps} for size in (128, 256, 512, 1024) for warps in (1, 2, 4)),
        variants=({}, {"kept": True}),
    ),
)
