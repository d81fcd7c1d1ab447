"""Non-causal multi-head attention forward, dense or packed, for head dimensions that are no power of two.

A head of D columns is split into LO + HI, each a power of two: 72 = 64 + 16 pads to 80 where padding to 128 would cost
60 % more. The softmax is online over blocks of keys (Milakov and Gimelshein, 2018; Dao et al., 2022), in base 2.

FLOPs: 4 * N^2 * D an image and head. Least bytes: q, k, v and the result once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._interpreter import patch_interpreter
from ._launch import Kernel, Launch, descriptor, descriptor_fields, planned, select_for, split, start
from ._strides import in_elements, in_units

patch_interpreter()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256

# what calls of one model differ by, for which kernels are not to be compiled again
PER_CALL = (
    "tokens",
    "longest",
    "heads",
    *(f"stride_{x}{dimension}" for x in "qkv" for dimension in ("b", "", "h")),
)

_LOG2_E = math.log2(math.e)


@triton.jit
def load_rows(
    p_rows,
    stride,
    rows,
    COL: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns COL to COL + WIDTH of ROWS rows; zeros before column FIRST and from D on and, if MASKED, from row `rows`
    on."""
    o_row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    p_tile = p_rows + o_row * stride + o_col
    if COL >= FIRST and COL + WIDTH <= D:
        if MASKED:
            return tl.load(p_tile, mask=o_row < rows, other=0)
        else:
            return tl.load(p_tile)
    m_col = (o_col >= FIRST) & (o_col < D)
    if MASKED:
        return tl.load(p_tile, mask=m_col & (o_row < rows), other=0)
    else:
        return tl.load(p_tile, mask=m_col & (o_row >= 0), other=0)


@triton.jit
def store_rows(
    p_rows,
    stride,
    rows,
    b_rows,
    COL: tl.constexpr,
    FIRST: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The reverse of `load_rows`, converting to the tensor's dtype."""
    o_row = tl.arange(0, ROWS)[:, None]
    o_col = COL + tl.arange(0, WIDTH)[None, :]
    mask = (o_row < rows) & (o_col >= FIRST) & (o_col < D)
    tl.store(p_rows + o_row * stride + o_col, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def _bound(p_cu_seqlens, i_bound, tokens):
    """One of the bounds; untrusted ones reach no token outside the tensors."""
    return tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_bound), 0), tokens)


@triton.jit
def segment(p_cu_seqlens, i_batch, tokens, longest, PACKED: tl.constexpr):
    """First token and length of an image: of the packed segment, else of [B, N, ...] tensors flattened to rows. Of a
    segment, no more than the `longest` tokens count that the grid was made for."""
    if PACKED:
        start = _bound(p_cu_seqlens, i_batch, tokens)
        end = _bound(p_cu_seqlens, i_batch + 1, tokens)
        return start.to(tl.int64), tl.minimum(tl.maximum(end - start, 0), longest)
    else:
        return tl.zeros([], tl.int64), tokens


@triton.jit
def clear_gaps(
    p_rows,
    p_lse,
    stride,
    p_cu_seqlens,
    i_batch,
    i_block,
    blocks,
    is_last,
    tokens,
    longest,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
):
    """Zeros in one head's rows, and -inf in its log-sum-exp unless that is None, where no segment is: before the first,
    after what counts of this one and, if it is the last, after its end. This is the share of program i_block of a
    segment's.

    Bounds lead from the first token to the last in steps up and down, so each token is in a gap or passed by a step up.
    """
    # few at a time, as there should be none
    ROWS: tl.constexpr = 4
    start = _bound(p_cu_seqlens, i_batch, tokens)
    end = _bound(p_cu_seqlens, i_batch + 1, tokens)
    b_lo = tl.zeros([ROWS, LO], tl.float32)
    o_row = tl.arange(0, ROWS)
    for i_gap in tl.static_range(2):
        if i_gap == 0:
            first = tl.zeros_like(start)
            end_of_gap = tl.where(i_batch == 0, start, 0)
        else:
            first = tl.minimum(start + tl.minimum(longest, tokens - start), end)
            end_of_gap = tl.where(is_last, tokens, end)
        for i_row in range(first + i_block * ROWS, end_of_gap, blocks * ROWS):
            p_gap = p_rows + tl.cast(i_row, tl.int64) * stride
            store_rows(p_gap, stride, end_of_gap - i_row, b_lo, 0, 0, D, ROWS, LO)
            if HI:
                store_rows(p_gap, stride, end_of_gap - i_row, tl.zeros([ROWS, HI], tl.float32), LO, LO, D, ROWS, HI)
            if p_lse is not None:
                b_lse = tl.full([ROWS], float("-inf"), tl.float32)
                tl.store(p_lse + i_row + o_row, b_lse, mask=o_row < end_of_gap - i_row)


