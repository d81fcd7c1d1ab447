"""What attention's Triton kernels take beyond equal lengths and heads, in the interpreter: windows, fewer heads and
other lengths of keys, a cap; against float64 that shares no code with them."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from attention_forms import exact
from attention_kernels import agree, dense, gradients, tables, triton_backend, variant
from support import low_precision_close

from vlmkern import ops
from vlmkern.kernels.attention import scores
from vlmkern.kernels.blocks import operands

__all__ = ["triton_backend", "variant"]

# one form each, of sizes that leave parts of blocks: queries, keys, heads, heads of keys, head dimension, options
FORMS = {
    "causal": (67, 67, 1, 1, 72, {"causal": True}),
    "causal_end": (37, 103, 1, 1, 16, {"causal": True}),
    "causal_more_queries": (103, 37, 1, 1, 16, {"causal": True}),
    "causal_one_query": (1, 77, 4, 2, 24, {"causal": True}),
    "window": (70, 101, 1, 1, 16, {"window": (40, 7)}),
    "window_left": (101, 101, 1, 1, 16, {"window": (50, -1)}),
    "window_right": (101, 101, 1, 1, 16, {"window": (-1, 50)}),
    "window_narrow": (70, 101, 1, 1, 16, {"window": (3, 2)}),
    "window_beyond_all": (40, 50, 1, 1, 16, {"window": (2**40, 2**40)}),
    "causal_window": (70, 101, 1, 1, 16, {"causal": True, "window": (64, -1)}),
    "own_key": (65, 65, 1, 1, 16, {"window": (0, 0)}),
    "grouped": (35, 35, 4, 2, 80, {}),
    "one_head_of_keys": (20, 40, 3, 1, 40, {}),
    "grouped_window": (35, 90, 4, 2, 16, {"window": (33, 20)}),
    "lengths": (20, 101, 2, 2, 24, {}),
    "fewer_keys": (70, 3, 2, 2, 16, {}),
    "softcap": (53, 53, 1, 1, 24, {"softcap": 5.0}),
    "softcap_negative_scale": (50, 50, 1, 1, 16, {"softcap": 2.0, "scale": -0.3}),
    "wide_heads": (35, 70, 1, 1, 160, {"causal": True, "window": (30, -1)}),
    "everything": (34, 90, 4, 2, 72, {"softcap": 4.0, "causal": True, "window": (60, -1), "scale": 0.2}),
}


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


@pytest.mark.parametrize(
    "form, dtype",
    [*((form, torch.bfloat16) for form in LOW), ("everything", torch.float16)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_low_precision(variant, form, dtype):
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


@pytest.mark.parametrize("keys", [0, 3])
def test_queries_without_keys_give_zero(variant, keys):
    q, k, v = dense(37, keys or 1, 1, 1, 16)
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
    q, k, v = dense(20, 70, 2, 1, 24, batch=2)
    rotary, rotary_k = tables(20, 12), tables(70, 12)
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


def test_cap_far_beyond_the_scores(variant):
    """tanh of little is right to its own digits, as the cap multiplies what it lacks."""
    agree(*dense(20, 20, 1, 1, 16), {"softcap": 1e4})


def test_bitwise_repeatable(variant):
    q, k, v = dense(20, 40, 4, 2, 24)
    grad = torch.randn_like(q)
    options = {"causal": True, "softcap": 3.0, "rotary": tables(20, 12), "rotary_k": tables(40, 12)}
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
