"""`vlmkern.ops.swiglu_mlp`: numbers, gradients, registration, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops

OP = torch.ops.vlmkern.swiglu_mlp.default


def eager(x, w_up, w_down, b_up=None, b_down=None):
    up = x @ w_up.T + (0 if b_up is None else b_up)
    value, gate = up[..., : up.shape[-1] // 2], up[..., up.shape[-1] // 2 :]
    return (gate * torch.sigmoid(gate) * value) @ w_down.T + (0 if b_down is None else b_down)


def weights(channels, features, out, dtype=torch.float32):
    def normal(*shape):
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    return normal(2 * features, channels), normal(out, features), normal(2 * features), normal(out)


@pytest.mark.parametrize("backend", op_backends("swiglu_mlp"))
class TestNumbers:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 70), st.integers(1, 9), st.booleans())
    def test_shapes(self, backend, rows, channels, features, out, bias):
        w_up, w_down, b_up, b_down = weights(channels, features, out)
        x = torch.randn(rows, channels) * 3
        biases = {"b_up": b_up, "b_down": b_down} if bias else {}
        with vlmkern.use_backend(backend):
            y = ops.swiglu_mlp(x, w_up, w_down, **biases)
        torch.testing.assert_close(y, eager(x, w_up, w_down, **biases), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_at_projector_sizes(self, backend, dtype):
        w_up, w_down, _, _ = weights(1152, 768, 256, dtype)
        x = torch.randn(2, 17, 1152).to(dtype)
        with vlmkern.use_backend(backend):
            y = ops.swiglu_mlp(x, w_up, w_down)
        assert y.dtype == dtype

        def run(t):
            up = x.to(t) @ w_up.to(t).T
            value, gate = up.chunk(2, -1)
            return (torch.nn.functional.silu(gate) * value) @ w_down.to(t).T

        low_precision_close(y, run)

    @pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3)])
    def test_leading_dimensions(self, backend, lead):
        w_up, w_down, _, _ = weights(6, 5, 4)
        x = torch.randn(*lead, 6)
        with vlmkern.use_backend(backend):
            y = ops.swiglu_mlp(x, w_up, w_down)
        assert y.shape == (*lead, 4)
        torch.testing.assert_close(y, eager(x, w_up, w_down), rtol=1e-4, atol=1e-5)

    def test_strided_input(self, backend):
        w_up, w_down, _, _ = weights(6, 5, 4)
        x = torch.randn(6, 8).T
        with vlmkern.use_backend(backend):
            torch.testing.assert_close(ops.swiglu_mlp(x, w_up, w_down), eager(x, w_up, w_down), rtol=1e-4, atol=1e-5)

    def test_extreme_gates(self, backend):
        """silu of the largest and smallest floats, infinities and NaN, as torch's own."""
        gate = torch.tensor(
            [
                0.0,
                -0.0,
                88.0,
                -88.0,
                104.0,
                -104.0,
                3e38,
                -3e38,
                1e-40,
                -1e-40,
                torch.inf,
                -torch.inf,
                torch.nan,
            ]
        )
        features = len(gate)
        x = torch.zeros(1, 1)
        b_up = torch.cat([torch.ones(features), gate])
        with vlmkern.use_backend(backend):
            y = ops.swiglu_mlp(x, torch.zeros(2 * features, 1), torch.zeros(1, features), b_up=b_up)
            (hidden,) = (
                torch.stack(
                    [
                        ops.swiglu_mlp(x, torch.zeros(2, 1), torch.ones(1, 1), b_up=b_up[i::features])
                        for i in range(features)
                    ]
                ),
            )
        assert y.isnan().all()
        torch.testing.assert_close(
            hidden.flatten(), torch.nn.functional.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-38
        )


