"""Non-causal multi-head attention forward, dense or packed, for head dimensions that are no power of two.

A head of D columns is split into LO + HI, each a power of two: 72 = 64 + 16 pads to 80 where padding to 128 would cost
60 % more. The softmax is online over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., 2022), in base 2.

FLOPs: 4 * N^2 * D an image and head. Least bytes: q, k, v and the result once.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import Kernel, Launch, start
from ..blocks.rows import load_rows, store_rows, stream_rows
from ..blocks.segments import clear_gaps, segment
from ..blocks.strides import image_head, in_elements
from .plan import PER_CALL, WIDE_CANDIDATES, fused_qkv, plan

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@triton.jit
def _attend(
    b_acc_lo,
    b_acc_hi,
    b_max,
    b_sum,
    b_q_lo,
    b_q_hi,
    k,
    v,
    k_hi,
    v_hi,
    stride_k,
    stride_v,
    i_batch,
    i_head,
    i_key,
    keys,
    scale,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys: the running maximum of scores, sum and weighted values after it."""
    b_k_lo, b_k_hi = stream_rows(
        k, k_hi, stride_k, i_batch, i_head, i_key, keys, D, LO, HI, BLOCK_N, TMA, MASKED
    )  # fmt: skip
    b_v_lo, b_v_hi = stream_rows(
        v, v_hi, stride_v, i_batch, i_head, i_key, keys, D, LO, HI, BLOCK_N, TMA, MASKED
    )  # fmt: skip
    b_s = tl.dot(b_q_lo, b_k_lo.T, input_precision="ieee")  # [BM, BN]
    if HI:
        b_s = tl.dot(b_q_hi, b_k_hi.T, b_s, input_precision="ieee")
    if NEGATED:
        b_s = -b_s
    if MASKED:
        b_s = tl.where((i_key + tl.arange(0, BLOCK_N))[None, :] < keys, b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))  # [BM]
    # differences first: of large scores they are exact, where those of rounded products are not
    b_p = tl.exp2((b_s - b_new_max[:, None]) * scale)
    b_rescale = tl.exp2((b_max - b_new_max) * scale)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_p = b_p.to(b_v_lo.dtype)
    b_acc_lo = tl.dot(b_p, b_v_lo, b_acc_lo * b_rescale[:, None], input_precision="ieee")
    if HI:
        b_acc_hi = tl.dot(b_p, b_v_hi, b_acc_hi * b_rescale[:, None], input_precision="ieee")
    return b_acc_lo, b_acc_hi, b_new_max, b_sum


