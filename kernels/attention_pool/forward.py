"""Attention pooling of windows on GPUs: what goes on around the library's matrix products, forward.

At 13 crops of jina-vlm (2,548 windows of 4 slots, 9,477 patches, width 2 x 1152, bfloat16), on an H200 of 790 TFLOP/s
and 4.3 TB/s, by arithmetic:

    heads x dims      form                       GFLOP    MB moved    us by FLOPs    us by bytes
    16 x 72           projected by the library     121         196            153             46
    16 x 72           absorbed, q' stored           47         860             60            200
    16 x 72           absorbed in one kernel        47     1,000 or more of L2, with 60 us of plain FMAs
    1 x 1152 (2304)   projected by the library     178         250            225             58
    1 x 1152 (2304)   absorbed, q' stored           68         190             86             44

With many heads the absorbed form (csrc/cpu/attention_pool/heads.h) moves a row of 2,304 for every head and window,
or reads the features again for every head, which 132 multiprocessors that share a cache cannot hide; so keys and values
are projected by the library at its full rate, and the kernels here pass over rows once. With one head it is the other
way.

    slots     mean of each window's slots, read from the features in place, and the slots side by side if wanted
    context   scores, softmax and pooling of projected keys and values
    absorbed  the same over the features themselves (absorbed.py)

The keys' bias drops out of the softmax, and the values' is added to its result, as probabilities sum to one; so zero
slots have neither keys nor values. A bias that is not finite makes NaN of what it would drop out of.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import Kernel, launch, select
from ..blocks import operands
from ..blocks.softmax import softmax_slots, trace_of_bias
from ..blocks.windows import feature_at, slot_patch, window_number
from .windows import PER_CALL, Windows, blocks, example_windows, tiled

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _padded(b_x, p_kind, p_pad, i_patch, m_patch, o_col, m_col, width, HAS_PAD: tl.constexpr):
    """Patches b_x [BW, BC], float32, plus the row of pad_embed for their kind (0: none), rounded as stored."""
    if HAS_PAD:
        b_kind = tl.load(p_kind + i_patch, mask=m_patch, other=0).to(tl.int32)  # [BW]
        p_row = p_pad + (b_kind - 1)[:, None] * width + o_col[None, :]
        b_pad = tl.load(p_row, mask=(b_kind > 0)[:, None] & m_col[None, :], other=0)
        b_x = (b_x + b_pad.to(tl.float32)).to(p_pad.dtype.element_ty).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=PER_CALL)
def attention_pool_fwd_slots_kernel(
    p_0,
    p_1,
    p_2,
    p_3,
    p_keep,
    p_kind,
    p_pad,
    p_mean,
    p_slots,
    windows,
    all_windows,
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_PAD: tl.constexpr,
    WRITES_SLOTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """L features [T, N, C] of strides in units of UNIT -> mean [W, L*C] and, if wanted, slots [W*J, L*C], dense. Grid:
    blocks of a feature's columns, fastest, then features, then blocks of windows. Each slot is read once."""
    GRID: tl.constexpr = operands.Grid(ROWS, COLS, WINDOW_ROWS, WINDOW_COLS)
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    i_feature = i_program // BLOCKS % L
    o_col = i_program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_col = o_col < C
    o_window = i_program // (BLOCKS * L) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_window = o_window < windows
    i_window = window_number(p_keep, o_window, windows, all_windows, HAS_KEEP)
    features = operands.Features(
        (p_0, p_1, p_2, p_3),
        (stride_0t, stride_1t, stride_2t, stride_3t),
        (stride_0n, stride_1n, stride_2n, stride_3n),
    )
    feature = feature_at(features, i_feature, UNIT)
    J: tl.constexpr = WINDOW_ROWS * WINDOW_COLS
    o_wide = i_feature * C + o_col
    b_sum = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for i_slot in tl.range(0, J, loop_unroll_factor=4):
        i_tile, i_patch, inside = slot_patch(i_window, i_slot, GRID)
        inside = inside & m_window
        o_patch = i_tile * feature.tile_stride + i_patch * feature.patch_stride
        p_row = feature.first + o_patch[:, None] + o_col[None, :]
        mask = inside[:, None] & m_col[None, :]
        b_x = tl.load(p_row, mask=mask, other=0).to(tl.float32)
        i_flat = i_tile * (ROWS * COLS) + i_patch
        b_x = _padded(b_x, p_kind, p_pad, i_flat, inside, o_wide, m_col, L * C, HAS_PAD)
        b_sum += b_x
        if WRITES_SLOTS:
            p_slot = p_slots + (o_window.to(tl.int64) * J + i_slot)[:, None] * (L * C) + o_wide[None, :]
            tl.store(p_slot, b_x.to(p_slots.dtype.element_ty), mask=m_window[:, None] & m_col[None, :])
    p_out = p_mean + o_window.to(tl.int64)[:, None] * (L * C) + o_wide[None, :]
    tl.store(p_out, (b_sum / J).to(p_mean.dtype.element_ty), mask=m_window[:, None] & m_col[None, :])


