"""What `vlmkern.ops.attention` takes beyond equal lengths and heads: causal, windows, fewer heads of keys, other
lengths, a cap, rotary; numbers, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from attention_forms import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def tables(*shape, generator=None):
    angles = 6 * torch.rand(*shape, generator=generator)
    return angles.cos(), angles.sin()


def dense(queries=13, keys=None, heads=4, heads_k=None, dim=16, batch=2, dtype=torch.float32):
    keys, heads_k = keys or queries, heads_k or heads
    q = torch.randn(batch, queries, heads, dim)
    k, v = torch.randn(batch, keys, 2, heads_k, dim).unbind(2)
    return tuple(t.to(dtype) for t in (q, k, v))


# one form each, of sizes that leave parts of blocks: queries, keys, heads, heads of keys, head dimension, options
FORMS = {
    "causal": (113, 113, 2, 2, 72, {"causal": True}),
    "causal_end": (37, 203, 2, 2, 64, {"causal": True}),
    "causal_more_queries": (203, 37, 2, 2, 64, {"causal": True}),
    "causal_one_query": (1, 77, 4, 2, 128, {"causal": True}),
    "window": (301, 301, 1, 1, 32, {"window": (40, 7)}),
    "window_left": (301, 301, 1, 1, 32, {"window": (100, -1)}),
    "window_right": (301, 301, 1, 1, 32, {"window": (-1, 100)}),
    "causal_window": (333, 400, 2, 1, 64, {"causal": True, "window": (64, -1)}),
    "own_key": (65, 65, 2, 2, 16, {"window": (0, 0)}),
    "one_query_window": (1, 200, 4, 2, 64, {"causal": True, "window": (31, -1)}),
    "grouped": (97, 97, 8, 2, 80, {}),
    "one_head_of_keys": (50, 60, 5, 1, 40, {}),
    "few_queries": (3, 130, 2, 2, 72, {}),
    "few_queries_by_heads": (1, 200, 6, 2, 128, {"scale": -0.1}),
    "few_queries_softcap": (1, 77, 4, 1, 256, {"softcap": 2.0}),
    "few_queries_odd_dim": (5, 65, 1, 1, 33, {}),
    "lengths": (64, 640, 4, 4, 96, {}),
    "fewer_keys": (130, 3, 2, 2, 72, {}),
    "softcap": (113, 113, 2, 2, 256, {"softcap": 5.0}),
    "softcap_causal": (200, 200, 4, 2, 64, {"softcap": 2.0, "causal": True, "window": (70, -1)}),
    "softcap_negative_scale": (50, 50, 2, 2, 64, {"softcap": 2.0, "scale": -0.3}),
    "everything": (150, 290, 6, 2, 72, {"softcap": 4.0, "causal": True, "window": (200, -1), "scale": 0.2}),
}


@pytest.mark.parametrize("backend", op_backends("attention"))
class TestNumbers:
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, backend, form):
        *sizes, options = FORMS[form]
        q, k, v = dense(*sizes)
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, **options)
        torch.testing.assert_close(out.double(), exact(q, k, v, **options)[0], **TOLERANCE)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision(self, backend, form, dtype):
        *sizes, options = FORMS[form]
        q, k, v = dense(*sizes, dtype=dtype)
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, **options)
        low_precision_close(out, lambda t: plain(q.to(t), k.to(t), v.to(t), **options))

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("width", ["half", "whole"])
    def test_rotary(self, backend, width, interleaved):
        q, k, v = dense(113, heads=4, heads_k=2, dim=80)
        cos, sin = tables(113, 40)
        if width == "whole":
            cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
        options = {"rotary": (cos, sin), "interleaved": interleaved}
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, **options)
        torch.testing.assert_close(out.double(), exact(q, k, v, **options)[0], **TOLERANCE)

    def test_rotary_by_image_and_of_keys(self, backend):
        q, k, v = dense(20, 70, dim=24)
        options = {"rotary": tables(2, 20, 12), "rotary_k": tables(70, 12), "causal": True}
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, **options)
        torch.testing.assert_close(out.double(), exact(q, k, v, **options)[0], **TOLERANCE)

    def test_rotary_rounds_to_the_dtype_as_transformers_does(self, backend):
        q, k, v = dense(60, dim=72, dtype=torch.bfloat16)
        cos, sin = tables(60, 36)

        def turn(x):
            wide, (first, second) = x.float(), x.float().chunk(2, -1)
            turned = torch.cat((-second, first), -1)
            whole = [t.repeat(1, 2)[:, None] for t in (cos, sin)]
            return (wide * whole[0] + turned * whole[1]).to(x.dtype)

        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, rotary=(cos, sin))
            before = ops.attention(turn(q), turn(k), v)
        # the same but where a rounding to bfloat16 falls on the other side
        assert (out.float() - before.float()).abs().max() <= 2e-2
        assert (out != before).float().mean() < 0.02

    def test_packed(self, backend):
        lengths, lengths_k = [5, 0, 64, 3, 0, 130], [9, 4, 64, 2, 0, 77]
        bounds, bounds_k = (
            torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths, lengths_k)
        )
        q, k, v = torch.randn(sum(lengths), 4, 72), *torch.randn(2, sum(lengths_k), 2, 72)
        options = {
            "cu_seqlens": bounds,
            "max_seqlen": 130,
            "cu_seqlens_k": bounds_k,
            "max_seqlen_k": 77,
            "causal": True,
            "rotary": tables(len(q), 36),
            "rotary_k": tables(len(k), 36),
        }
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, **options)
        torch.testing.assert_close(out.double(), exact(q, k, v, **options)[0], **TOLERANCE)

    @pytest.mark.parametrize("keys", [0, 3])
    def test_queries_without_keys_give_zero(self, backend, keys):
        q, k, v = dense(7, keys or 1)
        k, v = k[:, :keys], v[:, :keys]
        k[..., 0] = 1e4  # scores that would drown a mask that is added
        with vlmkern.use_backend(backend):
            out, lse = torch.ops.vlmkern.attention(q, k, v, 0.25, window_right=0)
        assert (out[:, : 7 - keys] == 0).all() and (lse[..., : 7 - keys] == -torch.inf).all()
        assert out.isfinite().all() and lse[..., 7 - keys :].isfinite().all()

    def test_log_sum_exp(self, backend):
        q, k, v = dense(90, 120, heads=4, heads_k=2, dim=64)
        cos, sin = tables(90, 32)
        cos_k, sin_k = tables(120, 32)
        with vlmkern.use_backend(backend):
            _, lse = torch.ops.vlmkern.attention(
                q, k, v, 0.125, None, None, None, None, 50, 0, 3.0, cos, sin, cos_k, sin_k, False
            )
        options = {"window": (50, 0), "softcap": 3.0, "rotary": (cos, sin), "rotary_k": (cos_k, sin_k)}
        torch.testing.assert_close(lse.double(), exact(q, k, v, scale=0.125, **options)[1], **TOLERANCE)

    def test_any_strides(self, backend):
        wide = torch.randn(2, 40, 3, 2, 48)
        q, k, v = (wide[:, :, i, :, 4:36].transpose(1, 2).transpose(1, 2) for i in range(3))
        cos, sin = (t[::2, 3:19] for t in tables(80, 20))
        images = tuple(t.expand(2, 40, 16) for t in tables(40, 16))
        for rotary in ((cos, sin), images):
            options = {"causal": True, "rotary": rotary}
            with vlmkern.use_backend(backend):
                out = ops.attention(q, k, v, **options)
            torch.testing.assert_close(out.double(), exact(q, k, v, **options)[0], **TOLERANCE)

    def test_what_a_query_does_not_see_does_not_matter(self, backend):
        q, k, v = dense(130, dim=64)
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, causal=True)
            k[:, 100:], v[:, 100:] = 1e4, -1e4
            changed = ops.attention(q, k, v, causal=True)
        assert torch.equal(out[:, :100], changed[:, :100])

    def test_large_scores(self, backend):
        q, k, v = (30 * t for t in dense(67, dim=64))
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, causal=True)
        torch.testing.assert_close(out.double(), exact(q, k, v, causal=True)[0], rtol=1e-3, atol=1e-2)

    def test_bitwise_repeatable(self, backend):
        q, k, v = dense(203, heads=4, heads_k=2, dim=72)
        options = {"causal": True, "softcap": 3.0, "rotary": tables(203, 36)}
        with vlmkern.use_backend(backend):
            assert torch.equal(ops.attention(q, k, v, **options), ops.attention(q, k, v, **options))


def plain(q, k, v, **options):
    """The exact result rounded to the dtype as torch's own attention rounds it: scores and weights too."""
    dtype = q.dtype
    if dtype is torch.float64:
        return exact(q, k, v, **options)[0]
    scale = options.get("scale", q.shape[-1] ** -0.5)
    groups = q.shape[2] // k.shape[2]
    query, key, value = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = (query @ key.mT) * scale
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    n, m = scores.shape[-2:]
    left, right = options.get("window", (-1, -1))
    if options.get("causal"):
        right = 0
    distance = torch.arange(m) - torch.arange(m - n, m)[:, None]
    hidden = torch.zeros(n, m, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    weights = scores.masked_fill(hidden, -torch.inf).float().softmax(-1).to(dtype)
    return (weights.masked_fill(hidden, 0) @ value).transpose(1, 2)


def gradients(q, k, v, grad, function):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.mark.parametrize("backend", op_backends("attention_bwd"))
class TestGradientNumbers:
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, backend, form):
        *sizes, options = FORMS[form]
        q, k, v = dense(*sizes)
        grad = torch.randn_like(q)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, **options))
        expected = gradients(*(t.double() for t in (q, k, v, grad)), lambda *t: exact(*t, **options)[0])
        for a, e in zip(actual, expected, strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("form", ["causal", "causal_window", "grouped", "lengths", "softcap_causal"])
    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision(self, backend, form, dtype):
        *sizes, options = FORMS[form]
        q, k, v = dense(*sizes, dtype=dtype)
        grad = torch.randn_like(q)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, **options))
        for i in range(3):
            low_precision_close(
                actual[i],
                lambda t, i=i: gradients(*(x.to(t) for x in (q, k, v, grad)), lambda *x: plain(*x, **options))[i],
            )

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rotary(self, backend, dtype, interleaved):
        q, k, v = dense(113, 140, heads=4, heads_k=2, dim=80, dtype=dtype)
        grad = torch.randn_like(q)
        options = {
            "rotary": tables(2, 113, 40),
            "rotary_k": tables(140, 40),
            "interleaved": interleaved,
            "causal": True,
        }
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, **options))
        expected = gradients(*(t.double() for t in (q, k, v, grad)), lambda *t: exact(*t, **options)[0])
        limit = 1e-4 if dtype is torch.float32 else 3e-2
        for a, e in zip(actual, expected, strict=True):
            assert (a.double() - e).abs().max() <= limit * e.abs().max()

    def test_packed(self, backend):
        bounds, bounds_k = torch.tensor([0, 5, 5, 69, 72]).int(), torch.tensor([0, 9, 13, 77, 77]).int()
        q, k, v = torch.randn(72, 4, 72), *torch.randn(2, 77, 2, 72)
        options = {"cu_seqlens": bounds, "max_seqlen": 64, "cu_seqlens_k": bounds_k, "max_seqlen_k": 64, "causal": True}
        options |= {"rotary": tables(72, 36), "rotary_k": tables(77, 36)}
        grad = torch.randn_like(q)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, **options))
        expected = gradients(*(t.double() for t in (q, k, v, grad)), lambda *t: exact(*t, **options)[0])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)

    def test_keys_that_no_query_sees_have_no_gradient(self, backend):
        q, k, v = dense(5, 40)
        with vlmkern.use_backend(backend):
            dq, dk, dv = gradients(q, k, v, torch.randn_like(q), lambda *t: ops.attention(*t, window=(3, 0)))
        assert (dk[:, :32] == 0).all() and (dv[:, :32] == 0).all() and (dk[:, 32:] != 0).all() and dq.isfinite().all()

    def test_queries_without_keys_have_no_gradient(self, backend):
        q, k, v = dense(90, 30)
        with vlmkern.use_backend(backend):
            found = gradients(q, k, v, torch.randn_like(q), lambda *t: ops.attention(*t, causal=True))
        assert (found[0][:, :60] == 0).all() and all(g.isfinite().all() for g in found)

    @pytest.mark.parametrize("factor", [5, 100])
    def test_large_scores(self, backend, factor):
        q, k, v = (factor * t for t in dense(70, heads=4, heads_k=2, dim=64))
        grad = torch.randn_like(q)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, causal=True))
        assert all(g.isfinite().all() for g in actual)
        if factor == 5:
            expected = gradients(*(t.double() for t in (q, k, v, grad)), lambda *t: exact(*t, causal=True)[0])
            for a, e in zip(actual, expected, strict=True):
                assert (a - e).abs().max() <= 1e-3 * e.abs().max()

    def test_bitwise_repeatable(self, backend):
        q, k, v = dense(203, heads=4, heads_k=2, dim=72)
        grad, options = torch.randn_like(q), {"causal": True, "softcap": 3.0, "rotary": tables(203, 36)}
        with vlmkern.use_backend(backend):
            first, again = (gradients(q, k, v, grad, lambda *t: ops.attention(*t, **options)) for _ in range(2))
        assert all(map(torch.equal, first, again))