@triton.jit(do_not_specialize=PER_CALL)
def attention_fwd_kernel(
    p_q,
    k,
    v,
    k_hi,
    v_hi,
    p_out,
    p_lse,
    p_cu_seqlens,
    tokens,
    longest,
    heads,
    scale,
    stride_qb,
    stride_q,
    stride_qh,
    stride_kb,
    stride_k,
    stride_kh,
    stride_vb,
    stride_v,
    stride_vh,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT_TAIL: tl.constexpr,
    NEGATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """q, k, v [B, N, H, D] or packed [T, H, D] -> out, dense, and lse [B, H, N] or [H, T], natural logarithm.

    Grid: blocks of queries, fastest, then heads, then images. With TMA, k and v are descriptors of [B, H, N, D] and
    k_hi, v_hi of the same tensors in blocks of HI columns; else pointers, and k_hi, v_hi unused. Strides of images,
    tokens and heads are in units of UNIT elements.
    """
    stride_q, stride_k, stride_v = in_elements(stride_q, UNIT), in_elements(stride_k, UNIT), in_elements(stride_v, UNIT)
    stride_out = heads * D
    i_program = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_M)
    i_query = i_program % blocks * BLOCK_M
    i_head = i_program // blocks % heads
    i_batch = i_program // blocks // heads
    if PACKED:
        clear_gaps(
            p_out + i_head * D, p_lse + i_head.to(tl.int64) * tokens, stride_out, p_cu_seqlens, i_batch,
            i_program % blocks, blocks, i_program + blocks * heads >= tl.num_programs(0), tokens, longest, D, LO, HI,
        )  # fmt: skip
    start, keys = segment(p_cu_seqlens, i_batch, tokens, longest, PACKED)
    if i_query >= keys:
        return
    i_row = start + i_query
    p_q_rows = p_q + image_head(i_batch, i_head, stride_qb, stride_qh, UNIT) + i_row * stride_q
    b_q_lo = load_rows(p_q_rows, stride_q, keys - i_query, 0, 0, D, BLOCK_M, LO, True)
    b_q_hi = b_q_lo
    b_acc_lo = tl.zeros([BLOCK_M, LO], tl.float32)
    b_acc_hi = b_acc_lo
    if HI:
        HI_COL: tl.constexpr = LO if TMA else D - HI
        b_q_hi = load_rows(p_q_rows, stride_q, keys - i_query, HI_COL, LO, D, BLOCK_M, HI, True)
        b_acc_hi = tl.zeros([BLOCK_M, HI], tl.float32)
    if not TMA:
        k += image_head(i_batch, i_head, stride_kb, stride_kh, UNIT) + start * stride_k
        v += image_head(i_batch, i_head, stride_vb, stride_vh, UNIT) + start * stride_v
    # the lowest that is finite: the difference of two infinities would be NaN
    b_max = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # a tail of its own spares the other blocks their masks; float32 needs the registers that two copies take
    whole = keys // BLOCK_N * BLOCK_N if SPLIT_TAIL else 0
    for i_key in range(0, whole, BLOCK_N):
        b_acc_lo, b_acc_hi, b_max, b_sum = _attend(
            b_acc_lo, b_acc_hi, b_max, b_sum, b_q_lo, b_q_hi, k, v, k_hi, v_hi, stride_k, stride_v, i_batch, i_head,
            i_key, keys, scale, D, LO, HI, BLOCK_M, BLOCK_N, TMA, NEGATED, False,
        )  # fmt: skip
    for i_tail in tl.range(whole, keys, BLOCK_N, num_stages=1 if SPLIT_TAIL else None):
        b_acc_lo, b_acc_hi, b_max, b_sum = _attend(
            b_acc_lo, b_acc_hi, b_max, b_sum, b_q_lo, b_q_hi, k, v, k_hi, v_hi, stride_k, stride_v, i_batch, i_head,
            i_tail, keys, scale, D, LO, HI, BLOCK_M, BLOCK_N, TMA, NEGATED, True,
        )  # fmt: skip
    p_out_rows = p_out + (i_batch.to(tl.int64) * tokens * (not PACKED) + i_row) * stride_out + i_head * D
    store_rows(p_out_rows, stride_out, keys - i_query, b_acc_lo / b_sum[:, None], 0, 0, D, BLOCK_M, LO)
    if HI:
        store_rows(p_out_rows, stride_out, keys - i_query, b_acc_hi / b_sum[:, None], HI_COL, LO, D, BLOCK_M, HI)
    o_row = tl.arange(0, BLOCK_M)
    # [B, H, N]; [H, T] is the same with one image
    p_lse_rows = p_lse + (i_batch.to(tl.int64) * heads * (not PACKED) + i_head) * tokens + i_row
    tl.store(p_lse_rows + o_row, (b_max * scale + tl.log2(b_sum)) * 0.6931471805599453, mask=o_row < keys - i_query)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """Output, dense, and log-sum-exp of q, k, v [B, N, H, D], or packed [T, H, D] with cu_seqlens [S + 1].

    The bounds are not trusted: tokens that are in no segment, or beyond its first max_seqlen, have an output of 0 and a
    log-sum-exp of -inf. Bounds that decrease may have the kernel write a token twice, in any order."""
    how = plan(
        "attention_fwd_kernel",
        "BLOCK_M",
        q.shape,
        (q.stride(), k.stride(), v.stride()),
        q.dtype,
        q.device,
        scale,
        None if cu_seqlens is None else len(cu_seqlens) - 1,
        max_seqlen,
        (k.stride(), v.stride()),
        (k.data_ptr() | v.data_ptr()) % 16 == 0,
    )
    if not how.grid[0] or not q.numel():
        return q.new_zeros(q.shape), q.new_full(how.lse_shape, -math.inf, dtype=torch.float32)
    out, lse = q.new_empty(q.shape), q.new_empty(how.lse_shape, dtype=torch.float32)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    (k_lo, k_hi), (v_lo, v_hi) = how.streams(k, v)
    args = (q, k_lo, v_lo, k_hi, v_hi, out, lse, cu_seqlens, *how.sizes)
    start(Launch(attention_fwd_kernel, how.grid, args, how.constants, how.options))
    return out, lse


def _example(
    dtype: torch.dtype, device: str, tokens: int, head_dim: int, packed: bool = False
) -> Callable[[], tuple[Tensor, Tensor]]:
    q, k, v, bounds, longest = fused_qkv(dtype, device, tokens, head_dim, packed)
    return lambda: attention_fwd(q, k, v, head_dim**-0.5, bounds, longest)


def _cost(size: int, tokens: int, head_dim: int) -> tuple[float, float]:
    heads = 13 * 16
    return 4 * heads * tokens**2 * head_dim, 4 * heads * tokens * head_dim * size


KERNELS = (
    Kernel(
        attention_fwd_kernel,
        _example,
        {"tokens": 729, "head_dim": 72},
        _cost,
        tuple(
            {"BLOCK_M": m, "BLOCK_N": n, "TMA": tma, "num_warps": warps, "num_stages": stages, **limit}
            # pointers take registers that descriptors do not
            for m, n, warps, stages, forms, limit in (
                (64, 128, 4, 2, (False, True), {}),
                (128, 128, 8, 2, (False, True), {}),
                (128, 128, 8, 3, (False, True), {}),
                (128, 64, 8, 2, (False, True), {"maxnreg": 128}),
                (128, 64, 8, 3, (False, True), {"maxnreg": 128}),
                (128, 64, 4, 2, (False, True), {}),
                (128, 64, 4, 3, (True,), {}),
                (64, 64, 4, 2, (False, True), {}),
                (64, 64, 4, 3, (False, True), {}),
                (64, 64, 4, 2, (True,), {"maxnreg": 128}),
                (64, 64, 4, 3, (True,), {"maxnreg": 128}),
                (64, 64, 4, 2, (False,), {"maxnreg": 168}),
            )
            for tma in forms
        ),
        shapes=(*({"tokens": 729, "head_dim": d} for d in (64, 96, 128)), {"tokens": 1025, "head_dim": 64}),
        variants=({}, {"packed": True}),
        # the head padded to a power of two, as kernels do that do not split it
        baseline={"LO": 128, "BLOCK_M": 128, "BLOCK_N": 64, "TMA": False, "num_warps": 8, "num_stages": 2},
        wide_candidates=WIDE_CANDIDATES,
    ),
)
