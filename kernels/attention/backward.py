"""Gradients of multi-head attention, without atomics: one kernel by q, one by k and v.

The probabilities are recomputed from the log-sum-exp (Dao et al., 2022, algorithm 4):

    P = exp(scale * Q K^T - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  delta = rowsum(dO * O),
    dQ = scale * dS K,  dK = scale * dS^T Q

The log-sum-exp is float32 and rounded a few times on its way, so the logarithm of P is off by up to |lse| * 3e-7: P by
0.3 % where scores are 1e4, by a third at 1e6, and beyond that gradients are finite and no more. P is at most 1 whatever
the scores, so that finite ones have finite gradients.

A cap multiplies dS by its slope. Where heads of q share one of k and v, the kernel by these goes through those heads
one after the other. Rotated q and k are made again before both kernels, which know nothing of the rotation.

FLOPs: 14 * N * M * D an image and head, less what windows leave out, two of the seven products being made in both
kernels.
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
from .heads import dense_rows, dense_stream, head_rows, head_stream, later_head, statistics, strides_of
from .plan import PER_CALL, VARIANTS, WIDE_CANDIDATES, example, plan
from .rotary import NO_TABLES, tables_of, turned
from .scores import capped, edge_column, seen, span_of


@triton.jit
def _probabilities(b_logarithm):
    # none is above one: a log-sum-exp that was rounded must not make them overflow, nor hide NaN
    return tl.exp2(tl.minimum(b_logarithm, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _slope(scores, NEGATED: tl.constexpr):
    """Of scores by products of queries and keys, where a cap does not bend them."""
    size = scores.scale * constants.LN_2
    if scores.steepness is not None:
        size *= scores.steepness * (0.5 * constants.LN_2)
    return -size if NEGATED else size


@triton.jit
def _by_query(
    b_dq,
    queries,
    k_rows,
    v_rows,
    i_key,
    scores,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gradient by q with what one block of keys adds, of queries (which, q, grad, lse in base 2, delta)."""
    o_query, b_q, b_do, b_lse, b_delta = queries
    b_k = stream_rows(k_rows, i_key, COLUMNS, BLOCK_N, MASKED)
    b_v = stream_rows(v_rows, i_key, COLUMNS, BLOCK_N, MASKED)
    b_s, b_dp = None, None
    for i in tl.static_range(len(b_k)):
        b_s = tl.dot(b_q[i], b_k[i].T, b_s, input_precision="ieee")  # [BM, BN]
        b_dp = tl.dot(b_do[i], b_v[i].T, b_dp, input_precision="ieee")  # [BM, BN]
    if NEGATED:
        b_s = -b_s
    if scores.steepness is not None:
        b_s, b_slope = capped(b_s, scores.steepness, b_q[0].dtype == tl.float32)
    b_p = _probabilities(b_s * scores.scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where(seen(o_query, i_key + tl.arange(0, BLOCK_N), scores.window), b_p, 0.0)
    b_ds = (b_p if scores.steepness is None else b_p * b_slope) * (b_dp - b_delta[:, None])
    b_ds = b_ds.to(b_k[0].dtype)
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
    p_cu_seqlens_k,
    p_dq,
    p_delta,
    tokens,
    longest,
    heads,
    scale,
    steepness,
    stride_qb,
    stride_q,
    stride_qh,
    stride_kb,
    stride_k,
    stride_kh,
    stride_vb,
    stride_v,
    stride_vh,
    tokens_k,
    longest_k,
    left,
    right,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    NEGATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """grad and out (dense), q, k, v, lse -> dq, dense, and delta, shaped like lse. Grid, strides, k and v as the
    forward's; q and k come turned."""
    COLUMNS: tl.constexpr = operands.Columns(D, LO, HI, TMA)
    segments = operands.Segments(p_cu_seqlens, tokens, longest)
    dense = operands.Dense(tokens, heads, heads * D)
    q_strides = strides_of(stride_qb, stride_q, stride_qh, UNIT)
    k_strides = strides_of(stride_kb, stride_k, stride_kh, UNIT)
    v_strides = strides_of(stride_vb, stride_v, stride_vh, UNIT)
    i_program = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_M)
    i_block = i_program % blocks
    if right is not None and left is None:
        # as in the forward
        i_block = blocks - 1 - i_block
    i_head = i_program // blocks % heads
    i_batch = i_program // blocks // heads
    if PACKED:
        is_last = i_program + blocks * heads >= tl.num_programs(0)
        dq_rows = operands.Rows(p_dq + i_head * D, dense.stride, tokens)
        clear_gaps(dq_rows, None, segments, i_batch, i_block, blocks, is_last, COLUMNS)
    start, queries = segment(segments, i_batch, PACKED)
    i_query = i_block * BLOCK_M
    if i_query >= queries:
        return
    start_k, keys = start, queries
    if tokens_k is not None:
        start_k, keys = segment(operands.Segments(p_cu_seqlens_k, tokens_k, longest_k), i_batch, PACKED)
    window = operands.Window(queries, keys, left, right)
    scores = operands.Scores(scale, steepness, window)
    head = operands.Head(i_batch, i_head, start, queries)
    head_k = operands.Head(i_batch, i_head // GROUP, start_k, keys)
    b_q = load_rows(head_rows(p_q, q_strides, head, i_query), COLUMNS, BLOCK_M)
    b_do = load_rows(dense_rows(p_grad, dense, head, i_query, D, PACKED), COLUMNS, BLOCK_M)
    b_out = load_rows(dense_rows(p_out, dense, head, i_query, D, PACKED), COLUMNS, BLOCK_M)
    b_delta = tl.sum(b_do[0].to(tl.float32) * b_out[0].to(tl.float32), 1)  # [BM]
    for i in tl.static_range(1, len(b_out)):
        b_delta += tl.sum(b_do[i].to(tl.float32) * b_out[i].to(tl.float32), 1)
    o_row = tl.arange(0, BLOCK_M)
    m_row = o_row < queries - i_query
    b_lse = tl.load(statistics(p_lse, dense, head, i_query, PACKED) + o_row, mask=m_row, other=0) * constants.LOG2_E
    tl.store(statistics(p_delta, dense, head, i_query, PACKED) + o_row, b_delta, mask=m_row)

    dq_rows = dense_rows(p_dq, dense, head, i_query, D, PACKED)
    of_queries = (i_query + o_row, b_q, b_do, b_lse, b_delta)
    b_dq = zero_rows(COLUMNS, BLOCK_M)
    k_rows = head_stream(k, k_hi, k_strides, head_k, TMA)
    v_rows = head_stream(v, v_hi, v_strides, head_k, TMA)
    # edges of their own spare the other blocks their masks; float32 needs the registers that two copies take
    span = span_of(i_query, window, BLOCK_M, BLOCK_N, SPLIT)
    for i_key in range(span.whole, span.whole_end, BLOCK_N):
        b_dq = _by_query(b_dq, of_queries, k_rows, v_rows, i_key, scores, COLUMNS, BLOCK_N, NEGATED, False)
    for i_edge in tl.range(span.edges, span.end, BLOCK_N, num_stages=1 if SPLIT else None):
        i_key = edge_column(i_edge, span, window)
        b_dq = _by_query(b_dq, of_queries, k_rows, v_rows, i_key, scores, COLUMNS, BLOCK_N, NEGATED, True)
    factor = _slope(scores, NEGATED)
    store_rows(dq_rows, [b * factor for b in b_dq], COLUMNS, BLOCK_M)


@triton.jit
def _by_key(
    gradients,
    keys,
    queries,
    i_query,
    scores,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gradients by k and v of keys (which, k, v) with what one block of queries adds, of streams of q and grad, and
    lse and delta."""
    b_dk, b_dv = gradients
    o_key, b_k, b_v = keys
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
    if scores.steepness is not None:
        b_s, b_slope = capped(b_s, scores.steepness, b_q[0].dtype == tl.float32)
    b_p = _probabilities(b_s * scores.scale - b_lse[None, :])
    if MASKED and (scores.window.before is not None or scores.window.after is not None):
        b_p = tl.where(seen(o_key, o_row, scores.window), b_p, 0.0)
    b_ds = (b_p if scores.steepness is None else b_p * b_slope) * (b_dp - b_delta[None, :])
    b_ds = b_ds.to(b_q[0].dtype)
    b_p = b_p.to(b_q[0].dtype)
    b_new_dk, b_new_dv = (), ()
    for i in tl.static_range(len(b_q)):
        b_new_dv += (tl.dot(b_p, b_do[i], b_dv[i], input_precision="ieee"),)
        b_new_dk += (tl.dot(b_ds, b_q[i], b_dk[i], input_precision="ieee"),)
    return b_new_dk, b_new_dv


@triton.jit
def _of_group(queries, strides, i_step, first, end, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr):
    """What `_by_key` takes of queries at a step through those from `first` to `end` of one head of the group after the
    other, given those of its first head: a loop in a loop would take 40 registers more."""
    if GROUP == 1:
        return queries, i_step
    else:
        q_rows, grad_rows, p_lse, p_delta = queries
        q_stride, grad_stride, tokens = strides
        length = tl.cdiv(end - first, BLOCK_M) * BLOCK_M
        i_member = (i_step - first) // length
        of_member = (
            later_head(q_rows, i_member, q_stride, TMA),
            later_head(grad_rows, i_member, grad_stride, TMA),
            p_lse + i_member.to(tl.int64) * tokens,
            p_delta + i_member.to(tl.int64) * tokens,
        )
        return of_member, i_step - i_member * length


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
    p_cu_seqlens_k,
    p_dk,
    p_dv,
    tokens,
    longest,
    heads,
    scale,
    steepness,
    stride_qb,
    stride_q,
    stride_qh,
    stride_kb,
    stride_k,
    stride_kh,
    stride_vb,
    stride_v,
    stride_vh,
    tokens_k,
    longest_k,
    left,
    right,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    NEGATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """grad (dense), q, k, v, lse, delta -> dk and dv, dense. Grid: blocks of keys, heads of keys, images. With TMA,
    grad and q are descriptors as the forward's k and v; q and k come turned."""
    COLUMNS: tl.constexpr = operands.Columns(D, LO, HI, TMA)
    segments = operands.Segments(p_cu_seqlens, tokens, longest)
    segments_k = segments
    if tokens_k is not None:
        segments_k = operands.Segments(p_cu_seqlens_k, tokens_k, longest_k)
    heads_k = heads // GROUP
    dense = operands.Dense(tokens, heads, heads * D)
    dense_k = operands.Dense(segments_k.tokens, heads_k, heads_k * D)
    q_strides = strides_of(stride_qb, stride_q, stride_qh, UNIT)
    k_strides = strides_of(stride_kb, stride_k, stride_kh, UNIT)
    v_strides = strides_of(stride_vb, stride_v, stride_vh, UNIT)
    i_program = tl.program_id(0)
    blocks = tl.cdiv(segments_k.longest, BLOCK_N)
    i_block = i_program % blocks
    i_head_k = i_program // blocks % heads_k
    i_batch = i_program // blocks // heads_k
    if PACKED:
        is_last = i_program + blocks * heads_k >= tl.num_programs(0)
        dk_rows = operands.Rows(p_dk + i_head_k * D, dense_k.stride, segments_k.tokens)
        dv_rows = operands.Rows(p_dv + i_head_k * D, dense_k.stride, segments_k.tokens)
        clear_gaps(dk_rows, None, segments_k, i_batch, i_block, blocks, is_last, COLUMNS)
        clear_gaps(dv_rows, None, segments_k, i_batch, i_block, blocks, is_last, COLUMNS)
    start_k, keys = segment(segments_k, i_batch, PACKED)
    i_key = i_block * BLOCK_N
    if i_key >= keys:
        return
    start, queries = start_k, keys
    if tokens_k is not None:
        start, queries = segment(segments, i_batch, PACKED)
    # the window as keys look through it
    window = operands.Window(keys, queries, right, left)
    scores = operands.Scores(scale, steepness, window)
    head_k = operands.Head(i_batch, i_head_k, start_k, keys)
    b_k = load_rows(head_rows(p_k, k_strides, head_k, i_key), COLUMNS, BLOCK_N)
    b_v = load_rows(head_rows(p_v, v_strides, head_k, i_key), COLUMNS, BLOCK_N)
    dk_rows = dense_rows(p_dk, dense_k, head_k, i_key, D, PACKED)
    dv_rows = dense_rows(p_dv, dense_k, head_k, i_key, D, PACKED)
    gradients = (zero_rows(COLUMNS, BLOCK_N), zero_rows(COLUMNS, BLOCK_N))
    of_keys = (i_key + tl.arange(0, BLOCK_N), b_k, b_v)
    # edges of their own spare the other blocks their masks; float32 needs the registers that two copies take
    span = span_of(i_key, window, BLOCK_N, BLOCK_M, SPLIT)
    head = operands.Head(i_batch, i_head_k * GROUP, start, queries)
    group = (
        head_stream(q, q_hi, q_strides, head, TMA),
        dense_stream(grad, grad_hi, dense, head, D, PACKED, TMA),
        statistics(p_lse, dense, head, 0, PACKED),
        statistics(p_delta, dense, head, 0, PACKED),
    )
    strides = (q_strides.head, D, tokens)
    for i_step in range(span.whole, span.whole + GROUP * (span.whole_end - span.whole), BLOCK_M):
        of_queries, i_query = _of_group(group, strides, i_step, span.whole, span.whole_end, BLOCK_M, GROUP, TMA)
        gradients = _by_key(gradients, of_keys, of_queries, i_query, scores, COLUMNS, BLOCK_M, NEGATED, False)
    end = span.end
    if GROUP > 1:
        end = span.edges + GROUP * (tl.cdiv(span.end - span.edges, BLOCK_M) * BLOCK_M)
    for i_step in tl.range(span.edges, end, BLOCK_M, num_stages=1 if SPLIT else None):
        of_queries, i_edge = _of_group(group, strides, i_step, span.edges, span.end, BLOCK_M, GROUP, TMA)
        i_query = edge_column(i_edge, span, window)
        gradients = _by_key(gradients, of_keys, of_queries, i_query, scores, COLUMNS, BLOCK_M, NEGATED, True)
    b_dk, b_dv = gradients
    factor = _slope(scores, NEGATED)
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, dense, from what `kernels.attention.attention_fwd` took and gave; zeros for tokens that
    it found in no segment, and for keys that no query sees."""
    segments = None if cu_seqlens is None else len(cu_seqlens) - 1
    if q.numel() == 0 or k.numel() == 0 or segments == 0 or max_seqlen == 0 or max_seqlen_k == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    tables = tables_k = NO_TABLES
    dtype = q.dtype
    if cos is not None:
        tables = tables_k = tables_of(cos, sin, interleaved)
        if cos_k is not None:
            tables_k = tables_of(cos_k, sin_k, interleaved)
        q, k = turned(q, tables, dtype), turned(k, tables_k, dtype)
        dtype = torch.float32
    dq, dk, dv = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape)
    # gradients of sums have strides of zero
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    bounds = tuple(None if bounds is None else bounds.contiguous() for bounds in (cu_seqlens, cu_seqlens_k))
    delta = torch.empty_like(lse)
    strides = (q.stride(), k.stride(), v.stride())
    form = (left, right, softcap)
    geometry = (q.shape, k.shape, strides, q.dtype, q.device, scale, segments, max_seqlen, max_seqlen_k, form)

    # by q first: it leaves delta for the other
    streamed, aligned = (k.stride(), v.stride()), (k.data_ptr() | v.data_ptr()) % 16 == 0
    how = plan("attention_bwd_dq_kernel", "BLOCK_M", *geometry, streamed, aligned)
    (k_lo, k_hi), (v_lo, v_hi) = how.streams(k, v)
    args = (grad, q, k_lo, v_lo, k_hi, v_hi, out, lse, *bounds, dq, delta, *how.sizes)
    start(Launch(attention_bwd_dq_kernel, how.grid, args, how.constants, how.options))

    streamed, aligned = (grad.stride(), q.stride()), (grad.data_ptr() | q.data_ptr()) % 16 == 0
    how = plan("attention_bwd_dkv_kernel", "BLOCK_N", *geometry, streamed, aligned)
    (grad_lo, grad_hi), (q_lo, q_hi) = how.streams(grad, q)
    args = (grad_lo, q_lo, grad_hi, q_hi, k, v, lse, delta, *bounds, dk, dv, *how.sizes)
    start(Launch(attention_bwd_dkv_kernel, how.grid, args, how.constants, how.options))
    if cos is not None:
        dq, dk = turned(dq, tables, q.dtype, back=True), turned(dk, tables_k, k.dtype, back=True)
    return dq, dk, dv


def _example(
    dtype: torch.dtype, device: str, tokens: int, head_dim: int, **form: Any
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    q, k, v, *bounds, options = example(dtype, device, tokens, head_dim, **form)
    # dense, as the views are not
    out, grad = (torch.randn(q.shape, dtype=dtype, device=device) for _ in range(2))
    lse = torch.zeros((*q.shape[:-3], 16, q.shape[-3]), device=device)
    return lambda: attention_bwd(grad, q, k, v, out, lse, head_dim**-0.5, *bounds, **options)


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
        variants=VARIANTS,
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
