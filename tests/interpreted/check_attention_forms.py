"""What attention's Triton kernels take beyond equal lengths and heads, in the interpreter: windows, fewer heads and
other lengths of keys, a cap, rotary; against float64 that shares no code with them."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import pytest
import torch
import triton
import triton.language as tl
from attention_forms import exact
from support import LOW_PRECISION, low_precision_close

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch
from vlmkern.kernels.attention import rotary as kernels_rotary
from vlmkern.kernels.attention import scores
from vlmkern.kernels.blocks import operands

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
# wide blocks of what is looped over, and narrow ones
VARIANTS = {
    "pointers": SMALL | {"TMA": False},
    "descriptors": SMALL | {"TMA": True},
    "wide_rows": SMALL | {"BLOCK_M": 64, "BLOCK_N": 16, "TMA": False},
}
KERNELS = ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkv_kernel")


@pytest.fixture(autouse=True)
def triton_backend():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    with vlmkern.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=VARIANTS)
def variant(request):
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(_launch.forced(kernel, VARIANTS[request.param]))
        yield request.param


def tables(*shape):
    angles = 6 * torch.rand(*shape)
    return angles.cos(), angles.sin()


def dense(queries, keys, heads, heads_k, dim, batch=1, dtype=torch.float32):
    q = torch.randn(batch, queries, heads, dim)
    k, v = torch.randn(batch, keys, 2, heads_k, dim).unbind(2)
    return tuple(t.to(dtype) for t in (q, k, v))


# one form each, of sizes that leave parts of blocks: queries, keys, heads, heads of keys, head dimension, options
FORMS = {
    "causal": (67, 67, 2, 2, 72, {"causal": True}),
    "causal_end": (37, 103, 1, 1, 16, {"causal": True}),
    "causal_more_queries": (103, 37, 1, 1, 16, {"causal": True}),
    "causal_one_query": (1, 77, 4, 2, 24, {"causal": True}),
    "window": (131, 131, 1, 1, 16, {"window": (40, 7)}),
    "window_left": (131, 131, 1, 1, 16, {"window": (70, -1)}),
    "window_right": (131, 131, 1, 1, 16, {"window": (-1, 70)}),
    "window_narrow": (100, 131, 1, 1, 16, {"window": (3, 2)}),
    "window_beyond_all": (40, 50, 1, 1, 16, {"window": (2**40, 2**40)}),
    "causal_window": (133, 150, 2, 1, 16, {"causal": True, "window": (64, -1)}),
    "own_key": (65, 65, 1, 1, 16, {"window": (0, 0)}),
    "grouped": (40, 40, 6, 2, 80, {}),
    "one_head_of_keys": (50, 60, 5, 1, 40, {}),
    "grouped_window": (90, 90, 4, 2, 16, {"window": (33, 20)}),
    "lengths": (33, 140, 2, 2, 24, {}),
    "fewer_keys": (70, 3, 2, 2, 16, {}),
    "softcap": (53, 53, 1, 1, 24, {"softcap": 5.0}),
    "softcap_negative_scale": (50, 50, 1, 1, 16, {"softcap": 2.0, "scale": -0.3}),
    "wide_heads": (50, 70, 2, 1, 160, {"causal": True, "window": (30, -1)}),
    "everything": (70, 120, 6, 2, 72, {"softcap": 4.0, "causal": True, "window": (60, -1), "scale": 0.2}),
}


def gradients(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def agree(q, k, v, options, rtol=1e-5, atol=5e-6):
    """Result and gradients in float32 with float64's."""
    grad = torch.randn_like(q)
    torch.testing.assert_close(
        ops.attention(q, k, v, **options).double(), exact(q, k, v, **options)[0], rtol=rtol, atol=atol
    )
    found = gradients(lambda *t: ops.attention(*t, **options), (q, k, v), grad)
    expected = gradients(lambda *t: exact(*t, **options)[0], [t.double() for t in (q, k, v)], grad.double())
    for a, e in zip(found, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a.double(), e, rtol=10 * rtol, atol=10 * atol)


