"""Native kernels against the reference in float64 on random shapes, strides, offsets and segment layouts.

`HYPOTHESIS_PROFILE=thorough` tries 400 examples of each property instead of 40.
"""

from __future__ import annotations

import itertools

import native_calls as native
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import vlmkern
from vlmkern import ops
from vlmkern.ops._algebra import ACTIVATIONS

pytestmark = pytest.mark.skipif(not vlmkern.backends()["native"]["available"], reason="no native backend")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@st.composite
def strided(draw, shape, dtype):
    """A tensor of the shape inside a larger one, at an offset, filled with NaN around it. Its last stride is 1, unless
    it has one dimension."""
    before = [draw(st.integers(0, 2)) for _ in shape]
    after = [draw(st.integers(0, 2)) for _ in shape]
    order = draw(st.permutations(range(len(shape) - 1)))
    outer = [b + n + a for b, n, a in zip(before, shape, after, strict=True)]
    stored = torch.full([outer[i] for i in order] + outer[-1:], torch.nan, dtype=dtype)
    view = stored.permute([order.index(i) for i in range(len(order))] + [len(order)])
    view = view[tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))]
    if len(shape) == 1:
        step = draw(st.integers(1, 3))
        view = torch.full([before[0] + shape[0] * step], torch.nan, dtype=dtype)[before[0] :: step]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return view.copy_(torch.randn(shape, generator=generator))


def exact(tensors):
    """Dense, in float64."""
    return [x if x is None else x.detach().to(torch.float64).contiguous() for x in tensors]


def compare(function, dtype, *inputs):
    with vlmkern.use_backend("native"):
        actual = function(*inputs)
    with vlmkern.use_backend("reference"):
        expected = function(*exact(inputs))
    close(actual, expected, dtype)


def compare_gradients(function, grad, *inputs):
    """By the inputs, which keep their strides: the native backward against the reference in float64."""

    def gradients(inputs, grad):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad)

    with vlmkern.use_backend("native"):
        actual = gradients(inputs, grad)
    with vlmkern.use_backend("reference"):
        expected = gradients(exact(inputs), *exact([grad]))
    for a, e in zip(actual, expected, strict=True):
        close(a, e, a.dtype)


def compare_attention_gradients(tensors, data, *segments):
    """From the same saved result, whose rounding in low precision is the forward's: float64 tells the rest."""
    grad, q, k, v = tensors
    # larger scales saturate the softmax, where the terms of a gradient cancel in any float32
    scale = data.draw(st.sampled_from([1.0, -0.5, 0.0])) * q.shape[-1] ** -0.5
    last = (scale, *(segments or (None, None)))
    saved = (grad, q, k, v, *native.attention(q, k, v, *last))
    expected = attention_gradients(*exact(saved[:5]), scale, *segments[:1])
    for a, e in zip(native.attention_bwd(*saved, *last), expected, strict=True):
        close(a, e, a.dtype)


def attention_gradients(grad, q, k, v, out, scale, bounds=None):
    """dS = P * (dO V^T - rowsum(dO * O)) with O as it was saved."""
    found = tuple(torch.zeros_like(q) for _ in range(3))
    images = range(len(q)) if bounds is None else itertools.starmap(slice, itertools.pairwise(bounds.tolist()))
    for rows in images:
        d_out, query, key, value, o = (t[rows].transpose(0, 1) for t in (grad, q, k, v, out))
        p = (scale * query @ key.mT).softmax(-1)
        ds = p * (d_out @ value.mT - (d_out * o).sum(-1, keepdim=True)) * scale
        for result, gradient in zip(found, (ds @ key, ds.mT @ query, p.mT @ d_out), strict=True):
            result[rows] = gradient.transpose(0, 1)
    return found


def close(actual, expected, dtype):
    assert actual.shape == expected.shape and actual.is_contiguous() and actual.dtype == dtype
    scale = expected.abs().max().clamp(min=1.0) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=LIMITS[dtype])


@given(st.data(), DTYPES, st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 3), st.integers(1, 90)))
def test_attention_dense(data, dtype, shape):
    q, k, v = (data.draw(strided(shape, dtype)) for _ in range(3))
    scale = data.draw(st.sampled_from([None, 0.3, -0.4, 0.0]))
    compare(lambda q, k, v: ops.attention(q, k, v, scale=scale), dtype, q, k, v)


@given(st.data(), DTYPES, st.lists(st.integers(0, 50), max_size=6), st.integers(1, 3), st.integers(1, 90))
def test_attention_packed(data, dtype, lengths, heads, dim):
    q, k, v = (data.draw(strided((sum(lengths), heads, dim), dtype)) for _ in range(3))
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths, default=0)
    compare(lambda q, k, v: ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=longest), dtype, q, k, v)


@given(st.data(), DTYPES, st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 3), st.integers(1, 90)))
def test_attention_gradients_dense(data, dtype, shape):
    compare_attention_gradients([data.draw(strided(shape, dtype)) for _ in range(4)], data)


@given(st.data(), DTYPES, st.lists(st.integers(0, 170), max_size=6), st.integers(1, 3), st.integers(1, 90))
def test_attention_gradients_packed(data, dtype, lengths, heads, dim):
    tensors = [data.draw(strided((sum(lengths), heads, dim), dtype)) for _ in range(4)]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    compare_attention_gradients(tensors, data, bounds, max(lengths, default=0))


