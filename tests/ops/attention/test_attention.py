"""`vlmkern.ops.attention`: numbers, gradients, registration, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops

OP = torch.ops.vlmkern.attention.default


def eager(q, k, v, scale=None):
    """An independent formulation: torch's own attention."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


def qkv_views(batch, tokens, heads, dim, dtype=torch.float32):
    return torch.randn(batch, tokens, 3, heads, dim).to(dtype).unbind(2)


@pytest.mark.parametrize("backend", op_backends("attention"))
class TestNumbers:
    @pytest.mark.parametrize("dim", [1, 8, 64, 72, 80, 96, 128])
    @pytest.mark.parametrize("tokens", [1, 3, 113, 203])
    def test_head_dims_and_lengths(self, backend, dim, tokens):
        q, k, v = qkv_views(2, tokens, 3, dim)
        with vlmkern.use_backend(backend):
            torch.testing.assert_close(ops.attention(q, k, v), eager(q, k, v), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("tokens", [729, 1025])
    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_at_real_lengths(self, backend, tokens, dtype):
        q, k, v = qkv_views(1, tokens, 2, 72, dtype)
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v)
        low_precision_close(out, lambda t: eager(q.to(t), k.to(t), v.to(t)))

    def test_scale(self, backend):
        q, k, v = qkv_views(1, 9, 2, 16)
        with vlmkern.use_backend(backend):
            torch.testing.assert_close(ops.attention(q, k, v, scale=0.7), eager(q, k, v, 0.7), rtol=1e-5, atol=1e-5)

    def test_packed_segments_do_not_bleed(self, backend):
        q, k, v = (torch.randn(12, 2, 72) for _ in range(3))
        bounds = [0, 5, 5, 6, 12]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=6)
            changed = ops.attention(q, k, torch.cat([v[:5], v[5:] + 100]), cu_seqlens=cu_seqlens, max_seqlen=6)
        for start, end in itertools.pairwise(bounds):
            expected = eager(q[None, start:end], k[None, start:end], v[None, start:end])[0]
            torch.testing.assert_close(out[start:end], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(out[:5], changed[:5])

    def test_any_strides_with_unit_last_stride(self, backend):
        wide = torch.randn(3, 4, 17, 2, 40)
        q, k, v = (wide[i, ::2, 1:, :, 3:35].transpose(1, 2).transpose(1, 2) for i in range(3))
        heads_first = torch.randn(2, 2, 16, 32).transpose(1, 2)
        shared = torch.randn(1, 16, 2, 32).expand(2, -1, -1, -1)
        with vlmkern.use_backend(backend):
            for arguments in ((q, k, v), (q, heads_first, shared)):
                torch.testing.assert_close(ops.attention(*arguments), eager(*arguments), rtol=1e-5, atol=1e-5)
                assert ops.attention(*arguments).is_contiguous()

    def test_large_scores_stay_finite(self, backend):
        q, k, v = (100 * t for t in qkv_views(1, 33, 2, 72))
        with vlmkern.use_backend(backend):
            torch.testing.assert_close(ops.attention(q, k, v), eager(q, k, v), rtol=1e-4, atol=1e-3)

    def test_nan_stays_in_its_row(self, backend):
        q, k, v = (t.contiguous() for t in qkv_views(2, 19, 2, 72))
        q[0, 3, 1] = float("nan")
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v)
        assert out[0, 3, 1].isnan().all()
        out[0, 3, 1] = 0
        assert out.isfinite().all()

    def test_bitwise_repeatable(self, backend):
        q, k, v = qkv_views(2, 203, 2, 72)
        with vlmkern.use_backend(backend):
            assert torch.equal(ops.attention(q, k, v), ops.attention(q, k, v))

    @pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
    def test_empty(self, backend, shape):
        q = torch.randn(shape)
        with vlmkern.use_backend(backend):
            assert ops.attention(q, q, q).shape == shape

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 3), st.sampled_from([8, 24, 72]))
    def test_packed_equals_dense(self, backend, lengths, heads, dim):
        total = sum(lengths)
        q, k, v = (torch.randn(total, heads, dim) for _ in range(3))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        with vlmkern.use_backend(backend):
            out = ops.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
            pieces = [
                ops.attention(*(p[None] for p in parts))[0]
                for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
            ]
        torch.testing.assert_close(out, torch.cat(pieces), rtol=1e-5, atol=1e-5)