@pytest.mark.parametrize("form", FORMS)
def test_forms(variant, form):
    *sizes, options = FORMS[form]
    agree(*dense(*sizes), options)


def eager(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0):
    """As torch makes it in the dtype that it is given: products, scores and weights rounded."""
    groups = q.shape[2] // k.shape[2]
    query, key, value = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    products = (query @ key.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    products = softcap * (products / softcap).tanh() if softcap else products
    n, m = products.shape[-2:]
    behind = torch.arange(m) - torch.arange(m - n, m)[:, None]
    left, right = (2**62 if count < 0 else count for count in (window[0], 0 if causal else window[1]))
    weights = products.masked_fill((behind < -left) | (behind > right), -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


LOW = ("causal", "window", "window_narrow", "causal_window", "grouped_window", "fewer_keys", "wide_heads", "everything")


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(variant, dtype, form):
    """Of which blocks without edges have code of their own."""
    *sizes, options = FORMS[form]
    q, k, v = dense(*sizes, dtype=dtype)
    grad = torch.randn(q.shape).to(dtype)
    out = ops.attention(q, k, v, **options)
    low_precision_close(out, lambda t: eager(q.to(t), k.to(t), v.to(t), **options))
    found = gradients(lambda *t: ops.attention(*t, **options), (q, k, v), grad)

    def by(i, dtype):
        tensors = [x.to(dtype) for x in (q, k, v)]
        return gradients(lambda *t: eager(*t, **options), tensors, grad.to(dtype))[i]

    for i, gradient in enumerate(found):
        low_precision_close(gradient, lambda t, i=i: by(i, t))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim, width", [(16, 8), (72, 36), (80, 80), (10, 5), (96, 48)])
def test_rotary(variant, dim, width, interleaved):
    q, k, v = dense(40, 40, 4, 2, dim, batch=2)
    cos, sin = tables(40, dim // 2)
    if width == dim:
        cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    agree(q, k, v, {"rotary": (cos, sin), "interleaved": interleaved})


def test_rotary_by_image_of_keys_and_of_any_strides(variant):
    q, k, v = dense(20, 70, 2, 2, 24, batch=2)
    options = {"causal": True, "rotary_k": tuple(t[::2, 3:15] for t in tables(140, 20))}
    agree(q, k, v, options | {"rotary": tables(2, 20, 12)})
    cos, sin = tables(20, 12)
    agree(q, k, v, options | {"rotary": (cos.expand(2, 20, 12), sin.T.contiguous().T.expand(2, 20, 12)[..., :12])})


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_queries_and_keys_are_rounded_to_their_dtype(variant, interleaved):
    """As a model's own rotation is, before attention sees them."""
    q, k, v = dense(60, 60, 2, 1, 72, dtype=torch.bfloat16)
    cos, sin = tables(60, 36)
    angle = torch.complex(cos, sin)[:, None]

    def turn(x):
        pairs = x.float().unflatten(-1, (36, 2)) if interleaved else x.float().unflatten(-1, (2, 36)).mT
        product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
        return (product if interleaved else product.mT).flatten(-2).to(x.dtype)

    options = {"rotary": (cos, sin), "interleaved": interleaved}
    out, before = ops.attention(q, k, v, **options), ops.attention(turn(q), turn(k), v)
    # the same but where a rounding falls on the other side
    assert (out.float() - before.float()).abs().max() <= 2e-2 and (out != before).float().mean() < 0.02
    grad = torch.randn_like(q)
    found = gradients(lambda *t: ops.attention(*t, **options), (q, k, v), grad)
    expected = gradients(lambda *t: exact(*t, **options)[0], [t.double() for t in (q, k, v)], grad.double())
    for a, e in zip(found, expected, strict=True):
        assert (a.double() - e).abs().max() <= 3e-2 * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back(dtype, interleaved):
    x = torch.randn(2, 11, 3, 18)
    turn = kernels_rotary.tables_of(*tables(2, 11, 9), interleaved)
    there = kernels_rotary.turned(x, turn, torch.float32)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    assert (there - x).abs().max() > 0.1
    back = kernels_rotary.turned(there, turn, dtype, back=True)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


LENGTHS, LENGTHS_K = [5, 0, 40, 3, 7, 0, 70], [9, 4, 40, 2, 0, 0, 55]


def packed(lengths, lengths_k, heads=4, heads_k=2, dim=24):
    bounds, bounds_k = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths, lengths_k))
    q, k, v = torch.randn(sum(lengths), heads, dim), *torch.randn(2, sum(lengths_k), heads_k, dim)
    of_keys = {"cu_seqlens_k": bounds_k, "max_seqlen_k": max(lengths_k)}
    return q, k, v, {"cu_seqlens": bounds, "max_seqlen": max(lengths), **of_keys}


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (9, 4)}, {"causal": True, "window": (20, -1), "softcap": 3.0, "rotary": True}],
    ids=["lengths", "causal", "window", "everything"],
)
def test_packed(variant, options):
    q, k, v, bounds = packed(LENGTHS, LENGTHS_K)
    if "rotary" in options:
        options = options | {"rotary": tables(len(q), 12), "rotary_k": tables(len(k), 12)}
    agree(q, k, v, bounds | options)


