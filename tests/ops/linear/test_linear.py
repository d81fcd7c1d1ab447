"""`vlmkern.ops.linear`: numbers for few rows and many, epilogues, gradients, packed weights, registration, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops

OP = torch.ops.vlmkern.linear.default
EAGER = {
    "none": lambda y: y,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}


def eager(x, weight, bias=None, activation="none", residual=None):
    y = EAGER[activation](x @ weight.T + (0 if bias is None else bias))
    return y if residual is None else y + residual


def make(rows, inputs, outputs, dtype=torch.float32):
    tensors = (
        torch.randn(rows, inputs),
        torch.randn(outputs, inputs) * inputs**-0.5,
        torch.randn(outputs),
        torch.randn(rows, outputs),
    )
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("backend", op_backends("linear"))
class TestNumbers:
    @settings(max_examples=80, deadline=None)
    @given(
        st.integers(1, 9),
        st.integers(1, 200),
        st.integers(1, 70),
        st.sampled_from(list(EAGER)),
        st.booleans(),
        st.booleans(),
    )
    def test_shapes(self, backend, rows, inputs, outputs, activation, with_bias, with_residual):
        x, weight, bias, residual = make(rows, inputs, outputs)
        bias, residual = bias if with_bias else None, residual if with_residual else None
        with vlmkern.use_backend(backend):
            y = ops.linear(x, weight, bias, activation=activation, residual=residual)
        torch.testing.assert_close(y, eager(x, weight, bias, activation, residual), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 40])
    def test_low_precision(self, backend, dtype, rows):
        x, weight, bias, residual = make(rows, 1152, 96, dtype)
        with vlmkern.use_backend(backend):
            y = ops.linear(x, weight, bias, activation="gelu_tanh", residual=residual)
        low_precision_close(
            y, lambda t: F.gelu(F.linear(x.to(t), weight.to(t), bias.to(t)), approximate="tanh") + residual.to(t)
        )

    @pytest.mark.parametrize("rows", [1, 3, 12])
    def test_strides(self, backend, rows):
        x, weight = torch.randn(40, rows).T, torch.randn(9, 80)[:, 5:45]
        residual = torch.randn(9, rows).T
        with vlmkern.use_backend(backend):
            for bias in (torch.randn(18)[::2], torch.randn(1).expand(9), None):
                for w in (weight, torch.randn(40, 9).T):
                    y = ops.linear(x, w, bias, residual=residual)
                    assert y.is_contiguous()
                    expected = eager(*(None if t is None else t.double() for t in (x, w, bias)), residual=residual)
                    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)

    def test_arguments_are_not_written_to(self, backend):
        for rows in (2, 12):
            tensors = make(rows, 16, 9)
            before = [t.clone() for t in tensors]
            with vlmkern.use_backend(backend):
                ops.linear(*tensors[:3], activation="silu", residual=tensors[3])
                ops.linear(*tensors[:3], residual=tensors[3])
            assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))

    def test_nan_and_infinity_propagate(self, backend):
        x, weight, _, _ = make(3, 33, 8)
        x[0, 32], x[1, 0] = torch.nan, torch.inf
        with vlmkern.use_backend(backend):
            y = ops.linear(x, weight)
        assert y[0].isnan().all() and y[1].isinf().all() and y[2].isfinite().all()

    def test_threads_change_no_bit(self, backend):
        x, weight, bias, _ = make(2, 2048, 512)
        threads = torch.get_num_threads()
        try:
            with vlmkern.use_backend(backend):
                torch.set_num_threads(1)
                one = ops.linear(x, weight, bias)
                torch.set_num_threads(2)
                two = ops.linear(x, weight, bias)
        finally:
            torch.set_num_threads(threads)
        assert backend == "reference" or torch.equal(one, two)


def test_empty():
    x, weight, bias, _ = make(0, 16, 9)
    assert ops.linear(x, weight, bias, activation="silu").shape == (0, 9)
    assert ops.linear(torch.randn(2, 3, 0), torch.randn(4, 0), torch.ones(4)).eq(1).all()
    assert ops.linear(torch.randn(2, 3), torch.randn(0, 3)).shape == (2, 0)


class TestGradients:
    @pytest.mark.parametrize("activation", list(EAGER))
    def test_gradcheck(self, activation):
        tensors = [t.requires_grad_() for t in make(3, 4, 5, torch.float64)]
        assert torch.autograd.gradcheck(
            lambda x, w, b, r: ops.linear(x, w, b, activation=activation, residual=r), tensors
        )

    @pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
    @pytest.mark.parametrize("rows", [1, 3, 60])
    @pytest.mark.parametrize("backend", op_backends("linear_bwd"))
    def test_backends_agree_with_float64(self, backend, rows, activation):
        tensors = make(rows, 72, 45)

        def gradients(dtype):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            y = ops.linear(*leaves[:3], activation=activation, residual=leaves[3])
            return torch.autograd.grad(y.square().sum(), leaves)

        with vlmkern.use_backend(backend):
            actual = gradients(torch.float32)
        for a, e in zip(actual, gradients(torch.float64), strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("trained", range(4))
    def test_partial_with_a_zero_stride_gradient(self, trained):
        tensors = make(12, 6, 5)
        tensors[trained].requires_grad_()
        x, w, b, r = tensors
        ops.linear(x, w, b, activation="silu", residual=r).sum().backward()
        actual, tensors[trained].grad = tensors[trained].grad, None
        eager(x, w, b, "silu", r).sum().backward()
        torch.testing.assert_close(actual, tensors[trained].grad, rtol=1e-4, atol=1e-5)

    def test_double_backward_raises(self):
        x, w, _, _ = make(3, 4, 5)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(ops.linear(x, w).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order"):
            gradient.sum().backward()


class TestRegistration:
    def test_opcheck(self):
        for rows in (3, 12):
            x, w, b, r = (t.requires_grad_() for t in make(rows, 4, 5))
            torch.library.opcheck(OP, (x, w, b, "gelu_tanh", r))
            torch.library.opcheck(OP, (x, w, None, "none", None))

    def test_meta(self):
        x, w, b, r = (t.to("meta") for t in make(3, 4, 5))
        assert ops.linear(x, w, b, residual=r).shape == (3, 5)

    def test_autocast(self):
        tensors = make(12, 16, 5)
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.linear(*tensors[:3], residual=tensors[3])
        x, w, b, r = (t.bfloat16() for t in tensors)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, ops.linear(x, w, b, residual=r), rtol=0.01, atol=0.01)

    def test_compile_fullgraph_without_recompiling(self):
        torch._dynamo.reset()
        _, w, b, _ = make(1, 4, 5)
        compiled = torch.compile(lambda x: ops.linear(x + 1, w, b, activation="gelu"), fullgraph=True, dynamic=True)
        for rows in (2, 7, 30):
            x = torch.randn(rows, 4)
            with torch.compiler.set_stance("fail_on_recompile" if rows == 30 else "default"):
                torch.testing.assert_close(compiled(x), eager(x + 1, w, b, "gelu"), rtol=1e-4, atol=1e-5)


def test_errors():
    x, w, b, r = make(3, 4, 5)
    cases = [
        ((x, w[:, :3]), {}, ValueError, r"weight: got shape \[5, 3\], expected \[5, 4\]"),
        ((x, w[0]), {}, ValueError, r"weight: got shape \[4\], expected \[E, C\]"),
        ((x, w, b[:2]), {}, ValueError, r"bias: got shape \[2\]"),
        ((x, w, b), {"residual": r[:2]}, ValueError, r"residual: got shape \[2, 5\]"),
        ((x, w, b), {"activation": "relu"}, ValueError, "activation: got 'relu', expected one of none, gelu_tanh"),
        ((x, w.double()), {}, TypeError, "weight: got dtype torch.float64"),
        ((x.int(), w), {}, TypeError, "x: got dtype torch.int32"),
        ((x, w.to("meta")), {}, ValueError, "weight: got device meta"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            ops.linear(*arguments, **options)