@triton.jit(do_not_specialize=PER_CALL)
def attention_pool_fwd_kernel(
    p_q,
    p_kv,
    p_bias,
    p_keep,
    p_kind,
    p_pad_kv,
    p_context,
    windows,
    all_windows,
    scale,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLS: tl.constexpr,
    GATHERED: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PAD: tl.constexpr,
    J_PADDED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q [W, H*DK], kv rows of H*DK keys and H*DV values without their bias [H*(DK+DV)] -> context [W, H*DV], dense.

    GATHERED rows are the windows' slots, J a window; else they are the patches of all tiles, and pad_kv
    [2, H*(DK+DV)] is what the pad embeddings add to them. Grid: heads, fastest, then blocks of windows.
    """
    GRID: tl.constexpr = operands.Grid(ROWS, COLS, WINDOW_ROWS, WINDOW_COLS)
    i_head = tl.program_id(0) % H
    o_window = tl.program_id(0) // H * BLOCK_W + tl.arange(0, BLOCK_W)
    m_window = o_window < windows
    J: tl.constexpr = WINDOW_ROWS * WINDOW_COLS
    WIDTH: tl.constexpr = H * (DK + DV)
    o_slot = tl.arange(0, J_PADDED)
    if GATHERED:
        i_row = o_window.to(tl.int64)[:, None] * J + o_slot[None, :]  # [BW, J]
        m_row = m_window[:, None] & (o_slot < J)[None, :]
    else:
        i_window = window_number(p_keep, o_window, windows, all_windows, HAS_KEEP)[:, None]
        i_tile, i_patch, m_row = slot_patch(i_window, o_slot[None, :], GRID)
        i_row = i_tile * (ROWS * COLS) + i_patch
        m_row = m_row & m_window[:, None] & (o_slot < J)[None, :]
    b_kind = tl.zeros([BLOCK_W, J_PADDED], tl.int32)
    if HAS_PAD:
        b_kind = tl.load(p_kind + i_row, mask=m_row, other=0).to(tl.int32)

    b_s = tl.zeros([BLOCK_W, J_PADDED], tl.float32)
    for i_d in range(0, DK, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < DK
        p_row = p_q + o_window.to(tl.int64)[:, None] * (H * DK) + i_head * DK + o_d[None, :]
        b_q = tl.load(p_row, mask=m_window[:, None] & m_d[None, :], other=0).to(tl.float32)
        b_k = _kv(p_kv, p_pad_kv, i_row, m_row, b_kind, i_head * DK + o_d, m_d, WIDTH, HAS_PAD)
        b_s += tl.sum(b_q[:, None, :] * b_k, 2)
    if HAS_BIAS:
        b_s += trace_of_bias(p_bias + i_head * DK, DK, BLOCK_D)
    b_p = softmax_slots(b_s, scale, o_slot, J)
    for i_d in range(0, DV, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < DV
        b_v = _kv(p_kv, p_pad_kv, i_row, m_row, b_kind, H * DK + i_head * DV + o_d, m_d, WIDTH, HAS_PAD)
        b_o = tl.sum(b_p[:, :, None] * b_v, 1)  # [BW, BD]
        if HAS_BIAS:
            b_o += tl.load(p_bias + H * DK + i_head * DV + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
        p_out = p_context + o_window.to(tl.int64)[:, None] * (H * DV) + i_head * DV + o_d[None, :]
        tl.store(p_out, b_o.to(p_context.dtype.element_ty), mask=m_window[:, None] & m_d[None, :])


@triton.jit
def _kv(p_kv, p_pad_kv, i_row, m_row, b_kind, o_col, m_col, WIDTH: tl.constexpr, HAS_PAD: tl.constexpr):
    """Columns o_col of key-value rows [BW, J, BD], float32, zero where there is no patch."""
    m_kv = m_row[:, :, None] & m_col[None, None, :]
    b_kv = tl.load(p_kv + i_row[:, :, None] * WIDTH + o_col[None, None, :], mask=m_kv, other=0).to(tl.float32)
    if HAS_PAD:
        p_pad = p_pad_kv + (b_kind - 1)[:, :, None] * WIDTH + o_col[None, None, :]
        b_kv += tl.load(p_pad, mask=m_kv & (b_kind > 0)[:, :, None], other=0).to(tl.float32)
    return b_kv


def slots(windows: Windows, *, write: bool) -> tuple[Tensor, Tensor | None]:
    """Means of the windows' slots, [W, L*C], and, if `write`, the slots themselves, [W*J, L*C]; W > 0."""
    first, count, width = windows.features[0], windows.count, windows.width
    mean = first.new_empty(count, width)
    written = first.new_empty(count * windows.slots, width) if write else None
    channels = first.shape[2]
    config = select("attention_pool_fwd_slots_kernel", first, windows=count, channels=channels)
    blocks = -(-channels // config["BLOCK_C"])
    tensors, strides, unit = windows.sources
    launch(
        attention_pool_fwd_slots_kernel,
        (-(-count // config["BLOCK_W"]) * len(windows.features) * blocks,),
        (
            *tensors,
            windows.keep,
            windows.kind,
            windows.pad_embed,
            mean,
            written,
            count,
            windows.of_all_tiles,
            *strides,
        ),
        config,
        UNIT=unit,
        L=len(windows.features),
        C=channels,
        HAS_KEEP=windows.keep is not None,
        WRITES_SLOTS=write,
        **windows.constants,
    )
    return mean, written


def context(
    q: Tensor,
    kv: Tensor,
    b_kv: Tensor | None,
    pad_kv: Tensor | None,
    windows: Windows,
    num_heads: int,
    scale: float,
    *,
    gathered: bool,
) -> Tensor:
    """q [W, H*Dk] and kv, without its bias b_kv, of the slots [W*J, H*(Dk+Dv)] or of all patches [T*N, H*(Dk+Dv)] with
    what the pad embeddings add, [2, H*(Dk+Dv)] -> [W, H*Dv]."""
    count = len(q)
    key_dim = q.shape[1] // num_heads
    value_dim = kv.shape[1] // num_heads - key_dim
    out = q.new_empty(count, num_heads * value_dim)
    config = select("attention_pool_fwd_kernel", q, windows=count, head_dim=max(key_dim, value_dim))
    config = tiled(config, "BLOCK_D", windows.slots)
    constants = windows.constants | {"HAS_PAD": pad_kv is not None}
    launch(
        attention_pool_fwd_kernel,
        (-(-count // config["BLOCK_W"]) * num_heads,),
        (q, kv, b_kv, windows.keep, windows.kind, pad_kv, out, count, windows.of_all_tiles, scale),
        config,
        H=num_heads,
        DK=key_dim,
        DV=value_dim,
        GATHERED=gathered,
        HAS_KEEP=windows.keep is not None,
        HAS_BIAS=b_kv is not None,
        J_PADDED=triton.next_power_of_2(windows.slots),
        **constants,
    )
    return out


def _slots_example(
    dtype: torch.dtype, device: str, windows: int, channels: int, write: bool = False
) -> Callable[[], Any]:
    given = example_windows(dtype, device, windows, kept=write, padded=True)
    return lambda: slots(given, write=write)


def _context_example(
    dtype: torch.dtype, device: str, windows: int, head_dim: int, gathered: bool = False
) -> Callable[[], Tensor]:
    heads = 1152 // head_dim
    given = example_windows(dtype, device, windows, kept=gathered, padded=not gathered)
    rows = given.count * 4 if gathered else given.features[0].shape[:2].numel()
    q, kv, pad_kv = (
        torch.randn(n, columns * heads * head_dim, dtype=dtype, device=device)
        for n, columns in ((given.count, 1), (rows, 2), (2, 2))
    )
    pad, b_kv = None if gathered else pad_kv, pad_kv[0]
    return lambda: context(q, kv, b_kv, pad, given, heads, head_dim**-0.5, gathered=gathered)


# one multiply-add for each slot's column and, of scores and pooling, for each head's
KERNELS = (
    Kernel(
        attention_pool_fwd_slots_kernel,
        _slots_example,
        {"windows": 2548, "channels": 1152},
        lambda size, windows, channels: (8 * windows * channels, 10 * windows * channels * size),
        blocks("BLOCK_C", 256, 512, 1024),
        variants=({}, {"write": True}),
    ),
    Kernel(
        attention_pool_fwd_kernel,
        _context_example,
        {"windows": 2548, "head_dim": 72},
        lambda size, windows, head_dim: (16 * windows * 1152, 10 * windows * 1152 * size),
        blocks("BLOCK_D", 64, 128),
        variants=({}, {"gathered": True}),
    ),
)