def gradients(q, k, v, grad, function=ops.attention):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.mark.parametrize("backend", op_backends("attention_bwd"))
class TestGradientNumbers:
    @pytest.mark.parametrize("dim", [1, 8, 33, 64, 72, 80, 128])
    @pytest.mark.parametrize("tokens", [1, 3, 49, 113, 203])
    def test_head_dims_and_lengths(self, backend, dim, tokens):
        q, k, v = qkv_views(2, tokens, 3, dim)
        grad = torch.randn(2, tokens, 3, dim)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad)
        expected = gradients(*(t.double() for t in (q, k, v, grad)), eager)
        for a, e in zip(actual, expected, strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("tokens", [729, 1025])
    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_at_real_lengths(self, backend, tokens, dtype):
        q, k, v = qkv_views(1, tokens, 2, 72, dtype)
        grad = torch.randn(1, tokens, 2, 72).to(dtype)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad)
        for i in range(3):
            low_precision_close(actual[i], lambda t, i=i: gradients(*(x.to(t) for x in (q, k, v, grad)), eager)[i])

    @pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
    def test_scale(self, backend, scale):
        q, k, v = qkv_views(1, 9, 2, 16)
        grad = torch.randn(1, 9, 2, 16)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, scale=scale))
        expected = gradients(q, k, v, grad, lambda *t: eager(*t, scale))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_packed_equals_dense(self, backend, dtype):
        bounds = [0, 5, 5, 6, 156, 156]
        q, k, v, grad = (torch.randn(156, 2, 72).to(dtype) for _ in range(4))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad, lambda *t: ops.attention(*t, cu_seqlens=cu_seqlens, max_seqlen=150))
            for start, end in itertools.pairwise(bounds):
                alone = gradients(*(t[None, start:end] for t in (q, k, v, grad)))
                for a, e in zip(actual, alone, strict=True):
                    torch.testing.assert_close(a[start:end], e[0], rtol=1e-5, atol=1e-5)

    def test_any_strides_with_unit_last_stride(self, backend):
        wide = torch.randn(3, 4, 17, 2, 40)
        q, k, v = (wide[i, ::2, 1:, :, 3:35].transpose(1, 2).transpose(1, 2) for i in range(3))
        heads_first = torch.randn(2, 2, 16, 32).transpose(1, 2)
        shared = torch.randn(1, 16, 2, 32).expand(2, -1, -1, -1)
        columns = torch.randn(2, 16, 32, 2).mT
        ones = torch.ones(()).expand(2, 16, 2, 32)
        with vlmkern.use_backend(backend):
            for arguments in ((q, k, v, ones), (q, heads_first, shared, columns), (shared, q, k, heads_first)):
                expected = gradients(*arguments, eager)
                for a, e in zip(gradients(*arguments), expected, strict=True):
                    torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)

    def test_large_scores_stay_finite(self, backend):
        q, k, v = (4 * t for t in qkv_views(1, 33, 2, 72))
        grad = torch.randn_like(v)
        with vlmkern.use_backend(backend):
            actual = gradients(q, k, v, grad)
            assert all(g.isfinite().all() for g in gradients(100 * q, 100 * k, v, grad))
        exact = gradients(*(t.double() for t in (q, k, v, grad)), eager)
        for a, plain, e in zip(actual, gradients(q, k, v, grad, eager), exact, strict=True):
            assert (a - e).abs().max() <= 2 * (plain - e).abs().max() + 1e-6 * e.abs().max()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nan_and_infinity_spread_as_in_the_formula(self, backend, dtype, value):
        for place in range(4):
            tensors = [torch.randn(2, 19, 2, 72).to(dtype) for _ in range(4)]
            tensors[place][0, 3, 1, 5] = value
            with vlmkern.use_backend(backend):
                actual = gradients(*tensors)
            for a, e in zip(actual, gradients(*(t.double() for t in tensors), eager), strict=True):
                assert torch.equal(a.isfinite(), e.isfinite())

    def test_bitwise_repeatable(self, backend):
        q, k, v = qkv_views(2, 203, 2, 72)
        grad = torch.randn(2, 203, 2, 72)
        with vlmkern.use_backend(backend):
            assert all(map(torch.equal, gradients(q, k, v, grad), gradients(q, k, v, grad)))

    @pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
    def test_empty(self, backend, shape):
        q = torch.randn(shape)
        with vlmkern.use_backend(backend):
            assert all(g.shape == shape for g in gradients(q, q, q, q))


