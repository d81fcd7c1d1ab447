"""`vlmkern.ops.attention_pool`: gradients, and what torch knows of the op."""

from __future__ import annotations

import pytest
import torch
from pooling import Weights, problem, random_mask
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops
from vlmkern.ops.attention_pool import native

OP = torch.ops.vlmkern.attention_pool.default


@pytest.mark.parametrize("backend", op_backends("attention_pool_bwd"))
class TestGradientNumbers:
    """Against the reference in float64, which gradcheck covers."""

    def gradients(self, backend, dtype, features, w, mask, grid, window=(2, 2), keep=None):
        leaves = [*features, *w.projections, None if mask is None else w.pad_embed]
        leaves = [t if t is None else t.to(dtype).detach().requires_grad_() for t in leaves]
        *pair, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed = leaves
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(
                pair, w_q, b_q, w_kv, b_kv, w_o, b_o,
                grid=grid, num_heads=w.heads, window=window, pad_embed=pad_embed, mask=mask, keep=keep,
            )  # fmt: skip
            grad = torch.linspace(-1, 1, out.numel()).view(out.shape).sin().to(torch.bfloat16).to(dtype)
            return torch.autograd.grad(out, [t for t in leaves if t is not None], grad)

    def check(self, backend, *args, **options):
        actual = self.gradients(backend, torch.float32, *args, **options)
        expected = self.gradients("reference", torch.float64, *args, **options)
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape and a.is_contiguous()
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * max(1.0, e.abs().max().item()))

    @pytest.mark.parametrize(
        ("grid", "window"), [((3, 5), (2, 2)), ((7, 6), (3, 3)), ((4, 4), (1, 1)), ((5, 3), (3, 2)), ((1, 1), (2, 2))]
    )
    @pytest.mark.parametrize(
        ("heads", "key_dim", "value_dim", "channels"), [(2, 3, 5, 6), (16, 8, 8, 33), (1, 12, 24, 12)]
    )
    def test_shapes(self, backend, grid, window, heads, key_dim, value_dim, channels):
        patches = grid[0] * grid[1]
        w = Weights.make(2 * channels, heads, key_dim, value_dim, 10)
        features = torch.randn(2, 3, patches, channels)
        self.check(backend, features, w, random_mask(3, patches), grid, window)
        self.check(backend, features, Weights.make(2 * channels, heads, key_dim, value_dim, 7, bias=False), None, grid)

    @pytest.mark.parametrize("keep", [[], [4], [17, 0, 5, 5, 11]])
    def test_keep(self, backend, keep):
        w = Weights.make(12, 2, 3, 3, 10)
        keep = torch.tensor(keep, dtype=torch.int64)
        self.check(backend, torch.randn(2, 3, 15, 6), w, random_mask(3, 15), (3, 5), keep=keep)

    def test_strided_features(self, backend):
        w = Weights.make(12, 2, 3, 3, 10)
        features = torch.randn(15, 3, 2, 9)[..., 2:8].permute(2, 1, 0, 3)
        self.check(backend, features, w, None, (3, 5))

    def test_a_few_heads_at_a_time(self, backend, monkeypatch):
        if backend == "native":
            monkeypatch.setattr(native, "_VECTORS", 3 * 2 * 6 * 12 * 4)
        self.check(backend, torch.randn(2, 1, 15, 6), Weights.make(12, 8, 3, 4, 10), None, (3, 5))

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_at_released_sizes(self, backend, dtype):
        w = Weights.make(2304, 16, 72, 72, 1152, dtype=dtype)
        features, mask = torch.randn(2, 1, 25, 1152).to(dtype), random_mask(1, 25)

        def run(t, backend="reference"):
            return self.gradients(backend, t, features, w, mask, (5, 5))

        actual, exact, low = run(dtype, backend), run(torch.float64), run(dtype)
        for i in range(len(actual)):
            low_precision_close(actual[i], lambda t, i=i: (exact if t == torch.float64 else low)[i])

    def test_bitwise_repeatable(self, backend):
        w, features = Weights.make(12, 2, 3, 3, 10), torch.randn(2, 9, 15, 6)
        runs = [self.gradients(backend, torch.float32, features, w, None, (3, 5)) for _ in range(2)]
        assert all(map(torch.equal, *runs))

    def test_nan_spreads_as_in_the_formula(self, backend):
        w, features = Weights.make(12, 2, 3, 3, 10), torch.randn(2, 3, 15, 6)
        features[1, 1, 7, 2] = torch.nan
        actual = self.gradients(backend, torch.float32, features, w, None, (3, 5))
        expected = self.gradients("reference", torch.float64, features, w, None, (3, 5))
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            # the values' bias is added to every result whatever the features are
            assert i == 5 or torch.equal(a.isnan(), e.isnan())


