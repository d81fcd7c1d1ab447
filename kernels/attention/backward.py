"""Gradients of non-causal multi-head attention, without atomics: one kernel by q, one by k and v.

The probabilities are recomputed from the log-sum-exp (Dao et al., 2022, algorithm 4):

    P = exp(scale * Q K^T - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  delta = rowsum(dO * O),
    dQ = scale * dS K,  dK = scale * dS^T Q

The log-sum-exp is float32 and rounded a few times on its way, so the logarithm of P is off by up to |lse| * 3e-7: P by
0.3 % where scores are 1e4, by a third at 1e6, and beyond that gradients are finite and no more. P is at most 1 whatever
the scores, so that finite ones have finite gradients.

FLOPs: 14 * N^2 * D an image and head, two of the seven products being made in both kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Config, Kernel, Launch, start
from ..blocks.rows import load_rows, store_rows, stream_rows
from ..blocks.segments import clear_gaps, segment
from ..blocks.strides import image_head, in_elements
from .plan import PER_CALL, WIDE_CANDIDATES, fused_qkv, plan

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _probabilities(b_logarithm):
    # none is above one: a log-sum-exp that was rounded must not make them overflow, nor hide NaN
    return tl.exp2(tl.minimum(b_logarithm, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _by_query(
    b_dq_lo,
    b_dq_hi,
    b_q_lo,
    b_q_hi,
    b_do_lo,
    b_do_hi,
    b_lse,
    b_delta,
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
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one block of keys adds to the gradient by q."""
    b_k_lo, b_k_hi = stream_rows(
        k, k_hi, stride_k, i_batch, i_head, i_key, keys, D, LO, HI, BLOCK_N, TMA, MASKED
    )  # fmt: skip
    b_v_lo, b_v_hi = stream_rows(
        v, v_hi, stride_v, i_batch, i_head, i_key, keys, D, LO, HI, BLOCK_N, TMA, MASKED
    )  # fmt: skip
    b_s = tl.dot(b_q_lo, b_k_lo.T, input_precision="ieee")  # [BM, BN]
    b_dp = tl.dot(b_do_lo, b_v_lo.T, input_precision="ieee")  # [BM, BN]
    if HI:
        b_s = tl.dot(b_q_hi, b_k_hi.T, b_s, input_precision="ieee")
        b_dp = tl.dot(b_do_hi, b_v_hi.T, b_dp, input_precision="ieee")
    if NEGATED:
        b_s = -b_s
    b_p = _probabilities(b_s * scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where((i_key + tl.arange(0, BLOCK_N))[None, :] < keys, b_p, 0.0)
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k_lo.dtype)
    b_dq_lo = tl.dot(b_ds, b_k_lo, b_dq_lo, input_precision="ieee")
    if HI:
        b_dq_hi = tl.dot(b_ds, b_k_hi, b_dq_hi, input_precision="ieee")
    return b_dq_lo, b_dq_hi