@triton.jit
def stream_rows(
    x,
    x_hi,
    stride,
    i_batch,
    i_head,
    i_row,
    rows,
    D: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """ROWS rows from i_row on of a tensor of `rows`: its first LO columns and, if there are HI, its last.

    Pointers take the HI columns that end at D, though some are in LO too, as that needs no mask: whoever they are
    multiplied with has zeros there. Descriptors take those from LO on and fill with zeros.
    """
    if TMA:
        b_lo = x.load([i_batch, i_head, i_row, 0]).reshape(ROWS, LO)
        b_hi = b_lo
        if HI:
            b_hi = x_hi.load([i_batch, i_head, i_row, LO]).reshape(ROWS, HI)
    else:
        p_rows = x + tl.cast(i_row, tl.int64) * stride
        b_lo = load_rows(p_rows, stride, rows - i_row, 0, 0, D, ROWS, LO, MASKED)
        b_hi = b_lo
        if HI:
            b_hi = load_rows(p_rows, stride, rows - i_row, D - HI, 0, D, ROWS, HI, MASKED)
    return b_lo, b_hi


@triton.jit
def image_head(i_batch, i_head, stride_b, stride_h, UNIT: tl.constexpr):
    """Where one head of an image starts."""
    stride_b, stride_h = in_elements(stride_b, UNIT), in_elements(stride_h, UNIT)
    return i_batch * stride_b + i_head * stride_h


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


class Plan(NamedTuple):
    """All of a launch but its tensors."""

    lse_shape: tuple[int, ...]
    grid: tuple[int]
    sizes: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    descriptors: tuple[tuple[dict[str, Any], dict[str, Any]], ...]

    def streams(self, *tensors: Tensor) -> list[tuple[Any, Any]]:
        """What kernels take of the tensors that they loop over: descriptors in blocks of LO and of HI columns, or the
        tensors, as pointers."""
        if not self.descriptors:
            return [(x, x) for x in tensors]
        pairs = zip(self.descriptors, tensors, strict=True)
        return [(descriptor(lo, x), descriptor(hi, x)) for (lo, hi), x in pairs]


@planned
def plan(
    kernel: str,
    block: str,
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    scale: float,
    segments: int | None,
    max_seqlen: int | None,
    streamed: tuple[tuple[int, ...], ...],
    aligned: bool,
) -> Plan:
    """How one of attention's kernels is launched on q, k, v of these strides.

    Args:
        block: the block size that programs are counted by, "BLOCK_M" or "BLOCK_N"; the kernel loops over the other.
        segments: how many are packed; None if the tensors are dense.
        streamed: strides of the tensors that the kernel loops over.
        aligned: whether they start at multiples of 16 bytes.
    """
    tokens, heads, head_dim = shape[-3:]
    packed = segments is not None
    images = segments if packed else shape[0]
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    # packed keys end inside the tensor, where a descriptor would fetch the next segment's, be they NaN
    strided = all(s > 0 and s * dtype.itemsize % 16 == 0 for x in streamed for s in x[:-1])
    tma = not packed and aligned and strided
    config = dict(select_for(kernel, dtype, device, tma, tokens=longest, head_dim=head_dim))
    lo = config.pop("LO", max(16, 1 << head_dim.bit_length() - 1))
    hi = 0 if head_dim <= lo else max(16, 1 << (head_dim - lo - 1).bit_length())
    blocks = -(-longest // config[block])
    unit, in_unit = in_units(dtype, *(stride for x in strides for stride in (0 if packed else x[0], x[-3], x[-2])))
    constants = {
        "UNIT": unit,
        "D": head_dim,
        "LO": lo,
        "HI": hi,
        "PACKED": packed,
        "SPLIT_TAIL": dtype != torch.float32,
        "NEGATED": scale < 0,
    }
    rows = config["BLOCK_N" if block == "BLOCK_M" else "BLOCK_M"]
    descriptors: tuple[Any, ...] = ()
    if config["TMA"]:
        dense = [images, heads, tokens, head_dim]
        descriptors = tuple(
            tuple(
                descriptor_fields(dtype, dense, (x[0], x[2], x[1], 1), [1, 1, rows, width]) for width in (lo, hi or lo)
            )
            for x in streamed
        )
    return Plan(
        (heads, tokens) if packed else (images, heads, tokens),
        (blocks * heads * images,),
        (
            tokens,
            longest,
            heads,
            # masked scores are -inf, which a factor of zero would turn into NaN; kernels multiply by its size
            max(abs(scale), 1e-30) * _LOG2_E,
            *in_unit,
        ),
        *split(config, constants),
        descriptors,
    )


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


def fused_qkv(dtype: torch.dtype, device: str, tokens: int, head_dim: int, packed: bool) -> tuple:
    """q, k, v as views of one projection of 13 crops with 16 heads, and the bounds of packed ones."""
    q, k, v = torch.randn(13, tokens, 3, 16, head_dim, dtype=dtype, device=device).unbind(2)
    if not packed:
        return q, k, v, None, None
    bounds = torch.arange(14, dtype=torch.int32, device=device) * tokens
    return *(x.flatten(0, 1) for x in (q, k, v)), bounds, tokens


def _example(
    dtype: torch.dtype, device: str, tokens: int, head_dim: int, packed: bool = False
) -> Callable[[], tuple[Tensor, Tensor]]:
    q, k, v, bounds, longest = fused_qkv(dtype, device, tokens, head_dim, packed)
    return lambda: attention_fwd(q, k, v, head_dim**-0.5, bounds, longest)


def _cost(size: int, tokens: int, head_dim: int) -> tuple[float, float]:
    heads = 13 * 16
    return 4 * heads * tokens**2 * head_dim, 4 * heads * tokens * head_dim * size


# of float32, whose products are unrolled multiply-adds: larger blocks are thousands of instructions, and spill
WIDE_CANDIDATES = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "TMA": False, "num_warps": warps, "num_stages": 1}
    for m, n, warps in ((32, 32, 8), (32, 32, 4), (32, 64, 8), (64, 32, 8))
)

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