class TestAutograd:
    @pytest.mark.parametrize(
        "options",
        [
            {"causal": True},
            {"window": (1, 2)},
            {"softcap": 1.5},
            {"rotary": tables(5, 2), "rotary_k": tables(7, 2)},
            {"rotary": tables(2, 5, 2), "rotary_k": tables(7, 2), "interleaved": True, "causal": True, "softcap": 2.0},
        ],
        ids=["causal", "window", "softcap", "rotary", "everything"],
    )
    def test_gradcheck(self, options):
        q, k, v = (t.double().requires_grad_() for t in dense(5, 7, heads=4, heads_k=2, dim=4))
        assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, scale=0.6, **options), (q, k, v))

    def test_opcheck(self):
        q, k, v = (t.requires_grad_() for t in dense(5, 7, heads=4, heads_k=2, dim=8))
        rest = (0.5, None, None, None, None, 3, 0, 2.0, *tables(5, 4), *tables(7, 4), False)
        torch.library.opcheck(torch.ops.vlmkern.attention.default, (q, k, v, *rest))

    def test_autocast_leaves_tables_alone(self):
        q, k, v = dense(9, dim=8)
        rotary = tables(9, 4)
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.attention(q, k, v, rotary=rotary)
        assert torch.equal(out, ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), rotary=rotary))

    def test_compile_fullgraph_without_recompiling(self):
        torch._dynamo.reset()

        def run(q, k, v, cos, sin):
            return ops.attention(q, k, v, causal=True, softcap=3.0, rotary=(cos, sin)) * 2

        compiled = torch.compile(run, fullgraph=True, dynamic=True)
        for tokens in (5, 9, 12):
            inputs = (*dense(tokens, heads=4, heads_k=2, dim=8), *tables(tokens, 4))
            with torch.compiler.set_stance("fail_on_recompile" if tokens == 12 else "default"):
                torch.testing.assert_close(compiled(*inputs), run(*inputs))

    def test_export(self):
        class Model(torch.nn.Module):
            def forward(self, q, k, v, cos, sin):
                return ops.attention(q, k, v, causal=True, window=(4, -1), rotary=(cos, sin))

        inputs = (*dense(9, heads=4, heads_k=2, dim=8), *tables(9, 4))
        exported = torch.export.export(Model(), inputs).module()
        torch.testing.assert_close(exported(*inputs), Model()(*inputs))

    def test_meta(self):
        q, k, v = (t.to("meta") for t in dense(5, 7, heads=4, heads_k=2))
        assert ops.attention(q, k, v, causal=True).shape == q.shape


