"""The Triton kernels of `vlmkern.ops.attention_pool` in the interpreter: both forms, forward and backward."""

from __future__ import annotations

import pytest
import torch
from strided import apart
from support import LOW_PRECISION, low_precision_close

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch
from vlmkern.ops.attention_pool import triton as gpu
from vlmkern.ops.attention_pool.problem import AttentionPool


@pytest.fixture(autouse=True)
def triton_backend():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    with vlmkern.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["projected", "absorbed"])
def form(request, monkeypatch):
    monkeypatch.setattr(gpu, "_absorbs", lambda *args: request.param == "absorbed")
    return request.param


@pytest.fixture(autouse=True)
def small_blocks():
    blocks = {"BLOCK_W": 2, "BLOCK_D": 16, "num_warps": 4}, {"BLOCK_W": 2, "BLOCK_C": 16, "num_warps": 4}
    with (
        _launch.forced("attention_pool_fwd_slots_kernel", blocks[1]),
        _launch.forced("attention_pool_fwd_kernel", blocks[0]),
        _launch.forced("attention_pool_fwd_absorbed_kernel", blocks[1]),
        _launch.forced("attention_pool_bwd_kernel", blocks[0]),
        _launch.forced("attention_pool_bwd_scatter_kernel", {"BLOCK_C": 16, "num_warps": 4}),
    ):
        yield


class Problem:
    """Inputs of a small pooling; `arguments(dtype)` gives them in a dtype, as leaves."""

    def __init__(
        self,
        grid=(3, 5),
        window=(2, 2),
        heads=2,
        key_dim=9,
        value_dim=20,
        count=2,
        channels=21,
        tiles=2,
        bias=True,
        pad=False,
        keep=None,
        dtype=torch.float32,
    ):
        width = count * channels
        self.features = [torch.randn(tiles, grid[0] * grid[1], channels) for _ in range(count)]
        keys, values = heads * key_dim, heads * value_dim
        shapes = ((keys, width), (keys,), (keys + values, width), (keys + values,), (11, values), (11,))
        self.weights = [torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes]
        if not bias:
            self.weights[1::2] = [None] * 3
        self.pad_embed = torch.randn(2, width) if pad else None
        self.mask = torch.rand(tiles, grid[0] * grid[1]).round(decimals=1).clamp(0.3) if pad else None
        if pad:
            self.mask[:, ::3], self.mask[:, 1::3] = 0, 1
        self.fixed = {"grid": grid, "window": window, "num_heads": heads}
        self.keep = None if keep is None else torch.tensor(keep, dtype=torch.int64)
        self.dtype = dtype

    def tensors(self, dtype):
        every = [*self.features, *self.weights, self.pad_embed]
        return [None if x is None else x.to(self.dtype).to(dtype).requires_grad_() for x in every]

    def run(self, dtype=None, backward=False):
        tensors = self.tensors(dtype or self.dtype)
        count = len(self.features)
        features, weights, pad_embed = tensors[:count], tensors[count:-1], tensors[-1]
        out = ops.attention_pool(features, *weights, **self.fixed, pad_embed=pad_embed, mask=self.mask, keep=self.keep)
        if not backward:
            return out.detach()
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return torch.autograd.grad((out * weight).sum(), [x for x in tensors if x is not None])

    def check(self, backward=False, rtol=1e-4, atol=1e-5):
        actual = self.run(backward=backward)
        with vlmkern.use_backend("reference"):
            expected = self.run(torch.float64, backward)
        for a, e in zip(*((actual, expected) if backward else ([actual], [expected])), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=rtol, atol=atol)


