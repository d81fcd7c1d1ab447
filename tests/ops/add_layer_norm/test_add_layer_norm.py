"""`vlmkern.ops.add_layer_norm`: numbers, gradients, registration, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops

OP = torch.ops.vlmkern.add_layer_norm.default


def eager(x, residual=None, weight=None, bias=None, eps=1e-6):
    summed = x if residual is None else x + residual
    return F.layer_norm(summed, x.shape[-1:], weight, bias, eps), summed


def make(*shape, dtype=torch.float32):
    tensors = (torch.randn(shape), torch.randn(shape) * 3 + 1, torch.randn(shape[-1]), torch.randn(shape[-1]))
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("backend", op_backends("add_layer_norm"))
class TestNumbers:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 9), st.integers(1, 200), st.tuples(st.booleans(), st.booleans(), st.booleans()))
    def test_shapes(self, backend, rows, cols, present):
        x, residual, weight, bias = make(rows, cols)
        others = [t if there else None for t, there in zip((residual, weight, bias), present, strict=True)]
        with vlmkern.use_backend(backend):
            normed, summed = ops.add_layer_norm(x, *others)
        expected, expected_sum = eager(x, *others)
        torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(summed, expected_sum)

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision(self, backend, dtype):
        tensors = make(17, 1152, dtype=dtype)
        with vlmkern.use_backend(backend):
            normed, summed = ops.add_layer_norm(*tensors)
        assert normed.dtype == summed.dtype == dtype
        low_precision_close(summed, lambda t: eager(*(x.to(t) for x in tensors))[1])
        low_precision_close(normed, lambda t: eager(*(x.to(t) for x in tensors))[0])

    def test_statistics_are_those_of_the_rounded_sum(self, backend):
        x, residual, weight, bias = make(5, 64, dtype=torch.bfloat16)
        with vlmkern.use_backend(backend):
            normed, summed = ops.add_layer_norm(x, residual, weight, bias)
            again, _ = ops.add_layer_norm(summed, None, weight, bias)
        assert torch.equal(normed, again)

    @pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3)])
    def test_leading_dimensions(self, backend, lead):
        tensors = make(*lead, 20)
        with vlmkern.use_backend(backend):
            normed, summed = ops.add_layer_norm(*tensors)
        assert normed.shape == summed.shape == (*lead, 20)
        torch.testing.assert_close(normed, eager(*tensors)[0], rtol=1e-4, atol=1e-5)

    def test_strides(self, backend):
        x, residual = torch.randn(20, 6).T, torch.randn(6, 50)[:, 3:23]
        with vlmkern.use_backend(backend):
            weight, bias = torch.randn(40)[::2], torch.randn(1).expand(20)
            normed, summed = ops.add_layer_norm(x, residual, weight, bias)
            alone, _ = ops.add_layer_norm(x, None, None, None)
        assert normed.is_contiguous() and summed.is_contiguous() and alone.is_contiguous()
        expected = eager(*(t.double() for t in (x, residual, weight, bias)))
        torch.testing.assert_close(normed.double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(summed, x + residual)
        torch.testing.assert_close(alone, eager(x)[0], rtol=1e-4, atol=1e-5)

    def test_eps_and_rows_of_one_value(self, backend):
        x, residual, weight, bias = make(3, 7)
        x[1], residual[1] = 2.0, 1.0
        with vlmkern.use_backend(backend):
            for eps in (1e-6, 0.5):
                normed, _ = ops.add_layer_norm(x, residual, weight, bias, eps=eps)
                torch.testing.assert_close(normed, eager(x, residual, weight, bias, eps)[0], rtol=1e-4, atol=1e-5)
                assert torch.equal(normed[1], bias)

    def test_large_means(self, backend):
        """A variance as the difference of two sums would be lost in rounding."""
        x, residual, weight, bias = make(4, 256)
        with vlmkern.use_backend(backend):
            normed, _ = ops.add_layer_norm(x + 3000, residual, weight, bias)
        exact, _ = eager(*(t.double() for t in (x + 3000, residual, weight, bias)))
        torch.testing.assert_close(normed.double(), exact, rtol=1e-3, atol=2e-3)

    def test_nan_and_infinity_propagate(self, backend):
        x, residual, weight, bias = make(4, 33)
        x[0, 32], x[1, 0], residual[2, 5] = torch.nan, torch.inf, -torch.inf
        with vlmkern.use_backend(backend):
            normed, summed = ops.add_layer_norm(x, residual, weight, bias)
        assert normed[:3].isnan().all() and normed[3].isfinite().all()
        assert torch.equal(summed.nan_to_num(7), (x + residual).nan_to_num(7))

    def test_arguments_are_not_written_to(self, backend):
        tensors = make(5, 24)
        before = [t.clone() for t in tensors]
        with vlmkern.use_backend(backend):
            ops.add_layer_norm(*tensors)
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_without_residual_the_sum_is_x():
    x = torch.randn(3, 8)
    assert ops.add_layer_norm(x, None, None, None)[1] is x


def test_float64():
    tensors = make(4, 30, dtype=torch.float64)
    torch.testing.assert_close(ops.add_layer_norm(*tensors), eager(*tensors))


class TestGradients:
    @pytest.mark.parametrize("residual", [True, False])
    @pytest.mark.parametrize("affine", [True, False])
    def test_gradcheck(self, residual, affine):
        x, other, weight, bias = (t.requires_grad_() for t in make(3, 5, dtype=torch.float64))
        inputs = [x, *([other] if residual else []), *([weight, bias] if affine else [])]

        def run(*_):
            return ops.add_layer_norm(x, other if residual else None, *((weight, bias) if affine else (None, None)))

        assert torch.autograd.gradcheck(run, inputs)

    @pytest.mark.parametrize("trained", range(4))
    def test_partial_with_a_zero_stride_gradient(self, trained):
        tensors = make(6, 20)
        tensors[trained].requires_grad_()
        scale = torch.randn(20)
        normed, summed = ops.add_layer_norm(*tensors)
        ((normed * scale).sum() + summed.sum()).backward()
        actual, tensors[trained].grad = tensors[trained].grad, None
        normed, summed = eager(*tensors)
        ((normed * scale).sum() + summed.sum()).backward()
        torch.testing.assert_close(actual, tensors[trained].grad, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("used", [0, 1])
    def test_one_result_used(self, used):
        tensors = [t.requires_grad_() for t in make(6, 20)]
        actual = torch.autograd.grad(ops.add_layer_norm(*tensors)[used].square().sum(), tensors, allow_unused=True)
        expected = torch.autograd.grad(eager(*tensors)[used].square().sum(), tensors, allow_unused=True)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)

    def test_double_backward_raises(self):
        x, residual, weight, bias = make(3, 4)
        x.requires_grad_()
        normed, _ = ops.add_layer_norm(x, residual, weight, bias)
        (gradient,) = torch.autograd.grad(normed.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order"):
            gradient.sum().backward()


class TestRegistration:
    def test_opcheck(self):
        x, residual, weight, bias = (t.requires_grad_() for t in make(2, 3, 5))
        torch.library.opcheck(OP, (x, residual, weight, bias, 1e-6))
        torch.library.opcheck(OP, (x, None, weight, None, 1e-6))
        torch.library.opcheck(OP, (x.detach().transpose(0, 1), residual.detach().transpose(0, 1), None, None, 1e-6))

    def test_meta(self):
        normed, summed = ops.add_layer_norm(*(t.to("meta") for t in make(3, 4)))
        assert normed.shape == summed.shape == (3, 4)

    def test_autocast(self):
        tensors = make(6, 40)
        with torch.autocast("cpu", torch.bfloat16):
            normed, summed = ops.add_layer_norm(*tensors)
        expected, expected_sum = ops.add_layer_norm(*(t.bfloat16() for t in tensors))
        assert normed.dtype == torch.bfloat16
        assert torch.equal(normed, expected) and torch.equal(summed, expected_sum)

    def test_compile_fullgraph_without_recompiling(self):
        torch._dynamo.reset()
        _, _, weight, bias = make(1, 5)
        compiled = torch.compile(lambda x, y: ops.add_layer_norm(x + 1, y, weight, bias), fullgraph=True, dynamic=True)
        for rows in (2, 7, 30):
            x, y, _, _ = make(rows, 5)
            with torch.compiler.set_stance("fail_on_recompile" if rows == 30 else "default"):
                torch.testing.assert_close(compiled(x, y), eager(x + 1, y, weight, bias), rtol=1e-4, atol=1e-5)


def test_errors():
    x, residual, weight, bias = make(3, 4)
    cases = [
        ((x, residual[:2], weight, bias), ValueError, r"residual: got shape \[2, 4\], expected \[3, 4\]"),
        ((x, residual, weight[:3], bias), ValueError, r"weight: got shape \[3\], expected \[4\]"),
        ((x, residual, weight, bias[None]), ValueError, r"bias: got shape \[1, 4\]"),
        ((x, residual.double(), weight, bias), TypeError, "residual: got dtype torch.float64, expected torch.float32"),
        ((x, residual, weight.half(), bias), TypeError, "weight: got dtype torch.float16"),
        ((x.int(), None, None, None), TypeError, "x: got dtype torch.int32"),
        ((x[0, 0], None, None, None), ValueError, r"x: got shape \[\], expected \[..., C\]"),
        ((x, residual, weight, bias.to("meta")), ValueError, "bias: got device meta, expected cpu"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            ops.add_layer_norm(*arguments)