@st.composite
def problems(draw):
    heads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim = 2 * draw(st.integers(1, 40))
    packed = draw(st.booleans())
    count = draw(st.integers(1, 4) if packed else st.integers(1, 2))
    lengths = [draw(st.integers(0, 70)) for _ in range(count)] if packed else [draw(st.integers(1, 150))] * count
    other = draw(st.booleans())
    lengths_k = lengths
    if other:
        lengths_k = [draw(st.integers(0, 70)) for _ in range(count)] if packed else [draw(st.integers(0, 200))] * count
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    total, total_k = sum(lengths), sum(lengths_k)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = randn(total, heads_k * group, dim), *randn(2, total_k, heads_k, dim)
    options = {
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "scale": draw(st.sampled_from([None, 0.2, -0.1])),
    }
    options["window"] = (draw(st.integers(-1, 90)), -1 if options["causal"] else draw(st.integers(-1, 90)))
    if draw(st.booleans()):
        options |= {"rotary": tables(total, dim // 2, generator=generator), "interleaved": draw(st.booleans())}
        if other:
            options["rotary_k"] = tables(total_k, dim // 2, generator=generator)
    if not packed:
        images = lambda t: t.unflatten(0, (count, -1)) if len(t) else t.new_empty(count, 0, *t.shape[1:])  # noqa: E731
        q, k, v = images(q), images(k), images(v)
        for name in ("rotary", "rotary_k"):
            if name in options:
                options[name] = tuple(images(t) for t in options[name])
        return q, k, v, options
    bounds, bounds_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)]).int() for n in (lengths, lengths_k))
    options |= {"cu_seqlens": bounds, "max_seqlen": max(lengths)}
    if other:
        options |= {"cu_seqlens_k": bounds_k, "max_seqlen_k": max(lengths_k)}
    return q, k, v, options


