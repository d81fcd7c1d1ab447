"""Attention pooling of features that are never projected, on GPUs: scores, softmax and pooling over the features
themselves, for queries that W_K was multiplied into; W_V is left to follow. When that pays: attention_pool.py.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Kernel, launch, select
from ..blocks import operands
from ..blocks.softmax import softmax_slots, trace_of_bias
from ..blocks.windows import feature_at, slot_patch, window_number
from .windows import PER_CALL, Windows, blocks, example_windows, tiled


@triton.jit(do_not_specialize=PER_CALL)
def attention_pool_fwd_absorbed_kernel(
    p_q,
    p_0,
    p_1,
    p_2,
    p_3,
    p_keep,
    p_kind,
    p_pad,
    p_bias,
    p_pooled,
    windows,
    all_windows,
    scale,
    stride_0t,
    stride_0n,
    stride_1t,
    stride_1n,
    stride_2t,
    stride_2n,
    stride_3t,
    stride_3n,
    UNIT: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    DK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    J_PADDED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Queries times W_K [W, H, L*C] and the features -> the features pooled [W, H, L*C], dense; the keys' bias [H*DK]
    counts where it is not finite. Strides are in units of UNIT. Grid: heads, fastest, then blocks of windows. The
    features are read twice, the second time from a cache."""
    GRID: tl.constexpr = operands.Grid(ROWS, COLS, WINDOW_ROWS, WINDOW_COLS)
    features = operands.Features(
        (p_0, p_1, p_2, p_3),
        (stride_0t, stride_1t, stride_2t, stride_3t),
        (stride_0n, stride_1n, stride_2n, stride_3n),
    )
    i_head = tl.program_id(0) % H
    o_window = tl.program_id(0) // H * BLOCK_W + tl.arange(0, BLOCK_W)
    m_window = o_window < windows
    o_slot = tl.arange(0, J_PADDED)
    J: tl.constexpr = WINDOW_ROWS * WINDOW_COLS
    i_window = window_number(p_keep, o_window, windows, all_windows, HAS_KEEP)[:, None]
    i_tile, i_patch, m_slot = slot_patch(i_window, o_slot[None, :], GRID)
    m_slot = m_slot & m_window[:, None] & (o_slot < J)[None, :]
    b_kind = tl.zeros([BLOCK_W, J_PADDED], tl.int32)
    if HAS_PAD:
        b_kind = tl.load(p_kind + i_tile * (ROWS * COLS) + i_patch, mask=m_slot, other=0).to(tl.int32)
    i_wide = (o_window.to(tl.int64) * H + i_head) * (L * C)

    b_s = tl.zeros([BLOCK_W, J_PADDED], tl.float32)
    for i_feature in tl.static_range(L):
        feature = feature_at(features, i_feature, UNIT)
        p_rows = feature.first + i_tile * feature.tile_stride + i_patch * feature.patch_stride  # [BW, J]
        for i_c in range(0, C, BLOCK_C):
            o_col = i_c + tl.arange(0, BLOCK_C)
            m_col = o_col < C
            p_row = p_q + i_wide[:, None] + (i_feature * C + o_col)[None, :]
            b_q = tl.load(p_row, mask=m_window[:, None] & m_col[None, :], other=0).to(tl.float32)
            b_x = _slots(p_rows, p_pad, m_slot, b_kind, o_col, m_col, i_feature * C, L * C, HAS_PAD)
            b_s += tl.sum(b_q[:, None, :] * b_x, 2)
    if HAS_BIAS:
        b_s += trace_of_bias(p_bias + i_head * DK, DK, BLOCK_C)
    b_p = softmax_slots(b_s, scale, o_slot, J)
    for i_feature in tl.static_range(L):
        feature = feature_at(features, i_feature, UNIT)
        p_rows = feature.first + i_tile * feature.tile_stride + i_patch * feature.patch_stride
        for i_c in range(0, C, BLOCK_C):
            o_col = i_c + tl.arange(0, BLOCK_C)
            m_col = o_col < C
            b_x = _slots(p_rows, p_pad, m_slot, b_kind, o_col, m_col, i_feature * C, L * C, HAS_PAD)
            p_out = p_pooled + i_wide[:, None] + (i_feature * C + o_col)[None, :]
            b_o = tl.sum(b_p[:, :, None] * b_x, 1).to(p_pooled.dtype.element_ty)
            tl.store(p_out, b_o, mask=m_window[:, None] & m_col[None, :])


@triton.jit
def _slots(p_rows, p_pad, m_slot, b_kind, o_col, m_col, first, width, HAS_PAD: tl.constexpr):
    """Columns o_col of slots [BW, J, BC], float32, with their pad embeddings, zero outside the grid."""
    m_x = m_slot[:, :, None] & m_col[None, None, :]
    b_x = tl.load(p_rows[:, :, None] + o_col[None, None, :], mask=m_x, other=0).to(tl.float32)
    if HAS_PAD:
        p_row = p_pad + (b_kind - 1)[:, :, None] * width + (first + o_col)[None, None, :]
        b_pad = tl.load(p_row, mask=m_x & (b_kind > 0)[:, :, None], other=0).to(tl.float32)
        b_x = (b_x + b_pad).to(p_pad.dtype.element_ty).to(tl.float32)
    return b_x


def absorbed(q: Tensor, b_k: Tensor | None, windows: Windows, scale: float) -> Tensor:
    """Queries times W_K [W, H, L*C] and the keys' bias [H*Dk] -> the features pooled by each head, [W, H, L*C]."""
    count, heads, _ = q.shape
    pooled = torch.empty_like(q)
    first = windows.features[0]
    config = select("attention_pool_fwd_absorbed_kernel", q, windows=count, channels=first.shape[2])
    config = tiled(config, "BLOCK_C", windows.slots)
    tensors, strides, unit = windows.sources
    launch(
        attention_pool_fwd_absorbed_kernel,
        (-(-count // config["BLOCK_W"]) * heads,),
        (
            q,
            *tensors,
            windows.keep,
            windows.kind,
            windows.pad_embed,
            b_k,
            pooled,
            count,
            windows.of_all_tiles,
            scale,
            *strides,
        ),
        config,
        UNIT=unit,
        L=len(windows.features),
        C=first.shape[2],
        H=heads,
        DK=0 if b_k is None else len(b_k) // heads,
        HAS_BIAS=b_k is not None,
        HAS_KEEP=windows.keep is not None,
        J_PADDED=triton.next_power_of_2(windows.slots),
        **windows.constants,
    )
    return pooled


def _absorbed_example(dtype: torch.dtype, device: str, windows: int, channels: int) -> Callable[[], Tensor]:
    given = example_windows(dtype, device, windows, kept=False, padded=True)
    q = torch.randn(given.count, 1, given.width, dtype=dtype, device=device)
    b_k = torch.randn(1152, dtype=dtype, device=device)
    return lambda: absorbed(q, b_k, given, 1152**-0.5)


KERNELS = (
    Kernel(
        attention_pool_fwd_absorbed_kernel,
        _absorbed_example,
        {"windows": 2548, "channels": 1152},
        lambda size, windows, channels: (32 * windows * channels, 12 * windows * channels * size),
        blocks("BLOCK_C", 128, 256, 512),
    ),
)