@given(st.data(), DTYPES, st.integers(0, 20), st.integers(1, 40), st.integers(1, 40), st.sampled_from(ACTIVATIONS))
def test_linear_gradients(data, dtype, rows, inputs, outputs, activation):
    assume(rows > 0)
    x, weight, bias, grad = (
        data.draw(strided(shape, dtype)) for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    compare_gradients(lambda x, w, b: ops.linear(x, w, b, activation=activation), grad, x, weight, bias)


@given(st.data(), DTYPES, st.integers(1, 4), st.integers(1, 150), st.integers(1, 40), st.booleans())
def test_linear_few_rows(data, dtype, rows, inputs, outputs, bias):
    x, weight = data.draw(strided((rows, inputs), dtype)), data.draw(strided((outputs, inputs), dtype))
    b = data.draw(strided((outputs,), dtype)) if bias else None
    compare(ops.linear, dtype, x, weight, b)


@given(st.data(), DTYPES, st.integers(5, 20), st.integers(1, 40), st.integers(1, 40), st.sampled_from(ACTIVATIONS))
def test_linear_many_rows(data, dtype, rows, inputs, outputs, activation):
    x, weight, bias, residual = (
        data.draw(strided(shape, dtype)) for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    compare(lambda x, w, b, r: ops.linear(x, w, b, activation=activation, residual=r), dtype, x, weight, bias, residual)


@given(st.data(), DTYPES, st.integers(0, 20), st.integers(1, 20), st.integers(1, 70), st.booleans())
def test_swiglu_mlp(data, dtype, rows, inputs, features, biases):
    x = data.draw(strided((rows, inputs), dtype))
    w_up, w_down = data.draw(strided((2 * features, inputs), dtype)), data.draw(strided((7, features), dtype))
    b_up, b_down = (data.draw(strided((len(w),), dtype)) if biases else None for w in (w_up, w_down))
    with vlmkern.use_backend("native"):
        actual = ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down)
    x, w_up, w_down, b_up, b_down = exact((x, w_up, w_down, b_up, b_down))
    value, gate = torch.nn.functional.linear(x, w_up, b_up).chunk(2, dim=-1)
    hidden = gate * gate.sigmoid() * value
    expected = torch.nn.functional.linear(hidden, w_down, b_down)
    # hidden values may cancel, so the errors of four roundings and of float32's sums are parts of their sizes; a
    # rounding of the gate shows in its silu up to twice
    sizes = torch.nn.functional.linear(hidden.abs(), w_down.abs(), None if b_down is None else b_down.abs())
    of_sizes = 4 * torch.finfo(dtype).eps + (inputs + features) * torch.finfo(torch.float32).eps
    assert actual.shape == expected.shape and actual.is_contiguous() and actual.dtype == dtype
    assert ((actual.double() - expected).abs() <= of_sizes * sizes + 1e-6).all()


@given(
    st.data(),
    DTYPES,
    st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
def test_attention_pool(data, dtype, tiles_and_grid, window, heads_and_dims, layers, with_mask, with_keep):
    if "attention_pool" not in vlmkern.backends()["native"]["ops"]:
        pytest.skip("no native kernel")
    (tiles, *grid), (heads, key_dim, value_dim) = tiles_and_grid, heads_and_dims
    patches, channels = grid[0] * grid[1], data.draw(st.integers(1, 40))
    features = [data.draw(strided((tiles, patches, channels), dtype)) for _ in range(layers)]
    width = channels * layers
    w_q, w_kv, w_o, pad_embed = (
        data.draw(strided(shape, dtype))
        for shape in (
            (heads * key_dim, width),
            (heads * (key_dim + value_dim), width),
            (5, heads * value_dim),
            (2, width),
        )
    )
    b_q, b_kv, b_o = (data.draw(strided((w.shape[0],), dtype)) for w in (w_q, w_kv, w_o))
    values = torch.tensor([1.0, 0.0, 0.37, 0.999, -1.0])
    mask = values[data.draw(st.lists(st.integers(0, 4), min_size=tiles * patches, max_size=tiles * patches))]
    windows = tiles * -(-grid[0] // window[0]) * -(-grid[1] // window[1])
    assume(windows or not with_keep)
    keep = torch.tensor(data.draw(st.lists(st.integers(0, max(windows - 1, 0)), max_size=8)), dtype=torch.int64)

    w_q, w_kv = w_q.mul_(width**-0.5), w_kv.mul_(width**-0.5)

    def call(w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed, *features):
        return ops.attention_pool(
            features,
            w_q,
            b_q,
            w_kv,
            b_kv,
            w_o,
            b_o,
            grid=tuple(grid),
            num_heads=heads,
            window=window,
            pad_embed=pad_embed,
            mask=mask.view(tiles, patches) if with_mask else None,
            keep=keep if with_keep else None,
        )

    try:
        compare(call, dtype, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed if with_mask else None, *features)
    except vlmkern.BackendUnavailable as declined:
        assert "attention_pool" in str(declined)
