"""`vlmkern.ops.attention_pool`: numbers in both published forms, layouts, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling import Weights, random_mask, slow_pool
from support import LOW_PRECISION, low_precision_close, op_backends

import vlmkern
from vlmkern import ops


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