@pytest.mark.parametrize("backend", op_backends("attention_bwd"))
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_random_forms(backend, problem):
    q, k, v, options = problem
    grad = torch.randn_like(q)
    with vlmkern.use_backend(backend):
        out = ops.attention(q, k, v, **options)
        actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, **options))
    torch.testing.assert_close(out.double(), exact(q, k, v, **options)[0], **TOLERANCE)
    expected = gradients(*(t.double() for t in (q, k, v, grad)), lambda *t: exact(*t, **options)[0])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


class TestErrors:
    Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
    PACKED, PACKED_K = torch.randn(5, 4, 8), torch.randn(7, 2, 8)
    CU, CU_K = torch.tensor([0, 2, 5]).int(), torch.tensor([0, 3, 7]).int()

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((Q, K[:, :, :1].expand(2, 7, 3, 8), K), {}, ValueError, "k: got 3 heads, expected a divisor of q's 4"),
            ((Q, K[:, :, :0], K[:, :, :0]), {}, ValueError, "k: got 0 heads"),
            ((Q, K[..., :4], K[..., :4]), {}, ValueError, r"k: got shape \[2, 7, 2, 4\]"),
            ((Q, K, K[:, :5]), {}, ValueError, r"v: got shape \[2, 5, 2, 8\], expected \[2, 7, 2, 8\]"),
            ((Q, K.double(), K.double()), {}, TypeError, "k: got dtype torch.float64, expected torch.float32"),
            ((Q, K, K), {"causal": True, "window": (3, 1)}, ValueError, r"window: got \(3, 1\) with causal=True"),
            ((Q, K, K), {"window": (-2, 1)}, ValueError, "window: got -2 keys to the left"),
            ((Q, K, K), {"window": 3}, ValueError, r"window: got 3, expected \(left, right\)"),
            ((Q, K, K), {"softcap": -1.0}, ValueError, "softcap: got -1.0"),
            ((Q, K, K), {"softcap": float("nan")}, ValueError, "softcap: got nan"),
            ((Q, K, K), {"rotary": tables(5, 4)}, ValueError, "rotary_k: got None"),
            ((Q, Q, Q), {"rotary": tables(4, 4)}, ValueError, r"rotary: cos: got shape \[4, 4\], expected \[5, 4\]"),
            ((Q, Q, Q), {"rotary": tables(5, 3)}, ValueError, r"rotary: cos: got shape \[5, 3\]"),
            ((Q, Q, Q), {"rotary": tables(3, 5, 4)}, ValueError, r"rotary: cos: got shape \[3, 5, 4\]"),
            ((Q, Q, Q), {"rotary": (tables(5, 4)[0], tables(5, 8)[1])}, ValueError, r"rotary: sin: got shape \[5, 8\]"),
            (
                (Q, Q, Q),
                {"rotary": tuple(t.double() for t in tables(5, 4))},
                TypeError,
                "rotary: cos: got dtype torch.float64",
            ),
            (
                (Q, Q, Q),
                {"rotary": tuple(t.to("meta") for t in tables(5, 4))},
                ValueError,
                "rotary: cos: got device meta",
            ),
            ((Q, Q, Q), {"rotary": tables(5, 4)[0]}, ValueError, r"rotary: got Tensor, expected \(cos, sin\)"),
            (
                (Q, Q, Q),
                {"rotary": tuple(t.requires_grad_() for t in tables(5, 4))},
                ValueError,
                "rotary: got a cos that requires",
            ),
            ((Q, Q, Q), {"rotary_k": tables(5, 4)}, ValueError, "rotary: got None"),
            (
                (Q[..., :7],) * 3,
                {"rotary": tables(5, 3)},
                ValueError,
                "rotary: got a head dimension of 7, expected an even",
            ),
            ((Q, Q, Q), {"cu_seqlens_k": CU_K, "max_seqlen_k": 4}, ValueError, "cu_seqlens_k: got a tensor"),
            ((Q, Q, Q), {"max_seqlen_k": 4}, ValueError, "max_seqlen_k: got 4, expected None"),
            (
                (PACKED, PACKED_K, PACKED_K),
                {"cu_seqlens": CU, "max_seqlen": 3},
                ValueError,
                r"k: got shape \[7, 2, 8\]",
            ),
            (
                (PACKED, PACKED_K, PACKED_K),
                {"cu_seqlens": CU, "max_seqlen": 3, "cu_seqlens_k": CU_K},
                ValueError,
                "max_seqlen_k: got None",
            ),
            (
                (PACKED, PACKED_K, PACKED_K),
                {"cu_seqlens": CU, "max_seqlen": 3, "cu_seqlens_k": CU_K, "max_seqlen_k": 3},
                ValueError,
                "max_seqlen_k: got 3, expected at least the longest segment's length, 4",
            ),
            (
                (PACKED, PACKED_K, PACKED_K),
                {"cu_seqlens": CU, "max_seqlen": 3, "cu_seqlens_k": CU_K[:2], "max_seqlen_k": 7},
                ValueError,
                r"cu_seqlens_k: got shape \[2\], expected \[3\]",
            ),
            (
                (PACKED, PACKED_K, PACKED_K),
                {"cu_seqlens": CU, "max_seqlen": 3, "cu_seqlens_k": CU_K.long(), "max_seqlen_k": 7},
                TypeError,
                "cu_seqlens_k: got dtype torch.int64",
            ),
            (
                (PACKED, PACKED_K, PACKED_K),
                {"cu_seqlens": CU, "max_seqlen": 3, "cu_seqlens_k": CU, "max_seqlen_k": 7},
                ValueError,
                "cu_seqlens_k: got bounds from 0 to 5, expected from 0 to T_k = 7",
            ),
        ],
    )
    @pytest.mark.parametrize("backend", op_backends("attention"))
    def test_named(self, backend, arguments, options, error, message):
        with vlmkern.use_backend(backend), pytest.raises(error, match=message):
            ops.attention(*arguments, **options)

    @pytest.mark.parametrize(
        ("rest", "message"),
        [
            ((None, None, None, None, -5), "window: got -5 keys to the left"),
            ((None, None, None, None, -1, -2), "window: got -2 keys to the right"),
            ((None, None, None, None, -1, -1, float("inf")), "softcap: got inf"),
            ((None, None, None, None, -1, -1, 0.0, tables(5, 4)[0]), "rotary: got None"),
            ((None, None, None, None, -1, -1, 0.0, *tables(5, 4), tables(5, 4)[0]), "rotary_k: sin: got NoneType"),
            ((None, None, None, 4), "max_seqlen_k: got 4"),
        ],
    )
    def test_of_raw_calls(self, rest, message):
        with pytest.raises((ValueError, TypeError), match=message):
            torch.ops.vlmkern.attention(self.Q, self.Q, self.Q, 1.0, *rest)