def test_packed_of_equal_lengths(variant):
    q, k, v, bounds = packed(LENGTHS, LENGTHS)
    options = {key: bounds[key] for key in ("cu_seqlens", "max_seqlen")}
    agree(q, k, v, options | {"causal": True, "rotary": tables(len(q), 12)})


def test_packed_segments_of_keys_do_not_bleed(variant):
    q, k, v, bounds = packed(LENGTHS, LENGTHS_K)
    out = ops.attention(q, k, v, causal=True, **bounds)
    k[13:53], v[13:53] = torch.nan, torch.nan
    poisoned = ops.attention(q, k, v, causal=True, **bounds)
    assert torch.equal(poisoned[:5], out[:5]) and torch.equal(poisoned[45:], out[45:])
    assert poisoned[5:45].isnan().all()


@pytest.mark.parametrize("bounds_k", [[7, 9, 30], [0, 3, 60], [20, -(2**31), 40], [0, 15, 3], [0, 0, 0]])
def test_bounds_of_keys_are_not_trusted(variant, bounds_k):
    from vlmkern.kernels.attention import backward, forward

    q, grad = torch.randn(2, 40, 2, 24).unbind(0)
    k, v = torch.randn(2, 40, 1, 24).unbind(0)
    bounds = (torch.tensor([0, 18, 40], dtype=torch.int32), 30, torch.tensor(bounds_k, dtype=torch.int32), 25)
    out, lse = forward.attention_fwd(q, k, v, 0.3, *bounds, right=0)
    found = backward.attention_bwd(grad, q, k, v, out, lse, 0.3, *bounds, right=0)
    assert not lse.isnan().any() and all(x.isfinite().all() for x in (out, *found))


@pytest.mark.parametrize("keys", [0, 3])
def test_queries_without_keys_give_zero(variant, keys):
    q, k, v = dense(37, keys or 1, 2, 1, 16)
    k, v = k[:, :keys], v[:, :keys]
    # not even what times zero would be no number
    v[..., 3] = torch.inf
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = torch.ops.vlmkern.attention(*inputs, 0.25, window_right=0)
    assert (out[:, : 37 - keys] == 0).all() and (lse[..., : 37 - keys] == -torch.inf).all()
    assert lse[..., 37 - keys :].isfinite().all()
    v[..., 3] = 1.0
    out = ops.attention(*inputs, causal=True)
    dq, dk, dv = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert (dq[:, : 37 - keys] == 0).all() and all(g.isfinite().all() for g in (dq, dk, dv))


def test_keys_that_no_query_sees_have_no_gradient(variant):
    q, k, v = dense(5, 80, 2, 2, 16)
    dq, dk, dv = gradients(lambda *t: ops.attention(*t, window=(3, 0)), (q, k, v), torch.randn_like(q))
    assert (dk[:, :72] == 0).all() and (dv[:, :72] == 0).all() and (dk[:, 72:] != 0).all() and dq.isfinite().all()


