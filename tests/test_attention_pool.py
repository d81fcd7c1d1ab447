"""`vlmkern.ops.attention_pool`: numbers in both published forms, gradients, registration, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LOW_PRECISION, low_precision_close, op_backends
from torch import Tensor

import vlmkern
from vlmkern import ops
from vlmkern.ops.attention_pool import native

OP = torch.ops.vlmkern.attention_pool.default


@dataclass
class Weights:
    w_q: Tensor
    b_q: Tensor | None
    w_kv: Tensor
    b_kv: Tensor | None
    w_o: Tensor
    b_o: Tensor | None
    pad_embed: Tensor
    heads: int

    @classmethod
    def make(cls, channels, heads, key_dim, value_dim, out, *, bias=True, dtype=torch.float32):
        def normal(*shape):
            return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

        key_size, value_size = heads * key_dim, heads * value_dim
        return cls(
            normal(key_size, channels),
            normal(key_size) if bias else None,
            normal(key_size + value_size, channels),
            normal(key_size + value_size) if bias else None,
            normal(out, value_size),
            normal(out) if bias else None,
            torch.randn(2, channels).to(dtype),
            heads,
        )

    def to(self, dtype):
        return Weights(*(t if t is None else t.to(dtype) for t in list(vars(self).values())[:-1]), self.heads)

    @property
    def projections(self):
        return self.w_q, self.b_q, self.w_kv, self.b_kv, self.w_o, self.b_o


def slow_pool(features, w: Weights, grid, window=(2, 2), mask=None):
    """The definition, one window at a time, one slot at a time."""
    x = torch.cat(list(features), dim=-1)
    tiles, _, channels = x.shape
    rows, cols = grid
    down, across = math.ceil(rows / window[0]), math.ceil(cols / window[1])
    key_size = w.w_q.shape[0]
    key_dim = key_size // w.heads
    zero = x.new_zeros(1)
    result = []
    for t in range(tiles):
        for i in range(down * across):
            slots = []
            for r in range(window[0]):
                for c in range(window[1]):
                    row, col = i // across * window[0] + r, i % across * window[1] + c
                    if row >= rows or col >= cols:
                        slots.append(x.new_zeros(channels))
                        continue
                    slot = x[t, row * cols + col]
                    if mask is not None:
                        value = mask[t, row * cols + col].item()
                        if value == 0:
                            slot = slot + w.pad_embed[0]
                        elif value < 1:
                            slot = slot + w.pad_embed[1]
                    slots.append(slot)
            slots = torch.stack(slots)
            q = slots.mean(0) @ w.w_q.T + (zero if w.b_q is None else w.b_q)
            kv = slots @ w.w_kv.T + (zero if w.b_kv is None else w.b_kv)
            k, v = kv[:, :key_size], kv[:, key_size:]
            heads = []
            for qh, kh, vh in zip(q.chunk(w.heads), k.chunk(w.heads, 1), v.chunk(w.heads, 1), strict=True):
                heads.append(torch.softmax(kh @ qh * key_dim**-0.5, 0) @ vh)
            result.append(torch.cat(heads) @ w.w_o.T + (zero if w.b_o is None else w.b_o))
    return torch.stack(result).view(tiles, down * across, -1)


def random_mask(tiles, patches):
    return torch.tensor([1.0, 0.0, 0.37, 0.999, -1.0])[torch.randint(0, 5, (tiles, patches))]


@pytest.mark.parametrize("backend", op_backends("attention_pool"))
class TestNumbers:
    @pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (5, 5), (4, 7)])
    @pytest.mark.parametrize("window", [(2, 2), (1, 3)])
    def test_grids(self, backend, grid, window):
        w = Weights.make(12, 2, 3, 3, 10)
        features = torch.randn(2, 2, grid[0] * grid[1], 6)
        mask = random_mask(2, grid[0] * grid[1])
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(
                list(features),
                *w.projections,
                grid=grid,
                num_heads=2,
                window=window,
                pad_embed=w.pad_embed,
                mask=mask,
            )
        torch.testing.assert_close(out, slow_pool(features, w, grid, window, mask), rtol=1e-5, atol=1e-5)

    def test_paper_form_one_head_no_biases(self, backend):
        """Eq. 3: one head, W_V of 2d x 2d."""
        d = 16
        w = Weights.make(2 * d, 1, d, 2 * d, d, bias=False)
        features = torch.randn(2, 1, 25, d)
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(list(features), *w.projections, grid=(5, 5), num_heads=1)
        torch.testing.assert_close(out, slow_pool(features, w, (5, 5)), rtol=1e-5, atol=1e-5)

    def test_one_head_form_is_not_the_released_form(self, backend):
        w = Weights.make(32, 4, 4, 4, 16)
        features = torch.randn(2, 1, 16, 16)
        with vlmkern.use_backend(backend):
            four = ops.attention_pool(list(features), *w.projections, grid=(4, 4), num_heads=4)
            one = ops.attention_pool(list(features), *w.projections, grid=(4, 4), num_heads=1)
        assert (four - one).abs().max() > 1e-3

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_at_released_sizes(self, backend, dtype):
        w = Weights.make(2304, 16, 72, 72, 1152, dtype=dtype)
        features, mask = torch.randn(2, 1, 25, 1152).to(dtype), random_mask(1, 25)

        def run(t):
            wt = w.to(t)
            with vlmkern.use_backend("reference"):
                return ops.attention_pool(
                    list(features.to(t)),
                    *wt.projections,
                    grid=(5, 5),
                    num_heads=16,
                    pad_embed=wt.pad_embed,
                    mask=mask,
                )

        with vlmkern.use_backend(backend):
            out = ops.attention_pool(
                list(features), *w.projections, grid=(5, 5), num_heads=16, pad_embed=w.pad_embed, mask=mask
            )
        low_precision_close(out, run)

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.int8]
    )
    def test_mask_is_compared_in_its_own_dtype(self, backend, dtype):
        """0.999 is 1.0 in bfloat16: the mask must not be cast to the features' dtype."""
        w = Weights.make(8, 1, 4, 4, 4, dtype=torch.bfloat16)
        features = [torch.randn(1, 4, 8).bfloat16()]
        mask = torch.tensor([[1.0, 0.0, 0.999, -1.0]]).to(dtype)
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(
                features, *w.projections, grid=(2, 2), num_heads=1, pad_embed=w.pad_embed, mask=mask
            )
        wide = w.to(torch.float32)
        expected = slow_pool([f.float() for f in features], wide, (2, 2), mask=mask)
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
        other = slow_pool([f.float() for f in features], wide, (2, 2), mask=torch.ones(1, 4))
        assert (out.float() - other).abs().max() > 0.1

    def test_keep_selects_in_order_with_repeats(self, backend):
        w = Weights.make(12, 2, 3, 3, 10)
        features, mask = torch.randn(2, 3, 15, 6), random_mask(3, 15)
        options = {"grid": (3, 5), "num_heads": 2, "pad_embed": w.pad_embed, "mask": mask}
        keep = torch.tensor([17, 0, 5, 5, 11])
        with vlmkern.use_backend(backend):
            whole = ops.attention_pool(list(features), *w.projections, **options).flatten(0, 1)
            kept = ops.attention_pool(list(features), *w.projections, **options, keep=keep)
        torch.testing.assert_close(kept, whole[keep], rtol=1e-5, atol=1e-6)

    def test_windows_that_are_not_kept_are_not_read(self, backend):
        w = Weights.make(12, 2, 3, 3, 10)
        features = torch.randn(2, 2, 16, 6)
        features[:, 1] = float("nan")
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(
                list(features), *w.projections, grid=(4, 4), num_heads=2, keep=torch.tensor([0, 3])
            )
        assert out.isfinite().all()

    def test_strided_features(self, backend):
        w = Weights.make(12, 2, 3, 3, 10)
        wide = torch.randn(4, 15, 14)
        halves = [wide[::2, :, 1:7], wide[::2, :, 8:14]]
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(halves, *w.projections, grid=(3, 5), num_heads=2)
        torch.testing.assert_close(out, slow_pool(halves, w, (3, 5)), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("tiles", "keep", "shape"), [(0, None, (0, 6, 10)), (2, [], (0, 10)), (0, [], (0, 10))])
    def test_empty(self, backend, tiles, keep, shape):
        w = Weights.make(12, 2, 3, 3, 10)
        features = torch.randn(2, tiles, 15, 6)
        keep = None if keep is None else torch.tensor(keep, dtype=torch.int64)
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(list(features), *w.projections, grid=(3, 5), num_heads=2, keep=keep)
        assert out.shape == shape

    @settings(max_examples=40, deadline=None)
    @given(st.permutations(range(4)), st.integers(1, 3), st.integers(1, 3))
    def test_permuting_tiles_permutes_outputs(self, backend, order, layers, heads):
        w = Weights.make(4 * layers, heads, 3, 2, 5)
        features = torch.randn(layers, 4, 9, 4)
        options = {"grid": (3, 3), "num_heads": heads}
        with vlmkern.use_backend(backend):
            out = ops.attention_pool(list(features), *w.projections, **options)
            permuted = ops.attention_pool(list(features[:, list(order)]), *w.projections, **options)
        torch.testing.assert_close(permuted, out[list(order)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", op_backends("attention_pool"))
class TestLayouts:
    """Released sizes, and what only fast implementations could get wrong."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("form", ["released", "paper"])
    def test_released_sizes_with_keep(self, backend, dtype, form):
        """Error against float64: at most twice the reference's own plus 1e-6 of the largest value."""
        w = (
            Weights.make(2304, 16, 72, 72, 64, dtype=dtype)
            if form == "released"
            else Weights.make(2304, 1, 1152, 2304, 64, bias=False, dtype=dtype)
        )
        wide = torch.randn(2, 27 * 27, 2304).to(dtype)
        mask, keep = random_mask(2, 27 * 27), torch.randperm(2 * 196)[:37]

        def run(name, t):
            wt = w.to(t)
            with vlmkern.use_backend(name):
                return ops.attention_pool(
                    list(wide.to(t).chunk(2, -1)),
                    *wt.projections,
                    grid=(27, 27),
                    num_heads=w.heads,
                    pad_embed=wt.pad_embed,
                    mask=mask,
                    keep=keep,
                )

        exact = run("reference", torch.float64)
        error, eager = ((run(b, dtype).double() - exact).abs().max() for b in (backend, "reference"))
        assert error <= 2 * eager + 1e-6 * exact.abs().max()

    @pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
    @pytest.mark.parametrize(
        ("heads", "key_dim", "value_dim", "channels"), [(3, 5, 7, 9), (2, 16, 8, 40), (1, 3, 5, 17), (5, 1, 1, 300)]
    )
    @pytest.mark.parametrize("window", [(2, 2), (1, 1), (2, 3), (3, 3)])
    def test_odd_sizes(self, backend, dtype, heads, key_dim, value_dim, channels, window):
        w = Weights.make(3 * channels, heads, key_dim, value_dim, 6, dtype=dtype)
        features, mask = torch.randn(3, 2, 65, channels).to(dtype), random_mask(2, 65)

        def run(t):
            wt = w.to(t)
            with vlmkern.use_backend(backend if t == dtype else "reference"):
                return ops.attention_pool(
                    list(features.to(t)),
                    *wt.projections,
                    grid=(13, 5),
                    num_heads=heads,
                    window=window,
                    pad_embed=wt.pad_embed,
                    mask=mask,
                )

        tolerance = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
        torch.testing.assert_close(run(dtype).double(), run(torch.float64), rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("heads", [1, 2])
    def test_unaligned_pointers_and_strides_of_weights(self, backend, dtype, heads):
        w = Weights.make(12, heads, 4, 4, 8, dtype=dtype)

        def odd(t, pad=1):
            return torch.nn.functional.pad(t, (pad, 2)).flatten()[1:-2].as_strided(t.shape, _strides(t, pad + 2))

        def _strides(t, extra):
            return (1,) if t.dim() == 1 else (t.shape[-1] + extra, 1)

        features = list(torch.randn(2, 2, 15, 6).to(dtype))
        storage = torch.zeros(2 * 15 * 9 + 1, dtype=dtype)
        shifted = storage[1:].view(2, 15, 9)[..., 3:]
        shifted.copy_(features[0])
        options = {"grid": (3, 5), "num_heads": heads}
        with vlmkern.use_backend(backend):
            plain = ops.attention_pool(features, *w.projections, **options)
            moved = ops.attention_pool([shifted, features[1]], *(odd(t) for t in w.projections), **options)
        torch.testing.assert_close(moved, plain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("heads", [1, 4])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_stays_in_its_window(self, backend, dtype, heads, value):
        w = Weights.make(16, heads, 4, 4, 8, dtype=dtype)
        features = torch.randn(2, 1, 16 * 16, 8).to(dtype)
        options = {"grid": (16, 16), "num_heads": heads}
        with vlmkern.use_backend(backend):
            clean = ops.attention_pool(list(features), *w.projections, **options)
            features[1, 0, 5 * 16 + 7, 3] = value
            dirty = ops.attention_pool(list(features), *w.projections, **options)
        at = (5 // 2) * 8 + 7 // 2
        assert dirty[0, at].isnan().all()
        rest = torch.arange(64) != at
        assert torch.equal(dirty[:, rest], clean[:, rest])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("windows", [1, 20, 350])
    def test_threads_and_repeats_change_no_bit(self, backend, dtype, windows):
        if backend == "reference":
            pytest.skip("torch promises no such thing")
        w = Weights.make(192, 4, 24, 24, 32, dtype=dtype)
        features = list(torch.randn(2, 2, 27 * 27, 96).to(dtype))
        keep = torch.arange(windows)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 2, 3, 1):
                torch.set_num_threads(count)
                with vlmkern.use_backend(backend):
                    results.append(ops.attention_pool(features, *w.projections, grid=(27, 27), num_heads=4, keep=keep))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.skipif(not vlmkern.backends()["native"]["available"], reason="no native backend")
def problem(dtype=torch.float64, requires_grad=True):
    """Small sizes with every option in use."""
    w = Weights.make(8, 2, 3, 5, 6, dtype=dtype)
    features = [torch.randn(2, 15, 4, dtype=dtype) for _ in range(2)]
    mask = random_mask(2, 15)
    tensors = [*features, *w.projections, w.pad_embed]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)

    def run(f0, f1, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed, keep=None):
        return ops.attention_pool(
            [f0, f1],
            w_q,
            b_q,
            w_kv,
            b_kv,
            w_o,
            b_o,
            grid=(3, 5),
            num_heads=2,
            pad_embed=pad_embed,
            mask=mask,
            keep=keep,
        )

    return run, tensors, mask


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


def test_errors():
    w = Weights.make(12, 2, 3, 3, 10)
    good = [torch.randn(2, 15, 6) for _ in range(2)]
    mask = torch.ones(2, 15)

    def check(error, message, features=good, grid=(3, 5), num_heads=2, window=(2, 2), **changes):
        arguments = {n: changes.pop(n, getattr(w, n)) for n in ("w_q", "b_q", "w_kv", "b_kv", "w_o", "b_o")}
        with pytest.raises(error, match=message):
            ops.attention_pool(features, *arguments.values(), grid=grid, num_heads=num_heads, window=window, **changes)

    check(ValueError, "features: got no tensors", features=[])
    check(ValueError, r"features\[1\]: got shape \[2, 14, 6\]", features=[good[0], good[1][:, :14]])
    check(TypeError, r"features\[1\]: got dtype torch.float64", features=[good[0], good[1].double()])
    check(TypeError, r"features\[0\]: got dtype torch.int64", features=[g.long() for g in good])
    check(ValueError, r"features\[0\]: got strides", features=[torch.randn(2, 6, 15).mT] * 2)
    check(ValueError, r"expected N = grid\[0\] \* grid\[1\] = 16", grid=(4, 4))
    check(ValueError, "grid: got", grid=(0, 15))
    check(ValueError, "window: got", window=(2, 0))
    check(ValueError, "num_heads: got 0", num_heads=0)
    check(ValueError, "w_q: got an inner size of 6, expected a multiple of num_heads = 4", num_heads=4)
    check(ValueError, r"w_q: got shape \[6, 6\], expected \[6, 12\]", features=good, w_q=torch.randn(6, 6))
    check(ValueError, r"w_kv: got shape \[11, 12\]", w_kv=torch.randn(11, 12))
    check(ValueError, r"b_kv: got shape \[11\]", b_kv=torch.randn(11))
    check(TypeError, "w_o: got dtype torch.float64", w_o=w.w_o.double())
    check(ValueError, "pad_embed: got None, expected a tensor, as mask is given", mask=mask)
    check(ValueError, "mask: got None, expected a tensor, as pad_embed is given", pad_embed=w.pad_embed)
    check(ValueError, r"mask: got shape \[2, 14\]", pad_embed=w.pad_embed, mask=mask[:, :14])
    check(TypeError, "mask: got dtype torch.complex64", pad_embed=w.pad_embed, mask=mask.to(torch.complex64))
    check(TypeError, "keep: got dtype torch.int32", keep=torch.zeros(1, dtype=torch.int32))
    check(ValueError, r"keep: got shape \[1, 1\]", keep=torch.zeros(1, 1, dtype=torch.int64))
    check(ValueError, "keep: got indices from -1 to 3", keep=torch.tensor([3, -1]))
    check(ValueError, "keep: got indices from 0 to 12, expected 0 to 11", keep=torch.tensor([0, 12]))


class TestNativeArguments:
    """The extension refuses what describes no memory, and leaves what is around its outputs alone."""

    @pytest.fixture
    def make(self):
        report = vlmkern.backends()["native"]
        if not report["available"]:
            pytest.skip(report["reason"])

        def make(dtype=0, features=((64, 90, 6),), tiles=2, channels=6, grid=(3, 5), window=(2, 2), windows=12, **more):
            pointers = {"pad": 0, "pad_embed": 0, "keep": 0} | more
            return vlmkern.dispatch.extension.extension().AttentionPool(
                dtype, list(features), tiles, channels, grid, window, windows=windows, **pointers
            )

        return make

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dtype": 7}, "dtype"),
            ({"features": ()}, "layers at least 1"),
            ({"features": ((0, 90, 6),)}, "null pointer"),
            ({"features": ((64, -90, 6),)}, r"features\[0\]: got strides"),
            ({"features": ((64, 90, 6), (64, 90, 2**60))}, r"features\[1\]: got strides"),
            ({"grid": (0, 5)}, "grid and window"),
            ({"window": (2, -1)}, "grid and window"),
            ({"windows": 11}, "expected all of the grid's"),
            ({"windows": -1}, "negative"),
            ({"channels": 2**60}, "too large"),
            ({"grid": (2**31, 2**31)}, "too large|too many"),
            ({"pad": 64}, "pad_embed"),
        ],
    )
    def test_refused(self, make, changes, message):
        problem = make(**changes)
        for call in (
            lambda: problem.mean(64, 1),
            lambda: problem.slots(64, 64, 1.0, 1),
            lambda: problem.context(64, 64, 64, 0, 64, 2, 3, 3, 1.0, 1),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    def test_refused_results_and_indices(self, make):
        for arguments in ((0, 64, 64, 0, 64, 2, 3, 3), (64, 64, 64, 0, 0, 2, 3, 3), (64, 64, 64, 0, 64, 2, 0, 3)):
            with pytest.raises(ValueError, match=r"null pointer|expected at least 1"):
                make().context(*arguments, 1.0, 1)
        with pytest.raises(ValueError, match="null pointer"):
            make().mean(0, 1)
        keep = torch.tensor([0, 12])
        with pytest.raises(ValueError, match="keep: got 12, expected 0 to 11"):
            make(keep=keep.data_ptr(), windows=2).mean(64, 1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({0: 7}, "dtype"),
            ({1: 0}, "null pointer"),
            ({2: [(64, 64), (64, 0)]}, "vectors: null pointer"),
            ({3: 0}, "null pointer"),
            ({4: -1}, "negative"),
            ({5: 0}, "size at least 1"),
            ({6: 2**60}, "x|vectors"),
        ],
    )
    def test_refused_gradients(self, make, changes, message):
        arguments = [0, 64, [(64, 64), (64, 64)], 64, 12, 4, 6, 1.0, 1]
        for index, value in changes.items():
            arguments[index] = value
        with pytest.raises(ValueError, match=message):
            vlmkern.dispatch.extension.extension().attention_pool_slots_bwd(*arguments)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_gradients_write_only_their_outputs(self, make, dtype):
        x, buffer = torch.randn(3, 5, 19).to(dtype), torch.full((4, 3 * 19 + 64), torch.nan, dtype=dtype)
        d_x = torch.full((3 * 5 * 19 + 64,), torch.nan)
        for row in (*buffer, d_x):
            row[32:-32] = torch.randn(len(row) - 64)
        pointers = [row[32:].data_ptr() for row in buffer]
        vlmkern.dispatch.extension.extension().attention_pool_slots_bwd(
            vlmkern.dispatch.extension.dtype_code(dtype),
            x.data_ptr(),
            [pointers[:2], pointers[2:]],
            d_x[32:].data_ptr(),
            *x.shape,
            0.5,
            1,
        )
        for row in (*buffer, d_x):
            assert row[:32].isnan().all() and row[-32:].isnan().all() and row[32:-32].isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_writes_only_its_outputs(self, make, dtype):
        x, weights = torch.randn(2, 15, 6).to(dtype), torch.randn(16, 6).to(dtype)
        code = {torch.float32: 0, torch.bfloat16: 1}[dtype]
        problem = make(dtype=code, features=((x.data_ptr(), 90, 6),))
        at = [weights.data_ptr()] * 2
        q = torch.randn(12, 6).to(dtype)
        for size, run in (
            (6, lambda out: problem.mean(out, 1)),
            (6, lambda out: problem.slots(q.data_ptr(), out, 1.0, 1)),
            (10, lambda out: problem.context(q.data_ptr(), *at, 0, out, 2, 3, 5, 1.0, 1)),
        ):
            buffer = torch.full((12 * size + 64,), torch.nan, dtype=dtype)
            out = buffer[32:-32]
            run(out.data_ptr())
            assert buffer[:32].isnan().all() and buffer[-32:].isnan().all() and out.isfinite().all()