class TestGradients:
    @pytest.mark.parametrize("keep", [None, [3, 0, 3, 11]])
    def test_gradcheck(self, keep):
        run, tensors, _ = problem()
        keep = None if keep is None else torch.tensor(keep)
        assert torch.autograd.gradcheck(lambda *t: run(*t, keep=keep), tensors)

    def test_gradcheck_paper_form(self):
        w = Weights.make(8, 1, 4, 8, 4, bias=False, dtype=torch.float64)
        features = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
        weights = [t.requires_grad_() for t in (w.w_q, w.w_kv, w.w_o)]
        assert torch.autograd.gradcheck(
            lambda f, q, kv, o: ops.attention_pool([f], q, None, kv, None, o, None, grid=(2, 2), num_heads=1),
            (features, *weights),
        )

    def test_frozen_features(self):
        run, tensors, _ = problem(torch.float32)
        for tensor in tensors[:2]:
            tensor.requires_grad_(False)
        run(*tensors).sum().backward()
        assert all(t.grad is None for t in tensors[:2]) and all(t.grad is not None for t in tensors[2:])

    def test_one_trained_feature_of_two(self):
        run, tensors, _ = problem(torch.float64)
        full = torch.autograd.grad(run(*tensors).square().sum(), tensors[1])
        for tensor in (tensors[0], *tensors[2:]):
            tensor.requires_grad_(False)
        run(*tensors).square().sum().backward()
        torch.testing.assert_close(tensors[1].grad, full[0])

    def test_double_backward_raises(self):
        run, tensors, _ = problem()
        (gradient,) = torch.autograd.grad(run(*tensors).square().sum(), tensors[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order"):
            gradient.sum().backward()


class TestRegistration:
    @pytest.mark.parametrize("keep", [None, [3, 0, 11]])
    def test_opcheck(self, keep):
        _, (f0, f1, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed), mask = problem(torch.float32)
        keep = None if keep is None else torch.tensor(keep)
        torch.library.opcheck(OP, ([f0, f1], w_q, b_q, w_kv, b_kv, w_o, b_o, [3, 5], 2, [2, 2], pad_embed, mask, keep))

    def test_meta(self):
        w = Weights.make(12, 2, 3, 3, 10)
        features = [torch.empty(2, 15, 6, device="meta")] * 2
        projections = [t.to("meta") for t in w.projections]
        assert ops.attention_pool(features, *projections, grid=(3, 5), num_heads=2).shape == (2, 6, 10)

    def test_autocast_leaves_the_mask_alone(self):
        run, tensors, _ = problem(torch.float32, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(*tensors)
        assert torch.equal(out, run(*(t.bfloat16() for t in tensors)))

    def test_compile_fullgraph_without_recompiling(self):
        torch._dynamo.reset()
        w = Weights.make(12, 2, 3, 3, 10)

        def pool(features, keep):
            return ops.attention_pool(list(features.unbind(0)), *w.projections, grid=(3, 5), num_heads=2, keep=keep) + 1

        compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend="aot_eager")
        for tiles in (2, 3, 5):
            features, keep = torch.randn(2, tiles, 15, 6), torch.arange(2 * tiles)
            with torch.compiler.set_stance("fail_on_recompile" if tiles == 5 else "default"):
                torch.testing.assert_close(compiled(features, keep), pool(features, keep))

    def test_bad_keep_raises_inside_a_compiled_graph(self):
        torch._dynamo.reset()
        run, tensors, _ = problem(torch.float32)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match="keep: got indices from 0 to 12, expected 0 to 11"):
            compiled(*tensors, keep=torch.tensor([0, 12]))
