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
from ..blocks import constants, operands
from ..blocks.rows import load_rows, store_rows, stream_rows, zero_rows
from ..blocks.segments import clear_gaps, segment
from .heads import dense_rows, dense_stream, head_rows, head_stream, statistics, strides_of
from .plan import PER_CALL, WIDE_CANDIDATES, fused_qkv, plan


@triton.jit
def _probabilities(b_logarithm):
    # none is above one: a log-sum-exp that was rounded must not make them overflow, nor hide NaN
    return tl.exp2(tl.minimum(b_logarithm, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _by_query(
    b_dq,
    queries,
    k_rows,
    v_rows,
    i_key,
    scale,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gradient by q with what one block of keys adds, of queries (q, grad, lse in base 2, delta)."""
    b_q, b_do, b_lse, b_delta = queries
    b_k = stream_rows(k_rows, i_key, COLUMNS, BLOCK_N, MASKED)
    b_v = stream_rows(v_rows, i_key, COLUMNS, BLOCK_N, MASKED)
    b_s, b_dp = None, None
    for i in tl.static_range(len(b_k)):
        b_s = tl.dot(b_q[i], b_k[i].T, b_s, input_precision="ieee")  # [BM, BN]
        b_dp = tl.dot(b_do[i], b_v[i].T, b_dp, input_precision="ieee")  # [BM, BN]
    if NEGATED:
        b_s = -b_s
    b_p = _probabilities(b_s * scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where((i_key + tl.arange(0, BLOCK_N))[None, :] < k_rows.count, b_p, 0.0)
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k[0].dtype)
    b_new_dq = ()
    for i in tl.static_range(len(b_k)):
        b_new_dq += (tl.dot(b_ds, b_k[i], b_dq[i], input_precision="ieee"),)
    return b_new_dq


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
    COLUMNS: tl.constexpr = operands.Columns(D, LO, HI, TMA)
    segments = operands.Segments(p_cu_seqlens, tokens, longest)
    dense = operands.Dense(tokens, heads, heads * D)
    q_strides = strides_of(stride_qb, stride_q, stride_qh, UNIT)
    k_strides = strides_of(stride_kb, stride_k, stride_kh, UNIT)
    v_strides = strides_of(stride_vb, stride_v, stride_vh, UNIT)
    i_program = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_M)
    i_block = i_program % blocks
    i_head = i_program // blocks % heads
    i_batch = i_program // blocks // heads
    if PACKED:
        is_last = i_program + blocks * heads >= tl.num_programs(0)
        dq_rows = operands.Rows(p_dq + i_head * D, dense.stride, tokens)
        clear_gaps(dq_rows, None, segments, i_batch, i_block, blocks, is_last, COLUMNS)
    start, keys = segment(segments, i_batch, PACKED)
    i_query = i_block * BLOCK_M
    if i_query >= keys:
        return
    head = operands.Head(i_batch, i_head, start, keys)
    b_q = load_rows(head_rows(p_q, q_strides, head, i_query), COLUMNS, BLOCK_M)
    b_do = load_rows(dense_rows(p_grad, dense, head, i_query, D, PACKED), COLUMNS, BLOCK_M)
    b_out = load_rows(dense_rows(p_out, dense, head, i_query, D, PACKED), COLUMNS, BLOCK_M)
    b_delta = tl.sum(b_do[0].to(tl.float32) * b_out[0].to(tl.float32), 1)  # [BM]
    for i in tl.static_range(1, len(b_out)):
        b_delta += tl.sum(b_do[i].to(tl.float32) * b_out[i].to(tl.float32), 1)
    o_row = tl.arange(0, BLOCK_M)
    m_row = o_row < keys - i_query
    b_lse = tl.load(statistics(p_lse, dense, head, i_query, PACKED) + o_row, mask=m_row, other=0) * constants.LOG2_E
    tl.store(statistics(p_delta, dense, head, i_query, PACKED) + o_row, b_delta, mask=m_row)

    dq_rows = dense_rows(p_dq, dense, head, i_query, D, PACKED)
    queries = (b_q, b_do, b_lse, b_delta)
    b_dq = zero_rows(COLUMNS, BLOCK_M)
    k_rows = head_stream(k, k_hi, k_strides, head, TMA)
    v_rows = head_stream(v, v_hi, v_strides, head, TMA)
    # a tail of its own spares the other blocks their masks; float32 needs the registers that two copies take
    whole = keys // BLOCK_N * BLOCK_N if SPLIT_TAIL else 0
    for i_key in range(0, whole, BLOCK_N):
        b_dq = _by_query(b_dq, queries, k_rows, v_rows, i_key, scale, COLUMNS, BLOCK_N, NEGATED, False)
    for i_tail in tl.range(whole, keys, BLOCK_N, num_stages=1 if SPLIT_TAIL else None):
        b_dq = _by_query(b_dq, queries, k_rows, v_rows, i_tail, scale, COLUMNS, BLOCK_N, NEGATED, True)
    factor = (-scale if NEGATED else scale) * constants.LN_2
    store_rows(dq_rows, [b * factor for b in b_dq], COLUMNS, BLOCK_M)


@triton.jit
def _by_key(
    gradients,
    b_k,
    b_v,
    queries,
    i_query,
    scale,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gradients by k and v with what one block of queries adds, of streams of q and grad, and lse and delta."""
    b_dk, b_dv = gradients
    q_rows, grad_rows, p_lse, p_delta = queries
    o_row = i_query + tl.arange(0, BLOCK_M)
    # exp2(-inf) = 0: queries beyond the last count for nothing
    b_lse = tl.load(p_lse + o_row, mask=o_row < q_rows.count, other=float("inf")) * constants.LOG2_E
    b_delta = tl.load(p_delta + o_row, mask=o_row < q_rows.count, other=0)
    b_q = stream_rows(q_rows, i_query, COLUMNS, BLOCK_M, MASKED)
    b_do = stream_rows(grad_rows, i_query, COLUMNS, BLOCK_M, MASKED)
    b_s, b_dp = None, None
    for i in tl.static_range(len(b_q)):
        b_s = tl.dot(b_k[i], b_q[i].T, b_s, input_precision="ieee")  # [BN, BM]
        b_dp = tl.dot(b_v[i], b_do[i].T, b_dp, input_precision="ieee")  # [BN, BM]
    if NEGATED:
        b_s = -b_s
    b_p = _probabilities(b_s * scale - b_lse[None, :])
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q[0].dtype)
    b_p = b_p.to(b_q[0].dtype)
    b_new_dk, b_new_dv = (), ()
    for i in tl.static_range(len(b_q)):
        b_new_dv += (tl.dot(b_p, b_do[i], b_dv[i], input_precision="ieee"),)
        b_new_dk += (tl.dot(b_ds, b_q[i], b_dk[i], input_precision="ieee"),)
    return b_new_dk, b_new_dv


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
    COLUMNS: tl.constexpr = operands.Columns(D, LO, HI, TMA)
    segments = operands.Segments(p_cu_seqlens, tokens, longest)
    dense = operands.Dense(tokens, heads, heads * D)
    q_strides = strides_of(stride_qb, stride_q, stride_qh, UNIT)
    k_strides = strides_of(stride_kb, stride_k, stride_kh, UNIT)
    v_strides = strides_of(stride_vb, stride_v, stride_vh, UNIT)
    i_program = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_N)
    i_block = i_program % blocks
    i_head = i_program // blocks % heads
    i_batch = i_program // blocks // heads
    if PACKED:
        is_last = i_program + blocks * heads >= tl.num_programs(0)
        dk_rows = operands.Rows(p_dk + i_head * D, dense.stride, tokens)
        dv_rows = operands.Rows(p_dv + i_head * D, dense.stride, tokens)
        clear_gaps(dk_rows, None, segments, i_batch, i_block, blocks, is_last, COLUMNS)
        clear_gaps(dv_rows, None, segments, i_batch, i_block, blocks, is_last, COLUMNS)
    start, tokens_of_head = segment(segments, i_batch, PACKED)
    i_key = i_block * BLOCK_N
    if i_key >= tokens_of_head:
        return
    head = operands.Head(i_batch, i_head, start, tokens_of_head)
    b_k = load_rows(head_rows(p_k, k_strides, head, i_key), COLUMNS, BLOCK_N)
    b_v = load_rows(head_rows(p_v, v_strides, head, i_key), COLUMNS, BLOCK_N)
    dk_rows = dense_rows(p_dk, dense, head, i_key, D, PACKED)
    dv_rows = dense_rows(p_dv, dense, head, i_key, D, PACKED)
    gradients = (zero_rows(COLUMNS, BLOCK_N), zero_rows(COLUMNS, BLOCK_N))
    queries = (
        head_stream(q, q_hi, q_strides, head, TMA),
        dense_stream(grad, grad_hi, dense, head, D, PACKED, TMA),
        statistics(p_lse, dense, head, 0, PACKED),
        statistics(p_delta, dense, head, 0, PACKED),
    )
    # a tail of its own spares the other blocks their masks; float32 needs the registers that two copies take
    whole = head.tokens // BLOCK_M * BLOCK_M if SPLIT_TAIL else 0
    for i_query in range(0, whole, BLOCK_M):
        gradients = _by_key(gradients, b_k, b_v, queries, i_query, scale, COLUMNS, BLOCK_M, NEGATED, False)
    for i_tail in tl.range(whole, head.tokens, BLOCK_M, num_stages=1 if SPLIT_TAIL else None):
        gradients = _by_key(gradients, b_k, b_v, queries, i_tail, scale, COLUMNS, BLOCK_M, NEGATED, True)
    b_dk, b_dv = gradients
    factor = (-scale if NEGATED else scale) * constants.LN_2
    store_rows(dk_rows, [b * factor for b in b_dk], COLUMNS, BLOCK_N)
    store_rows(dv_rows, b_dv, COLUMNS, BLOCK_N)


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