def test_log_sum_exp(variant):
    q, k, v = dense(50, 70, 4, 2, 24, batch=2)
    rotary, rotary_k = tables(50, 12), tables(70, 12)
    _, lse = torch.ops.vlmkern.attention(q, k, v, 0.125, None, None, None, None, 30, 0, 3.0, *rotary, *rotary_k, False)
    options = {"window": (30, 0), "softcap": 3.0, "rotary": rotary, "rotary_k": rotary_k}
    torch.testing.assert_close(lse.double(), exact(q, k, v, scale=0.125, **options)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e12])
def test_scores_far_beyond_the_cap(variant, size):
    """tanh is 1, its slope 0, on both sides."""
    q, k, v = dense(40, 40, 1, 1, 16)
    options = {"softcap": 2.0, "causal": True}
    out = ops.attention(q * size, k * size, v, **options)
    torch.testing.assert_close(out.double(), exact(q * size, k * size, v, **options)[0], rtol=1e-5, atol=1e-5)
    found = gradients(lambda *t: ops.attention(*t, **options), (q * size, k * size, v), torch.randn_like(q))
    assert all(g.isfinite().all() for g in found)


def test_bitwise_repeatable(variant):
    q, k, v = dense(67, 90, 4, 2, 24)
    grad = torch.randn_like(q)
    options = {"causal": True, "softcap": 3.0, "rotary": tables(67, 12), "rotary_k": tables(90, 12)}
    first, again = (gradients(lambda *t: ops.attention(*t, **options), (q, k, v), grad) for _ in range(2))
    assert all(map(torch.equal, first, again))


@triton.jit
def visits_kernel(
    p_visits, p_masked, rows, columns, before, after, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr
):
    """How often a block of rows comes to each column, and how often with a mask; columns are no more than 1024."""
    window = operands.Window(rows, columns, before, after)
    i_block = tl.program_id(0)
    span = scores.span_of(i_block * ROWS, window, ROWS, COLUMNS, SPLIT)
    p_visits += i_block * 1024
    p_masked += i_block * 1024
    for i_column in range(span.whole, span.whole_end, COLUMNS):
        p = p_visits + i_column + tl.arange(0, COLUMNS)
        tl.store(p, tl.load(p) + 1)
    for i_edge in range(span.edges, span.end, COLUMNS):
        p = scores.edge_column(i_edge, span, window) + tl.arange(0, COLUMNS)
        tl.store(p_visits + p, tl.load(p_visits + p) + 1)
        tl.store(p_masked + p, tl.load(p_masked + p) + 1)


@pytest.mark.parametrize("rows, columns", [(70, 70), (50, 110), (110, 50), (1, 64), (64, 1)])
@pytest.mark.parametrize("sizes", [(16, 32), (64, 16)])
def test_blocks_that_are_visited(rows, columns, sizes):
    """Once where a row sees a column, without a mask only where each row sees each of a block's columns, and where none
    sees any, not at all."""
    block, width = sizes
    blocks = -(-rows // block)
    for before, after in itertools.product((None, 0, 5, 40), repeat=2):
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        distance = column - (row + columns - rows)
        sees = (distance >= -(2**30 if before is None else before)) & (distance <= (2**30 if after is None else after))
        padded = torch.zeros(blocks * block, 1024, dtype=torch.bool)
        padded[:rows, :columns] = sees
        some = padded.unflatten(0, (blocks, block)).unflatten(-1, (-1, width)).any(-1).any(1)
        for split in (True, False):
            visits, masked = torch.zeros(2, blocks, 1024, dtype=torch.int32).unbind(0)
            visits_kernel[(blocks,)](visits, masked, rows, columns, before, after, block, width, split)
            visits, masked = (t.unflatten(-1, (-1, width))[..., 0] for t in (visits, masked))
            assert torch.equal(visits, some.int()), (before, after, split)
            for i in range(blocks):
                of_block = sees[i * block : (i + 1) * block]
                whole = [
                    (c + 1) * width <= columns and bool(of_block[:, c * width : (c + 1) * width].all())
                    for c in range(visits.shape[1])
                ]
                expected = visits[i] * torch.tensor([not (w and split) for w in whole]).int()
                assert torch.equal(masked[i], expected), (before, after, split)