PROBLEMS = {
    "odd_grid": {},
    "even_grid": {"grid": (4, 6)},
    "no_biases": {"bias": False},
    "window_2x3": {"window": (2, 3), "grid": (3, 7)},
    "window_3x3": {"window": (3, 3), "grid": (5, 7)},
    "one_window": {"window": (4, 5), "grid": (4, 5)},
    "window_1x1": {"window": (1, 1)},
    "one_feature": {"count": 1},
    "three_features": {"count": 3, "channels": 8},
    "one_head": {"heads": 1, "key_dim": 18, "value_dim": 40},
    "pad_embed": {"pad": True},
    "few_kept": {"keep": [11, 0, 4]},
    "kept_twice": {"keep": [3, 7, 3, 3, 0, 7]},
    "most_kept": {"keep": [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11]},
    "most_kept_pad_embed": {"keep": [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], "pad": True},
    "few_kept_pad_embed": {"keep": [1, 5], "pad": True},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32(form, name):
    Problem(**PROBLEMS[name]).check()


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name):
    Problem(**PROBLEMS[name]).check(backward=True)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(form, dtype):
    problem = Problem(dtype=dtype, pad=True, heads=2, key_dim=24, value_dim=24, channels=64)
    actual = problem.run()
    with vlmkern.use_backend("reference"):
        low_precision_close(actual, problem.run)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_gradients(dtype):
    problem = Problem(dtype=dtype, heads=2, key_dim=24, value_dim=24, channels=64, keep=[0, 5, 7, 5])
    actual = problem.run(backward=True)
    with vlmkern.use_backend("reference"):
        by_dtype = {t: problem.run(t, backward=True) for t in (dtype, torch.float64)}
    for index, gradient in enumerate(actual):
        # the gradient by the keys' bias is zero but for rounding, in which any two ways differ
        if index != len(problem.features) + 3:
            low_precision_close(gradient, lambda t, index=index: by_dtype[t][index])


def test_shipped_configurations():
    problem = Problem(grid=(5, 5), heads=3, key_dim=72, value_dim=72, channels=40, dtype=torch.bfloat16)
    # without the small blocks of the other tests
    token = _launch._overrides.set(None)
    try:
        actual = problem.run()
    finally:
        _launch._overrides.reset(token)
    with vlmkern.use_backend("reference"):
        low_precision_close(actual, problem.run)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_mask_dtypes(form, mask_dtype):
    problem = Problem(pad=True)
    problem.mask = (problem.mask > 0.5).to(mask_dtype)
    problem.check()


@pytest.mark.parametrize(
    "views",
    [
        lambda wide: list(wide.split(21, dim=-1)),
        lambda wide: [wide[..., :21], wide[..., 5:26]],
        lambda wide: [wide[:1, :, :21].expand(2, -1, -1), wide[:, :, 21:]],
        lambda wide: [wide[:, :, :21].flip(0)[:], wide.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 21:]],
    ],
    ids=["halves", "overlapping", "expanded", "tiles_inside"],
)
def test_strides(form, views):
    problem = Problem()
    problem.features = views(torch.randn(2, 15, 42))
    tensors = [None if x is None else x.double() for x in problem.weights]
    actual = ops.attention_pool(problem.features, *problem.weights, **problem.fixed)
    with vlmkern.use_backend("reference"):
        expected = ops.attention_pool([x.double() for x in problem.features], *tensors, **problem.fixed)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_windows_of_no_tile_are_zeros(form):
    problem = Problem(tiles=0)
    arguments = (problem.features, *problem.weights, [3, 5], 2, [2, 2], None, None, torch.tensor([4, 0]))
    assert not gpu.attention_pool(AttentionPool(*arguments)).any()


@pytest.mark.parametrize("options", [{"tiles": 0}, {"keep": []}])
def test_nothing_to_do(form, options):
    problem = Problem(**options)
    assert problem.run().shape == ((0, 11) if "keep" in options else (0, 6, 11))
    assert all(not gradient.any() for gradient in problem.run(backward=True))


def test_indices_that_were_not_checked_reach_nothing_outside(form):
    """On GPUs the values of keep are trusted by the host."""
    problem = Problem(keep=[0, 11])
    expected = problem.run()
    problem.keep = torch.tensor([-5, 2**40])
    arguments = (problem.features, *problem.weights, [3, 5], 2, [2, 2], None, None, problem.keep)
    torch.testing.assert_close(gpu.attention_pool(AttentionPool(*arguments)), expected)


def test_not_finite_as_the_reference(form):
    problem = Problem()
    problem.features[0][0, 7, 3] = torch.nan
    actual = problem.run()
    with vlmkern.use_backend("reference"):
        expected = problem.run()
    assert torch.equal(actual.isnan(), expected.isnan()) and actual.isnan().any() and not actual.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("half", ["keys", "values"])