class TestGradients:
    def test_gradcheck(self):
        tensors = [t.double().requires_grad_() for t in (torch.randn(3, 4), *weights(4, 5, 6))]
        assert torch.autograd.gradcheck(lambda x, u, d, bu, bd: ops.swiglu_mlp(x, u, d, b_up=bu, b_down=bd), tensors)

    @pytest.mark.parametrize("backend", op_backends("swiglu_mlp_bwd"))
    def test_backends_agree_with_float64(self, backend):
        tensors = [t.requires_grad_() for t in (torch.randn(2, 9, 4) * 3, *weights(4, 37, 6))]

        def gradients(inputs):
            x, u, d, bu, bd = inputs
            return torch.autograd.grad(ops.swiglu_mlp(x, u, d, b_up=bu, b_down=bd).sum(), inputs)

        with vlmkern.use_backend(backend):
            actual = gradients(tensors)
        for a, e in zip(actual, gradients([t.double() for t in tensors]), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("trained", range(5))
    def test_partial(self, trained):
        tensors = [torch.randn(3, 4), *weights(4, 5, 6)]
        tensors[trained].requires_grad_()
        x, u, d, bu, bd = tensors
        ops.swiglu_mlp(x, u, d, b_up=bu, b_down=bd).square().sum().backward()
        actual, tensors[trained].grad = tensors[trained].grad, None
        eager(x, u, d, bu, bd).square().sum().backward()
        torch.testing.assert_close(actual, tensors[trained].grad, rtol=1e-4, atol=1e-5)

    def test_double_backward_raises(self):
        x, w_up, w_down = torch.randn(3, 4, requires_grad=True), torch.randn(10, 4), torch.randn(6, 5)
        (gradient,) = torch.autograd.grad(ops.swiglu_mlp(x, w_up, w_down).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order"):
            gradient.sum().backward()


class TestRegistration:
    def test_opcheck(self):
        x = torch.randn(3, 4, requires_grad=True)
        w_up, w_down, b_up, b_down = (t.requires_grad_() for t in weights(4, 5, 6))
        torch.library.opcheck(OP, (x, w_up, w_down, b_up, b_down))
        torch.library.opcheck(OP, (x, w_up, w_down, None, None))

    def test_meta(self):
        w_up, w_down, _, _ = (t.to("meta") for t in weights(4, 5, 6))
        assert ops.swiglu_mlp(torch.empty(2, 3, 4, device="meta"), w_up, w_down).shape == (2, 3, 6)

    def test_autocast(self):
        x, (w_up, w_down, _, _) = torch.randn(3, 4), weights(4, 5, 6)
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.swiglu_mlp(x, w_up, w_down)
        assert torch.equal(y, ops.swiglu_mlp(x.bfloat16(), w_up.bfloat16(), w_down.bfloat16()))

    def test_compile_fullgraph_without_recompiling(self):
        torch._dynamo.reset()
        w_up, w_down, _, _ = weights(4, 5, 6)
        compiled = torch.compile(lambda x: ops.swiglu_mlp(x + 1, w_up, w_down), fullgraph=True, dynamic=True)
        for rows in (2, 3, 7):
            x = torch.randn(rows, 4)
            with torch.compiler.set_stance("fail_on_recompile" if rows == 7 else "default"):
                torch.testing.assert_close(compiled(x), eager(x + 1, w_up, w_down), rtol=1e-4, atol=1e-5)


def test_errors():
    x, (w_up, w_down, b_up, _) = torch.randn(3, 4), weights(4, 5, 6)
    cases = [
        ((x, w_up[:9], w_down), {}, ValueError, r"w_up: got shape \[9, 4\], expected an even number"),
        ((x, w_up[:8], w_down), {}, ValueError, r"w_up: got shape \[8, 4\], expected \[10, 4\]"),
        ((x[:, :3], w_up, w_down), {}, ValueError, r"w_up: got shape \[10, 4\], expected \[10, 3\]"),
        ((x, w_up[0], w_down), {}, ValueError, r"w_up: got shape \[4\], expected \[2F, C\]"),
        (
            (x, w_up.double(), w_down),
            {},
            TypeError,
            "w_up: got dtype torch.float64, expected torch.float32 like x",
        ),
        ((x.long(), w_up, w_down), {}, TypeError, "x: got dtype torch.int64"),
        ((x, w_up, w_down), {"b_up": b_up[:4]}, ValueError, r"b_up: got shape \[4\]"),
        ((x, w_up, w_down), {"b_down": b_up}, ValueError, r"b_down: got shape \[10\], expected \[6\]"),
        ((x, w_up, w_down.to("meta")), {}, ValueError, "w_down: got device meta, expected cpu"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            ops.swiglu_mlp(*arguments, **options)
