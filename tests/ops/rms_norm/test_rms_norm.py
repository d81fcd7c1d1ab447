"""`vlmkern.ops.rms_norm`: numbers, gradients, registration, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops

OP = torch.ops.vlmkern.rms_norm.default


def eager(x, weight, residual=None, eps=1e-6, offset=0.0):
    """With torch's own norm, computed in float32 at least."""
    summed = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(summed.to(wide), x.shape[-1:], weight.to(wide) + offset, eps)
    return normed.to(x.dtype), summed


def make(*shape, dtype=torch.float32):
    tensors = (torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape) * 3 + 1)
    return [t.to(dtype) for t in tensors]


def heads(batch, tokens, count, dim, dtype=torch.float32):
    """q, k and v of a fused projection, [B, N, H, D]."""
    return torch.randn(batch, tokens, 3, count, dim).to(dtype).unbind(2)


@pytest.mark.parametrize("backend", op_backends("rms_norm"))
class TestNumbers:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 9), st.integers(1, 200), st.booleans(), st.sampled_from([0.0, 1.0, -0.5]))
    def test_shapes(self, backend, rows, cols, present, offset):
        x, weight, residual = make(rows, cols)
        residual = residual if present else None
        with vlmkern.use_backend(backend):
            found = ops.rms_norm(x, weight, residual=residual, offset=offset)
        normed, summed = found if present else (found, x)
        expected, expected_sum = eager(x, weight, residual, offset=offset)
        torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(summed, expected_sum)

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_is_rounded_once(self, backend, dtype, offset):
        """Half a unit in the last place of each element, and the error of float32: no rounding before the weight, nor
        of the weight and its offset."""
        x, weight, residual = make(17, 2048, dtype=dtype)
        with vlmkern.use_backend(backend):
            normed, summed = ops.rms_norm(x, weight, residual=residual, offset=offset)
        assert normed.dtype == summed.dtype == dtype and torch.equal(summed, x + residual)
        exact, _ = eager(summed.double(), weight.double(), offset=offset)
        info = torch.finfo(dtype)
        step = torch.exp2(exact.abs().clamp_min(info.smallest_normal).log2().floor()) * info.eps
        assert ((normed.double() - exact).abs() <= step / 2 + 1e-6 * exact.abs()).all()

    def test_statistics_are_those_of_the_rounded_sum(self, backend):
        x, weight, residual = make(5, 64, dtype=torch.bfloat16)
        with vlmkern.use_backend(backend):
            normed, summed = ops.rms_norm(x, weight, residual=residual)
            assert torch.equal(normed, ops.rms_norm(summed, weight))

    @pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3)])
    def test_leading_dimensions(self, backend, lead):
        x, weight, residual = make(*lead, 20)
        with vlmkern.use_backend(backend):
            normed, summed = ops.rms_norm(x, weight, residual=residual)
        assert normed.shape == summed.shape == (*lead, 20)
        torch.testing.assert_close(normed, eager(x, weight, residual)[0], rtol=1e-5, atol=1e-5)

    def test_strides(self, backend):
        weight = torch.randn(40)[::2]
        views = (
            torch.randn(2, 3, 4, 20),
            heads(2, 3, 4, 20)[1],
            heads(2, 4, 3, 20)[0].transpose(1, 2),
            torch.randn(2, 3, 4, 50)[..., 3:23],
            torch.randn(20, 2, 3, 4).permute(1, 2, 3, 0),
            torch.randn(1, 3, 1, 20).expand(2, 3, 4, 20),
        )
        for x in views:
            for residual in (None, *views):
                with vlmkern.use_backend(backend):
                    found = ops.rms_norm(x, weight, residual=residual)
                normed, summed = (found, x.contiguous()) if residual is None else found
                exact, total = eager(x.double(), weight.double(), None if residual is None else residual.double())
                assert normed.is_contiguous() and summed.is_contiguous()
                torch.testing.assert_close(normed.double(), exact, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(summed.double(), total, rtol=1e-6, atol=1e-6)

    def test_more_dimensions_than_rows_are_counted_through(self, backend):
        x, weight = torch.randn(5, 3, 2, 4, 7, 10).permute(3, 1, 4, 0, 2, 5), torch.randn(10)
        with vlmkern.use_backend(backend):
            normed = ops.rms_norm(x, weight)
        torch.testing.assert_close(normed, eager(x, weight)[0], rtol=1e-5, atol=1e-5)

    def test_one_column_and_rows_of_zeros(self, backend):
        x, weight = torch.tensor([[2.0], [-3.0], [0.0]]), torch.tensor([5.0])
        with vlmkern.use_backend(backend):
            torch.testing.assert_close(ops.rms_norm(x, weight), torch.tensor([[5.0], [-5.0], [0.0]]))
            assert torch.equal(ops.rms_norm(torch.zeros(2, 30), torch.randn(30), offset=1.0), torch.zeros(2, 30))

    @pytest.mark.parametrize("size", [1e-30, 1e-19, 1e-3, 1e3, 1e17, 5e17])
    def test_sizes(self, backend, size):
        """Up to where the sum of squares is as large as float32 can be, and down to where eps is all there is."""
        x, weight, _ = make(3, 300)
        x *= size
        with vlmkern.use_backend(backend):
            normed = ops.rms_norm(x, weight, eps=1e-12)
        exact, _ = eager(x.double(), weight.double(), eps=1e-12)
        torch.testing.assert_close(normed.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())

    def test_nan_and_infinity_are_as_torch_has_them(self, backend):
        x, weight, residual = make(5, 33)
        x[0, 32], x[1, 0], residual[2, 5], x[3, 7] = torch.nan, torch.inf, -torch.inf, 3e38
        with vlmkern.use_backend(backend):
            normed, summed = ops.rms_norm(x, weight, residual=residual)
        expected, expected_sum = eager(x, weight, residual)
        torch.testing.assert_close(normed, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(summed, expected_sum, equal_nan=True)
        assert normed[0].isnan().all() and normed[4].isfinite().all()

    def test_arguments_are_not_written_to(self, backend):
        tensors = make(5, 24)
        before = [t.clone() for t in tensors]
        with vlmkern.use_backend(backend):
            ops.rms_norm(tensors[0], tensors[1], residual=tensors[2])
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_float64():
    x, weight, residual = make(4, 30, dtype=torch.float64)
    torch.testing.assert_close(ops.rms_norm(x, weight, residual=residual), eager(x, weight, residual))


@pytest.mark.skipif(not vlmkern.backends()["native"]["available"], reason="no native backend")
@pytest.mark.parametrize("transposed", [False, True])
def test_heads_are_read_in_place(transposed):
    """No copy of q is made: what is allocated is the result."""
    q, _, _ = heads(2, 300, 4, 128)
    q = q.transpose(1, 2) if transposed else q
    weight = torch.randn(128)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.rms_norm(q, weight)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert 4 * q.numel() <= allocated < 8 * q.numel()


class TestGradients:
    @pytest.mark.parametrize("residual", [True, False])
    def test_gradcheck(self, residual):
        x, weight, other = (t.requires_grad_() for t in make(3, 5, dtype=torch.float64))
        inputs = [x, weight, *([other] if residual else [])]

        def run(*_):
            return ops.rms_norm(x, weight, residual=other if residual else None, eps=1e-3, offset=0.5)

        assert torch.autograd.gradcheck(run, inputs)

    @pytest.mark.parametrize("backend", op_backends("rms_norm"))
    @pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)])
    def test_partial_with_a_zero_stride_gradient(self, backend, trained):
        tensors, scale = make(6, 20), torch.randn(20)
        leaves = [tensors[i].requires_grad_() for i in trained]

        def gradients(function):
            normed, summed = function(*tensors)
            return torch.autograd.grad((normed * scale).sum() + summed.sum(), leaves)

        with vlmkern.use_backend(backend):
            actual = gradients(lambda x, w, r: ops.rms_norm(x, w, residual=r, offset=1.0))
        expected = gradients(lambda x, w, r: eager(x, w, r, offset=1.0))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("used", [0, 1])
    def test_one_result_used(self, used):
        x, weight, residual = (t.requires_grad_() for t in make(6, 20))
        inputs = (x, weight, residual)
        found = ops.rms_norm(x, weight, residual=residual)[used]
        actual = torch.autograd.grad(found.square().sum(), inputs, allow_unused=True)
        expected = torch.autograd.grad(eager(*inputs)[used].square().sum(), inputs, allow_unused=True)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("backend", op_backends("rms_norm"))
    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_of_heads_in_low_precision(self, backend, dtype):
        q, _, _ = heads(2, 9, 4, 72, dtype)
        weight, scale = torch.randn(72).to(dtype), torch.randn(2, 9, 4, 72).to(dtype)

        def gradients(t):
            leaves = [v.detach().to(t).requires_grad_() for v in (q, weight)]
            # strides of q, which a copy in another dtype may not have
            leaves[0] = q.detach().requires_grad_() if t == dtype else leaves[0]
            normed = ops.rms_norm(*leaves) if t == dtype and ours else eager(*leaves)[0]
            return torch.autograd.grad(normed, leaves, scale.to(t))

        ours = True
        with vlmkern.use_backend(backend):
            actual = gradients(dtype)
        ours = False
        for i, gradient in enumerate(actual):
            low_precision_close(gradient, lambda t, i=i: gradients(t)[i])

    def test_no_rows(self):
        x, weight = torch.empty(2, 0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        ops.rms_norm(x, weight).sum().backward()
        assert x.grad.shape == (2, 0, 8) and weight.grad.eq(0).all()

    def test_double_backward_raises(self):
        x, weight, _ = make(3, 4)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order"):
            gradient.sum().backward()


class TestRegistration:
    def test_opcheck(self):
        x, weight, residual = (t.requires_grad_() for t in make(2, 3, 5))
        torch.library.opcheck(OP, (x, weight, residual, 1e-6, 0.0))
        torch.library.opcheck(OP, (x, weight, None, 1e-6, 1.0))
        torch.library.opcheck(OP, (x.detach().transpose(0, 1), weight, residual.detach().transpose(0, 1), 1e-6, 0.0))

    def test_meta(self):
        x, weight, residual = (t.to("meta") for t in make(3, 4))
        assert ops.rms_norm(x, weight).shape == (3, 4)
        assert [t.shape for t in ops.rms_norm(x, weight, residual=residual)] == [(3, 4)] * 2

    def test_autocast(self):
        x, weight, residual = make(6, 40)
        with torch.autocast("cpu", torch.bfloat16):
            normed, summed = ops.rms_norm(x, weight, residual=residual)
        x, weight, residual = (t.bfloat16() for t in (x, weight, residual))
        expected, expected_sum = ops.rms_norm(x, weight, residual=residual)
        assert normed.dtype == torch.bfloat16
        assert torch.equal(normed, expected) and torch.equal(summed, expected_sum)

    def test_compile_fullgraph_without_recompiling(self):
        torch._dynamo.reset()
        _, weight, _ = make(1, 5)
        compiled = torch.compile(
            lambda x, y: ops.rms_norm(x + 1, weight, residual=y, offset=1.0), fullgraph=True, dynamic=True
        )
        for rows in (2, 7, 30):
            x, _, y = make(rows, 5)
            with torch.compiler.set_stance("fail_on_recompile" if rows == 30 else "default"):
                torch.testing.assert_close(compiled(x, y), eager(x + 1, weight, y, offset=1.0), rtol=1e-4, atol=1e-5)

    def test_export(self):
        class Norm(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.randn(16))

            def forward(self, x):
                return ops.rms_norm(x, self.weight)

        module, x = Norm(), torch.randn(5, 16)
        rows = torch.export.Dim("rows", min=2)
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
        assert any(node.target is OP for node in exported.graph.nodes)
        x = torch.randn(9, 16)
        torch.testing.assert_close(exported.module()(x), eager(x, module.weight)[0])


def test_errors():
    x, weight, residual = make(3, 4)
    cases = [
        ((x, weight, residual[:2]), ValueError, r"residual: got shape \[2, 4\], expected \[3, 4\]"),
        ((x, weight[:3], residual), ValueError, r"weight: got shape \[3\], expected \[4\]"),
        ((x, weight[None], residual), ValueError, r"weight: got shape \[1, 4\]"),
        ((x, None, residual), TypeError, "weight: got None, expected a torch.Tensor"),
        ((x, weight, residual.double()), TypeError, "residual: got dtype torch.float64, expected torch.float32"),
        ((x, weight.half(), residual), TypeError, "weight: got dtype torch.float16"),
        ((x.int(), weight, None), TypeError, "x: got dtype torch.int32"),
        ((x[0, 0], weight, None), ValueError, r"x: got shape \[\], expected \[..., C\]"),
        ((x, weight.to("meta"), None), ValueError, "weight: got device meta, expected cpu"),
    ]
    for (x, weight, residual), error, message in cases:
        with pytest.raises(error, match=message):
            ops.rms_norm(x, weight, residual=residual)