class TestGradients:
    def test_gradcheck_dense(self):
        inputs = [torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, scale=0.6), inputs)

    def test_gradcheck_packed(self):
        inputs = [torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        cu_seqlens = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
        assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, cu_seqlens=cu_seqlens, max_seqlen=7), inputs)

    def test_zero_stride_gradient_of_fused_qkv(self):
        qkv = torch.randn(2, 7, 3, 2, 8, dtype=torch.float64, requires_grad=True)
        ops.attention(*qkv.unbind(2)).sum().backward()
        actual, qkv.grad = qkv.grad, None
        eager(*qkv.unbind(2)).sum().backward()
        torch.testing.assert_close(actual, qkv.grad)

    def test_partial(self):
        q, k, v = (t.clone() for t in qkv_views(1, 5, 2, 8))
        v.requires_grad_()
        ops.attention(q, k, v).square().sum().backward()
        assert v.grad is not None and q.grad is None

    def test_double_backward_raises(self):
        q = torch.randn(1, 4, 1, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(ops.attention(q, q, q).square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order"):
            gradient.sum().backward()


class TestRegistration:
    def test_opcheck(self):
        dense = [torch.randn(2, 5, 3, 8, requires_grad=True) for _ in range(3)]
        torch.library.opcheck(OP, (*dense, 0.5, None, None))
        packed = [torch.randn(9, 3, 8, requires_grad=True) for _ in range(3)]
        torch.library.opcheck(OP, (*packed, 0.5, torch.tensor([0, 2, 9], dtype=torch.int32), 7))

    def test_meta(self):
        q = torch.empty(2, 5, 3, 8, device="meta")
        out = ops.attention(q, q, q)
        assert out.device.type == "meta" and out.shape == q.shape

    def test_autocast(self):
        q, k, v = qkv_views(1, 9, 2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.attention(q, k, v)
        assert torch.equal(out, ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))

    def test_compile_fullgraph_without_recompiling(self):
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v) * 2, fullgraph=True, dynamic=True)
        for tokens in (5, 9, 12):
            q, k, v = qkv_views(2, tokens, 2, 8)
            with torch.compiler.set_stance("fail_on_recompile" if tokens == 12 else "default"):
                torch.testing.assert_close(compiled(q, k, v), 2 * eager(q, k, v), rtol=1e-5, atol=1e-5)

    def test_compile_packed_backward(self):
        torch._dynamo.reset()
        cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
        inputs = [torch.randn(8, 2, 8, requires_grad=True) for _ in range(3)]

        def loss(q, k, v):
            return ops.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=5).square().sum()

        expected = torch.autograd.grad(loss(*inputs), inputs)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


class TestErrors:
    def test_shapes_dtypes_strides(self):
        q = torch.randn(2, 5, 3, 8)
        packed = torch.randn(5, 3, 8)
        cu = torch.tensor([0, 5], dtype=torch.int32)
        cases = [
            ((q[0], q[0], q[0]), {}, ValueError, r"q: got shape \[5, 3, 8\], expected \[B, N, H, D\]"),
            ((q, q[:1], q), {}, ValueError, r"k: got shape \[1, 5, 3, 8\]"),
            ((q, q[:, :4], q), {}, ValueError, r"v: got shape \[2, 5, 3, 8\], expected \[2, 4, 3, 8\]"),
            ((q, q[:, :, :2], q[:, :, :2]), {}, ValueError, "k: got 2 heads, expected a divisor of q's 3"),
            ((q, q, q[..., :4]), {}, ValueError, "v: got shape"),
            ((q, q.double(), q), {}, TypeError, "k: got dtype torch.float64, expected torch.float32"),
            ((q.int(), q.int(), q.int()), {}, TypeError, "q: got dtype torch.int32"),
            ((q.transpose(1, 3), q.transpose(1, 3), q.transpose(1, 3)), {}, ValueError, "q: got strides"),
            ((q, q, q), {"max_seqlen": 5}, ValueError, "max_seqlen: got 5, expected None"),
            ((packed,) * 3, {"cu_seqlens": cu}, ValueError, "max_seqlen: got None"),
            (
                (packed,) * 3,
                {"cu_seqlens": cu.long(), "max_seqlen": 5},
                TypeError,
                "cu_seqlens: got dtype torch.int64",
            ),
            ((q, q, q), {"cu_seqlens": cu, "max_seqlen": 5}, ValueError, r"expected \[T, H, D\]"),
            (
                (packed,) * 3,
                {"cu_seqlens": cu, "max_seqlen": 4},
                ValueError,
                "max_seqlen: got 4, expected at least",
            ),
            ((q[..., :0],) * 3, {}, ValueError, "head dimension"),
            ((q, q.to("meta"), q), {}, ValueError, "k: got device meta, expected cpu"),
        ]
        for arguments, options, error, message in cases:
            with pytest.raises(error, match=message):
                ops.attention(*arguments, **options)

    @pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 7, 5], [0, -1, 5], []])
    def test_bounds_are_checked_inside_the_op(self, bounds):
        packed = torch.randn(5, 2, 8)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens"):
            torch.ops.vlmkern.attention(packed, packed, packed, 1.0, cu_seqlens, 5)

    def test_not_a_tensor(self):
        with pytest.raises((TypeError, RuntimeError, AttributeError)):
            ops.attention([[1.0]], [[1.0]], [[1.0]])
