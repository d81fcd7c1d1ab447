"""Multi-head attention forward, dense or packed, for head dimensions that are no power of two.

A head of D columns is split into LO + HI, each a power of two: 72 = 64 + 16 pads to 80 where padding to 128 would cost
60 % more. The softmax is online over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., 2022), in base 2. What a
call does not ask for, a window, a cap, a rotation, keys of their own lengths, is None to the kernel, which is compiled
without it.

FLOPs: 4 * N * M * D an image and head, less what windows leave out. Least bytes: q, k, v and the result once.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import patch_interpreter
from .._launch import Kernel, Launch, start
from ..blocks import constants, operands
from ..blocks.rows import load_rows, store_rows, stream_rows, zero_rows
from ..blocks.segments import clear_gaps, segment
from ..blocks.strides import in_elements
from .heads import dense_rows, head_rows, head_stream, statistics, strides_of
from .plan import PER_CALL, VARIANTS, WIDE_CANDIDATES, example, plan
from .rotary import NO_TABLES, load_turned_rows, tables_of, turned
from .scores import capped, edge_column, seen, sees_any, span_of

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# of q that is turned where it is loaded: at 256 a thread would hold 128 channels, those that they are paired with, and
# their angles, 600 bytes more than its registers
MAX_TURNED_DIM = 128


@triton.jit
def _attend(
    softmax,
    b_q,
    k_rows,
    v_rows,
    o_query,
    i_key,
    scores,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax after one more block of keys: the weighted sum of values, the highest score, the sum of weights."""
    b_acc, b_old_max, b_sum = softmax
    b_k = stream_rows(k_rows, i_key, COLUMNS, BLOCK_N, MASKED)
    b_v = stream_rows(v_rows, i_key, COLUMNS, BLOCK_N, MASKED)
    b_s = None
    for i in tl.static_range(len(b_k)):
        b_s = tl.dot(b_q[i], b_k[i].T, b_s, input_precision="ieee")  # [BM, BN]
    if NEGATED:
        b_s = -b_s
    if scores.steepness is not None:
        b_s, _ = capped(b_s, scores.steepness, b_q[0].dtype == tl.float32)
    if MASKED:
        b_s = tl.where(seen(o_query, i_key + tl.arange(0, BLOCK_N), scores.window), b_s, float("-inf"))
    b_max = tl.maximum(b_old_max, tl.max(b_s, 1))  # [BM]
    # differences first: of large scores they are exact, where those of rounded products are not
    b_p = tl.exp2((b_s - b_max[:, None]) * scores.scale)
    b_rescale = tl.exp2((b_old_max - b_max) * scores.scale)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_p = b_p.to(b_v[0].dtype)
    b_new_acc = ()
    for i in tl.static_range(len(b_v)):
        b_new_acc += (tl.dot(b_p, b_v[i], b_acc[i] * b_rescale[:, None], input_precision="ieee"),)
    return b_new_acc, b_max, b_sum


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
    p_cu_seqlens_k,
    p_cos,
    p_sin,
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
    stride_tb,
    stride_t,
    INTERLEAVED: tl.constexpr,
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
    """q [B, N, H, D] or packed [T, H, D], k, v [B, M, H / GROUP, D] or [T_k, ..] -> out, dense, and lse [B, H, N] or
    [H, T], natural logarithm.

    Grid: blocks of queries, fastest, then heads, then images. With TMA, k and v are descriptors of [B, H, M, D] and
    k_hi, v_hi of the same tensors in blocks of HI columns; else pointers, and k_hi, v_hi unused. Strides of images,
    tokens and heads are in units of UNIT elements. cos and sin turn q where it is loaded; k comes turned.
    """
    COLUMNS: tl.constexpr = operands.Columns(D, LO, HI, TMA)
    segments = operands.Segments(p_cu_seqlens, tokens, longest)
    q_strides = strides_of(stride_qb, stride_q, stride_qh, UNIT)
    k_strides = strides_of(stride_kb, stride_k, stride_kh, UNIT)
    v_strides = strides_of(stride_vb, stride_v, stride_vh, UNIT)
    dense = operands.Dense(tokens, heads, heads * D)
    i_program = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_M)
    i_block = i_program % blocks
    if right is not None and left is None:
        # those that see the most first, lest they be what is left at the end
        i_block = blocks - 1 - i_block
    i_head = i_program // blocks % heads
    i_batch = i_program // blocks // heads
    if PACKED:
        all_rows = operands.Rows(p_out + i_head * D, dense.stride, tokens)
        is_last = i_program + blocks * heads >= tl.num_programs(0)
        p_lse_head = p_lse + i_head.to(tl.int64) * tokens
        clear_gaps(all_rows, p_lse_head, segments, i_batch, i_block, blocks, is_last, COLUMNS)
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
    q_rows = head_rows(p_q, q_strides, head, i_query)
    if p_cos is None:
        b_q = load_rows(q_rows, COLUMNS, BLOCK_M)
    else:
        table = operands.Strides(in_elements(stride_tb, 1), in_elements(stride_t, 1), 0)
        cos_rows, sin_rows = head_rows(p_cos, table, head, i_query), head_rows(p_sin, table, head, i_query)
        b_q = load_turned_rows(q_rows, cos_rows, sin_rows, COLUMNS, BLOCK_M, INTERLEAVED)
    k_rows = head_stream(k, k_hi, k_strides, head_k, TMA)
    v_rows = head_stream(v, v_hi, v_strides, head_k, TMA)
    # the lowest that is finite: the difference of two infinities would be NaN
    b_max = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
    softmax = (zero_rows(COLUMNS, BLOCK_M), b_max, tl.zeros([BLOCK_M], tl.float32))
    # edges of their own spare the other blocks their masks; float32 needs the registers that two copies take
    span = span_of(i_query, window, BLOCK_M, BLOCK_N, SPLIT)
    o_query = i_query + tl.arange(0, BLOCK_M)
    for i_key in range(span.whole, span.whole_end, BLOCK_N):
        softmax = _attend(softmax, b_q, k_rows, v_rows, o_query, i_key, scores, COLUMNS, BLOCK_N, NEGATED, False)
    for i_edge in tl.range(span.edges, span.end, BLOCK_N, num_stages=1 if SPLIT else None):
        i_key = edge_column(i_edge, span, window)
        softmax = _attend(softmax, b_q, k_rows, v_rows, o_query, i_key, scores, COLUMNS, BLOCK_N, NEGATED, True)
    b_acc, b_max, b_sum = softmax
    b_out = [b / b_sum[:, None] for b in b_acc]
    m_any = None
    # of as many keys as queries, each sees its own at least
    if tokens_k is not None:
        m_any = sees_any(o_query, window)
        b_out = [tl.where(m_any[:, None], b, 0.0) for b in b_out]
    store_rows(dense_rows(p_out, dense, head, i_query, D, PACKED), b_out, COLUMNS, BLOCK_M)
    p_lse_rows = statistics(p_lse, dense, head, i_query, PACKED) + tl.arange(0, BLOCK_M)
    b_lse = (b_max * scale + tl.log2(b_sum)) * constants.LN_2
    if m_any is not None:
        b_lse = tl.where(m_any, b_lse, float("-inf"))
    tl.store(p_lse_rows, b_lse, mask=tl.arange(0, BLOCK_M) < queries - i_query)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Output, dense, and log-sum-exp of q [B, N, H, D] and k, v [B, M, H_kv, D], or packed [T, ..] with cu_seqlens
    [S + 1]; what the rest is, `ops.attention` says.

    The bounds are not trusted: tokens that are in no segment, or beyond its first max_seqlen, have an output of 0 and a
    log-sum-exp of -inf, as have those that see no key. Bounds that decrease may have the kernel write a token twice, in
    any order."""
    tables = NO_TABLES
    if cos is not None:
        tables = tables_of(cos, sin, interleaved)
        k = turned(k, tables if cos_k is None else tables_of(cos_k, sin_k, interleaved), k.dtype)
        if q.shape[-1] > MAX_TURNED_DIM:
            q, tables = turned(q, tables, q.dtype), NO_TABLES
    how = plan(
        "attention_fwd_kernel",
        "BLOCK_M",
        q.shape,
        k.shape,
        (q.stride(), k.stride(), v.stride()),
        q.dtype,
        q.device,
        scale,
        None if cu_seqlens is None else len(cu_seqlens) - 1,
        max_seqlen,
        max_seqlen_k,
        (left, right, softcap),
        (k.stride(), v.stride()),
        (k.data_ptr() | v.data_ptr()) % 16 == 0,
    )
    if not how.grid[0] or not q.numel() or not k.numel():
        return q.new_zeros(q.shape), q.new_full(how.lse_shape, -math.inf, dtype=torch.float32)
    out, lse = q.new_empty(q.shape), q.new_empty(how.lse_shape, dtype=torch.float32)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    (k_lo, k_hi), (v_lo, v_hi) = how.streams(k, v)
    args = (q, k_lo, v_lo, k_hi, v_hi, out, lse, cu_seqlens, cu_seqlens_k, *tables[:2], *how.sizes, *tables[2:])
    start(Launch(attention_fwd_kernel, how.grid, args, how.constants, how.options))
    return out, lse


def _example(
    dtype: torch.dtype, device: str, tokens: int, head_dim: int, **form: Any
) -> Callable[[], tuple[Tensor, Tensor]]:
    q, k, v, *bounds, options = example(dtype, device, tokens, head_dim, **form)
    return lambda: attention_fwd(q, k, v, head_dim**-0.5, *bounds, **options)


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
        variants=VARIANTS,
        # the head padded to a power of two, as kernels do that do not split it
        baseline={"LO": 128, "BLOCK_M": 128, "BLOCK_N": 64, "TMA": False, "num_warps": 8, "num_stages": 2},
        wide_candidates=WIDE_CANDIDATES,
    ),
)