@triton.jit(do_not_specialize=PER_CALL)
def attention_bwd_dq_kernel(
    p_grad,
    p_q,
    k,
    v,
    k_hi,
    v_hi,
    p_out,
    p_lse,
    p_cu_seqlens,
    p_dq,
    p_delta,
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
    """grad and out (dense), q, k, v, lse -> dq, dense, and delta, shaped like lse. Grid, strides, k and v as the
    forward's."""
    stride_q, stride_k, stride_v = in_elements(stride_q, UNIT), in_elements(stride_k, UNIT), in_elements(stride_v, UNIT)
    stride_out = heads * D
    i_program = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_M)
    i_query = i_program % blocks * BLOCK_M
    i_head = i_program // blocks % heads
    i_batch = (i_program // blocks // heads).to(tl.int64)
    if PACKED:
        is_last = i_program + blocks * heads >= tl.num_programs(0)
        clear_gaps(
            p_dq + i_head * D, None, stride_out, p_cu_seqlens, i_batch, i_program % blocks, blocks, is_last, tokens,
            longest, D, LO, HI,
        )  # fmt: skip
    start, keys = segment(p_cu_seqlens, i_batch, tokens, longest, PACKED)
    if i_query >= keys:
        return
    rows = keys - i_query
    i_row = start + i_query
    i_dense = (i_batch * tokens * (not PACKED) + i_row) * stride_out + i_head * D
    p_q_rows = p_q + image_head(i_batch, i_head, stride_qb, stride_qh, UNIT) + i_row * stride_q
    b_q_lo = load_rows(p_q_rows, stride_q, rows, 0, 0, D, BLOCK_M, LO, True)
    b_do_lo = load_rows(p_grad + i_dense, stride_out, rows, 0, 0, D, BLOCK_M, LO, True)
    b_out_lo = load_rows(p_out + i_dense, stride_out, rows, 0, 0, D, BLOCK_M, LO, True)
    b_delta = tl.sum(b_do_lo.to(tl.float32) * b_out_lo.to(tl.float32), 1)  # [BM]
    b_dq_lo = tl.zeros([BLOCK_M, LO], tl.float32)
    b_q_hi, b_do_hi, b_dq_hi = b_q_lo, b_do_lo, b_dq_lo
    if HI:
        HI_COL: tl.constexpr = LO if TMA else D - HI
        b_q_hi = load_rows(p_q_rows, stride_q, rows, HI_COL, LO, D, BLOCK_M, HI, True)
        b_do_hi = load_rows(p_grad + i_dense, stride_out, rows, HI_COL, LO, D, BLOCK_M, HI, True)
        b_out_hi = load_rows(p_out + i_dense, stride_out, rows, HI_COL, LO, D, BLOCK_M, HI, True)
        b_delta += tl.sum(b_do_hi.to(tl.float32) * b_out_hi.to(tl.float32), 1)
        b_dq_hi = tl.zeros([BLOCK_M, HI], tl.float32)
    o_row = tl.arange(0, BLOCK_M)
    i_statistics = (i_batch * heads * (not PACKED) + i_head) * tokens + i_row
    b_lse = tl.load(p_lse + i_statistics + o_row, mask=o_row < rows, other=0) * _LOG2_E
    tl.store(p_delta + i_statistics + o_row, b_delta, mask=o_row < rows)

    if not TMA:
        k += image_head(i_batch, i_head, stride_kb, stride_kh, UNIT) + start * stride_k
        v += image_head(i_batch, i_head, stride_vb, stride_vh, UNIT) + start * stride_v
    i_image = i_batch.to(tl.int32)
    # a tail of its own spares the other blocks their masks; float32 needs the registers that two copies take
    whole = keys // BLOCK_N * BLOCK_N if SPLIT_TAIL else 0
    for i_key in range(0, whole, BLOCK_N):
        b_dq_lo, b_dq_hi = _by_query(
            b_dq_lo, b_dq_hi, b_q_lo, b_q_hi, b_do_lo, b_do_hi, b_lse, b_delta, k, v, k_hi, v_hi,
            stride_k, stride_v, i_image, i_head, i_key, keys, scale, D, LO, HI, BLOCK_N, TMA, NEGATED, False,
        )  # fmt: skip
    for i_tail in tl.range(whole, keys, BLOCK_N, num_stages=1 if SPLIT_TAIL else None):
        b_dq_lo, b_dq_hi = _by_query(
            b_dq_lo, b_dq_hi, b_q_lo, b_q_hi, b_do_lo, b_do_hi, b_lse, b_delta, k, v, k_hi, v_hi,
            stride_k, stride_v, i_image, i_head, i_tail, keys, scale, D, LO, HI, BLOCK_N, TMA, NEGATED, True,
        )  # fmt: skip
    factor = (-scale if NEGATED else scale) * _LN_2
    store_rows(p_dq + i_dense, stride_out, rows, b_dq_lo * factor, 0, 0, D, BLOCK_M, LO)
    if HI:
        store_rows(p_dq + i_dense, stride_out, rows, b_dq_hi * factor, HI_COL, LO, D, BLOCK_M, HI)


@triton.jit
def _by_key(
    b_dk_lo,
    b_dk_hi,
    b_dv_lo,
    b_dv_hi,
    b_k_lo,
    b_k_hi,
    b_v_lo,
    b_v_hi,
    q,
    grad,
    q_hi,
    grad_hi,
    p_lse,
    p_delta,
    stride_q,
    stride_out,
    i_batch,
    i_head,
    i_query,
    queries,
    scale,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TMA: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one block of queries adds to the gradients by k and v."""
    o_row = i_query + tl.arange(0, BLOCK_M)
    # exp2(-inf) = 0: queries beyond the last count for nothing
    b_lse = tl.load(p_lse + o_row, mask=o_row < queries, other=float("inf")) * _LOG2_E
    b_delta = tl.load(p_delta + o_row, mask=o_row < queries, other=0)
    b_q_lo, b_q_hi = stream_rows(
        q, q_hi, stride_q, i_batch, i_head, i_query, queries, D, LO, HI, BLOCK_M, TMA, MASKED
    )  # fmt: skip
    b_do_lo, b_do_hi = stream_rows(
        grad, grad_hi, stride_out, i_batch, i_head, i_query, queries, D, LO, HI, BLOCK_M, TMA, MASKED
    )  # fmt: skip
    b_s = tl.dot(b_k_lo, b_q_lo.T, input_precision="ieee")  # [BN, BM]
    b_dp = tl.dot(b_v_lo, b_do_lo.T, input_precision="ieee")  # [BN, BM]
    if HI:
        b_s = tl.dot(b_k_hi, b_q_hi.T, b_s, input_precision="ieee")
        b_dp = tl.dot(b_v_hi, b_do_hi.T, b_dp, input_precision="ieee")
    if NEGATED:
        b_s = -b_s
    b_p = _probabilities(b_s * scale - b_lse[None, :])
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q_lo.dtype)
    b_p = b_p.to(b_q_lo.dtype)
    b_dv_lo = tl.dot(b_p, b_do_lo, b_dv_lo, input_precision="ieee")
    b_dk_lo = tl.dot(b_ds, b_q_lo, b_dk_lo, input_precision="ieee")
    if HI:
        b_dv_hi = tl.dot(b_p, b_do_hi, b_dv_hi, input_precision="ieee")
        b_dk_hi = tl.dot(b_ds, b_q_hi, b_dk_hi, input_precision="ieee")
    return b_dk_lo, b_dk_hi, b_dv_lo, b_dv_hi


@triton.jit(do_not_specialize=PER_CALL)
def attention_bwd_dkv_kernel(
    grad,
    q,
    grad_hi,
    q_hi,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_cu_seqlens,
    p_dk,
    p_dv,
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
    """grad (dense), q, k, v, lse, delta -> dk and dv, dense. Grid: blocks of keys, heads, images. With TMA, grad and q
    are descriptors as the forward's k and v."""
    stride_q, stride_k, stride_v = in_elements(stride_q, UNIT), in_elements(stride_k, UNIT), in_elements(stride_v, UNIT)
    stride_out = heads * D
    i_program = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_N)
    i_key = i_program % blocks * BLOCK_N
    i_head = i_program // blocks % heads
    i_batch = (i_program // blocks // heads).to(tl.int64)
    if PACKED:
        is_last = i_program + blocks * heads >= tl.num_programs(0)
        clear_gaps(
            p_dk + i_head * D, None, stride_out, p_cu_seqlens, i_batch, i_program % blocks, blocks, is_last, tokens,
            longest, D, LO, HI,
        )  # fmt: skip
        clear_gaps(
            p_dv + i_head * D, None, stride_out, p_cu_seqlens, i_batch, i_program % blocks, blocks, is_last, tokens,
            longest, D, LO, HI,
        )  # fmt: skip
    start, queries = segment(p_cu_seqlens, i_batch, tokens, longest, PACKED)
    if i_key >= queries:
        return
    rows = queries - i_key
    i_row = start + i_key
    i_first = (i_batch * tokens * (not PACKED) + start) * stride_out + i_head * D
    i_dense = i_first + tl.cast(i_key, tl.int64) * stride_out
    p_k_rows = p_k + image_head(i_batch, i_head, stride_kb, stride_kh, UNIT) + i_row * stride_k
    p_v_rows = p_v + image_head(i_batch, i_head, stride_vb, stride_vh, UNIT) + i_row * stride_v
    b_k_lo = load_rows(p_k_rows, stride_k, rows, 0, 0, D, BLOCK_N, LO, True)
    b_v_lo = load_rows(p_v_rows, stride_v, rows, 0, 0, D, BLOCK_N, LO, True)
    b_dk_lo = tl.zeros([BLOCK_N, LO], tl.float32)
    b_dv_lo = tl.zeros([BLOCK_N, LO], tl.float32)
    b_k_hi, b_v_hi, b_dk_hi, b_dv_hi = b_k_lo, b_v_lo, b_dk_lo, b_dv_lo
    if HI:
        HI_COL: tl.constexpr = LO if TMA else D - HI
        b_k_hi = load_rows(p_k_rows, stride_k, rows, HI_COL, LO, D, BLOCK_N, HI, True)
        b_v_hi = load_rows(p_v_rows, stride_v, rows, HI_COL, LO, D, BLOCK_N, HI, True)
        b_dk_hi = tl.zeros([BLOCK_N, HI], tl.float32)
        b_dv_hi = tl.zeros([BLOCK_N, HI], tl.float32)
    if not TMA:
        q += image_head(i_batch, i_head, stride_qb, stride_qh, UNIT) + start * stride_q
        grad += i_first
    i_image = i_batch.to(tl.int32)
    i_statistics = (i_batch * heads * (not PACKED) + i_head) * tokens + start
    p_lse += i_statistics
    p_delta += i_statistics

    # a tail of its own spares the other blocks their masks; float32 needs the registers that two copies take
    whole = queries // BLOCK_M * BLOCK_M if SPLIT_TAIL else 0
    for i_query in range(0, whole, BLOCK_M):
        b_dk_lo, b_dk_hi, b_dv_lo, b_dv_hi = _by_key(
            b_dk_lo, b_dk_hi, b_dv_lo, b_dv_hi, b_k_lo, b_k_hi, b_v_lo, b_v_hi, q, grad, q_hi, grad_hi,
            p_lse, p_delta, stride_q, stride_out, i_image, i_head, i_query, queries, scale, D, LO, HI, BLOCK_M, TMA,
            NEGATED, False,
        )  # fmt: skip
    for i_tail in tl.range(whole, queries, BLOCK_M, num_stages=1 if SPLIT_TAIL else None):
        b_dk_lo, b_dk_hi, b_dv_lo, b_dv_hi = _by_key(
            b_dk_lo, b_dk_hi, b_dv_lo, b_dv_hi, b_k_lo, b_k_hi, b_v_lo, b_v_hi, q, grad, q_hi, grad_hi,
            p_lse, p_delta, stride_q, stride_out, i_image, i_head, i_tail, queries, scale, D, LO, HI, BLOCK_M, TMA,
            NEGATED, True,
        )  # fmt: skip
    factor = (-scale if NEGATED else scale) * _LN_2
    store_rows(p_dk + i_dense, stride_out, rows, b_dk_lo * factor, 0, 0, D, BLOCK_N, LO)
    store_rows(p_dv + i_dense, stride_out, rows, b_dv_lo, 0, 0, D, BLOCK_N, LO)
    if HI:
        store_rows(p_dk + i_dense, stride_out, rows, b_dk_hi * factor, HI_COL, LO, D, BLOCK_N, HI)
        store_rows(p_dv + i_dense, stride_out, rows, b_dv_hi, HI_COL, LO, D, BLOCK_N, HI)


def attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, dense, from what `kernels.attention.attention_fwd` took and gave; zeros for tokens that
    it found in no segment."""
    segments = None if cu_seqlens is None else len(cu_seqlens) - 1
    if q.numel() == 0 or segments == 0 or max_seqlen == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # gradients of sums have strides of zero
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    delta = torch.empty_like(lse)
    geometry = (q.shape, (q.stride(), k.stride(), v.stride()), q.dtype, q.device, scale, segments, max_seqlen)

    # by q first: it leaves delta for the other
    streamed, aligned = (k.stride(), v.stride()), (k.data_ptr() | v.data_ptr()) % 16 == 0
    how = plan("attention_bwd_dq_kernel", "BLOCK_M", *geometry, streamed, aligned)
    (k_lo, k_hi), (v_lo, v_hi) = how.streams(k, v)
    args = (grad, q, k_lo, v_lo, k_hi, v_hi, out, lse, cu_seqlens, dq, delta, *how.sizes)
    start(Launch(attention_bwd_dq_kernel, how.grid, args, how.constants, how.options))

    streamed, aligned = (grad.stride(), q.stride()), (grad.data_ptr() | q.data_ptr()) % 16 == 0
    how = plan("attention_bwd_dkv_kernel", "BLOCK_N", *geometry, streamed, aligned)
    (grad_lo, grad_hi), (q_lo, q_hi) = how.streams(grad, q)
    args = (grad_lo, q_lo, grad_hi, q_hi, k, v, lse, delta, cu_seqlens, dk, dv, *how.sizes)
    start(Launch(attention_bwd_dkv_kernel, how.grid, args, how.constants, how.options))
    return dq, dk, dv


def _example(
    dtype: torch.dtype, device: str, tokens: int, head_dim: int, packed: bool = False
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    q, k, v, bounds, longest = fused_qkv(dtype, device, tokens, head_dim, packed)
    out, grad = torch.randn_like(q), torch.randn_like(q)
    lse = torch.zeros((16, len(q)) if packed else (13, 16, tokens), device=device)
    return lambda: attention_bwd(grad, q, k, v, out, lse, head_dim**-0.5, bounds, longest)


def _kernel(
    function: Any,
    products: int,
    tensors: int,
    candidates: tuple[tuple[int, int, int, int, tuple[bool, ...]], ...],
    wide: tuple[Config, ...],
) -> Kernel:
    def cost(size: int, tokens: int, head_dim: int) -> tuple[float, float]:
        heads = 13 * 16
        return 2 * products * heads * tokens**2 * head_dim, tensors * heads * tokens * head_dim * size

    return Kernel(
        function,
        _example,
        {"tokens": 729, "head_dim": 72},
        cost,
        tuple(
            {"BLOCK_M": m, "BLOCK_N": n, "TMA": tma, "num_warps": warps, "num_stages": stages}
            for m, n, warps, stages, forms in candidates
            for tma in forms
        ),
        shapes=tuple({"tokens": 729, "head_dim": d} for d in (64, 96, 128)),
        variants=({}, {"packed": True}),
        wide_candidates=wide,
    )


# pointers and descriptors
_FORMS = (False, True)
KERNELS = (
    _kernel(
        attention_bwd_dq_kernel,
        3,
        6,
        (
            (64, 64, 4, 2, _FORMS),
            (64, 64, 4, 3, _FORMS),
            (64, 32, 4, 2, _FORMS),
            (64, 32, 4, 3, _FORMS),
            (128, 32, 8, 2, _FORMS),
            (128, 64, 8, 2, _FORMS),
            (128, 64, 8, 3, _FORMS),
        ),
        # more elements a thread spill
        tuple(
            {"BLOCK_M": m, "BLOCK_N": n, "TMA": False, "num_warps": warps, "num_stages": 1}
            for m, n, warps in ((32, 32, 8), (32, 16, 4), (16, 32, 4))
        ),
    ),
    _kernel(
        attention_bwd_dkv_kernel,
        4,
        6,
        (
            (32, 128, 8, 2, _FORMS),
            (32, 128, 8, 3, _FORMS),
            (32, 64, 4, 2, _FORMS),
            # with pointers these spill
            (64, 64, 4, 1, (True,)),
            (64, 64, 4, 2, (True,)),
            (64, 128, 8, 1, (True,)),
            (64, 128, 8, 2, (True,)),
        ),
        WIDE_CANDIDATES,
    ),
)