def test_a_bias_that_is_not_finite(form, value, half):
    """A finite bias of the keys drops out of the softmax; of another, all of its head is NaN."""
    problem = Problem()
    problem.weights[3][3 if half == "keys" else 20] = value
    actual = [problem.run(), *problem.run(backward=True)]
    with vlmkern.use_backend("reference"):
        expected = [problem.run(), *problem.run(backward=True)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert actual[0].isfinite().sum() == 0


@pytest.mark.parametrize("name", ["odd_grid", "one_head", "few_kept", "pad_embed"])
def test_gradients_of_features_that_are_not_finite(name):
    problem = Problem(**PROBLEMS[name])
    problem.features[0][0, 0, 3], problem.features[1][1, 4, 2] = torch.nan, torch.inf
    actual = problem.run(backward=True)
    with vlmkern.use_backend("reference"):
        expected = problem.run(backward=True)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isfinite(), e.isfinite())
    # the biases' among them
    assert not any(actual[index].isfinite().any() for index in (3, 5))


def test_differences_between_scores_of_1e9_count(form):
    """Scores 2^30 + 128 i are exact in float32, as are their differences; their product with the scale is not."""
    features = torch.zeros(1, 4, 2)
    features[0, :, 0] = 2.0**23 + torch.tensor([0, 1, 2, 4])
    features[0, :, 1] = torch.arange(4)
    key_dim = 3000
    w_q, b_q, w_kv = torch.zeros(key_dim, 2), torch.zeros(key_dim), torch.zeros(key_dim + 1, 2)
    b_q[0], w_kv[0, 0], w_kv[-1, 1] = 128, 1, 1
    out = ops.attention_pool([features], w_q, b_q, w_kv, None, torch.ones(1, 1), None, grid=(2, 2), num_heads=1)
    key, value = features[0].double().unbind(1)
    expected = (128 * key * key_dim**-0.5).softmax(0) @ value
    torch.testing.assert_close(out.double(), expected.view(1, 1, 1), rtol=1e-5, atol=0)


class Strided(Problem):
    """The same with weights, biases, mask and indices that are not dense."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mask, self.keep = apart(self.mask.float()), apart(self.keep)

    def tensors(self, dtype):
        given = super().tensors(dtype)
        return [*given[:2], *(apart(x.detach()).requires_grad_() for x in given[2:])]


@pytest.mark.parametrize("name", ["few_kept_pad_embed", "most_kept_pad_embed"])
def test_arguments_that_are_not_dense(form, name):
    Strided(**PROBLEMS[name]).check()


def test_gradients_of_arguments_that_are_not_dense():
    Strided(**PROBLEMS["few_kept_pad_embed"]).check(backward=True)


def test_bitwise_repeatable():
    problem = Problem(keep=[3, 7, 3, 0], pad=True)
    for a, b in zip(problem.run(backward=True), problem.run(backward=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", range(9))
def test_partial_gradients(trained):
    problem = Problem(pad=True)
    tensors = [x.detach() for x in problem.tensors(torch.float32)]
    tensors[trained].requires_grad_()

    def gradient():
        features, weights, pad_embed = tensors[:2], tensors[2:8], tensors[8]
        out = ops.attention_pool(features, *weights, **problem.fixed, pad_embed=pad_embed, mask=problem.mask)
        return torch.autograd.grad(out.square().sum(), tensors[trained])[0]

    actual = gradient()
    with vlmkern.use_backend("reference"):
        torch.testing.assert_close(actual, gradient(), rtol=1e-4, atol=1e-4)


def test_the_form_is_chosen_by_cost():
    def absorbs(heads, key_dim, value_dim, width=2304):
        features = [torch.empty(13, 729, width // 2, dtype=torch.bfloat16, device="meta")] * 2
        windows = gpu.Windows(features, [27, 27], [2, 2], None, None, None)
        return gpu._absorbs(windows, heads * key_dim, heads * value_dim, heads, 2)

    assert absorbs(1, 1152, 2304) and not absorbs(16, 72, 72)


def test_declines_what_it_has_no_kernel_for():
    with pytest.raises(vlmkern.BackendUnavailable, match="5 features"):
        Problem(count=5, channels=4).run()
    with pytest.raises(vlmkern.BackendUnavailable, match="float64"):
        Problem().run(torch.float64)
