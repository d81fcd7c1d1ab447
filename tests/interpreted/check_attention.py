"""The Triton kernels of `vlmkern.ops.attention` in the interpreter: forward and backward, every variant."""

from __future__ import annotations

import itertools

import pytest
import reference_calls as reference
import torch
from strided import apart
from support import LOW_PRECISION, low_precision_close

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch
from vlmkern.kernels.attention import backward as kernels_bwd
from vlmkern.kernels.attention import forward as kernels

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
VARIANTS = {"pointers": SMALL | {"TMA": False}, "descriptors": SMALL | {"TMA": True}}


@pytest.fixture(autouse=True)
def triton_backend():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    with vlmkern.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=VARIANTS)
def variant(request):
    with (
        _launch.forced("attention_fwd_kernel", VARIANTS[request.param]),
        _launch.forced("attention_bwd_dq_kernel", VARIANTS[request.param]),
        _launch.forced("attention_bwd_dkv_kernel", VARIANTS[request.param]),
    ):
        yield request.param


def fused_qkv(tokens, heads, head_dim, batch=2, dtype=torch.float32):
    return torch.randn(batch, tokens, 3, heads, head_dim).to(dtype).unbind(2)


def exact(q, k, v, scale=None, cu=None, longest=None):
    with vlmkern.use_backend("reference"):
        return ops.attention(q.double(), k.double(), v.double(), scale=scale, cu_seqlens=cu, max_seqlen=longest)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 72, 80, 96])
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_float32(variant, tokens, head_dim):
    q, k, v = fused_qkv(tokens, 2, head_dim)
    torch.testing.assert_close(ops.attention(q, k, v).double(), exact(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(variant, dtype):
    q, k, v = fused_qkv(67, 1, 72, dtype=dtype)

    def eager(t):
        a, b, c = (x.to(t).transpose(1, 2) for x in (q, k, v))
        return ((a @ b.mT * 72**-0.5).softmax(-1) @ c).transpose(1, 2)

    low_precision_close(ops.attention(q, k, v), eager)


@pytest.mark.parametrize("tokens", [113, 729])
def test_shipped_configurations(tokens):
    q, k, v = fused_qkv(tokens, 1, 72, batch=1, dtype=torch.bfloat16)
    out = ops.attention(q, k, v)
    assert (out.double() - exact(q, k, v)).abs().max() < 2e-2


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_scale_and_log_sum_exp(variant, scale):
    q, k, v = fused_qkv(35, 2, 24)
    out, lse = torch.ops.vlmkern.attention(q, k, v, scale, None, None)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), scale, None, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_packed_segments_do_not_see_each_other(variant):
    bounds = torch.tensor([0, 5, 5, 42, 43, 60], dtype=torch.int32)
    q, k, v = (torch.randn(60, 2, 72) for _ in range(3))
    out = ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=37)
    torch.testing.assert_close(out.double(), exact(q, k, v, cu=bounds, longest=37), rtol=1e-5, atol=1e-6)
    for x in (k, v):
        x[5:42] = torch.nan
    poisoned = ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=50)
    assert torch.equal(poisoned[:5], out[:5]) and torch.equal(poisoned[42:], out[42:])
    assert poisoned[5:42].isnan().all()


T = 40
# bounds of T = 40 tokens as GPUs take them, and max_seqlen
UNCHECKED = {
    "gaps_at_both_ends": ([7, 9, 30], T),
    "a_gap_longer_than_the_grid": ([38, 40], 3),
    "segments_longer_than_max_seqlen": ([0, 33, 35, 40], 18),
    "no_segment": ([3], T),
    "max_seqlen_of_0": ([0, 40], 0),
    "empty_segments_alone": ([0, 0, 0], T),
    "outside": ([-(2**31), 7, 2**31 - 1], T),
    "decreasing_behind_the_end": ([0, 40, 40, -(2**31)], T),
}


def covered(bounds, longest):
    """Slices of the segments' tokens: those inside the tensors, and no more than max_seqlen."""
    inside = [min(max(bound, 0), T) for bound in bounds]
    pairs = itertools.pairwise(inside)
    return [slice(start, min(end, start + longest)) for start, end in pairs if start < end and longest]


@pytest.mark.parametrize("name", [name for name in UNCHECKED if not name.startswith("decreasing")])
def test_tokens_of_no_segment_are_zeros(variant, name):
    """On GPUs the values of cu_seqlens are trusted by the host."""
    bounds, longest = UNCHECKED[name]
    cu = torch.tensor(bounds, dtype=torch.int32)
    q, k, v, grad = torch.randn(4, T, 2, 24).unbind(0)
    out, lse = kernels.attention_fwd(q, k, v, 0.3, cu, longest)
    actual = kernels_bwd.attention_bwd(grad, q, k, v, out, lse, 0.3, cu, longest)
    expected, expected_lse = torch.zeros(T, 2, 24).double(), torch.full((2, T), -torch.inf).double()
    gradients = [torch.zeros(T, 2, 24).double() for _ in range(3)]
    for rows in covered(bounds, longest):
        alone = [x[rows][None].double() for x in (q, k, v)]
        result, statistics = reference.attention(*alone, 0.3, None, None)
        expected[rows], expected_lse[:, rows] = result[0], statistics[0]
        of_rows = reference.attention_bwd(grad[rows][None].double(), *alone, result, statistics, 0.3, None, None)
        for whole, part in zip(gradients, of_rows, strict=True):
            whole[rows] = part[0]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    for a, e in zip(actual, gradients, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounds", [UNCHECKED["decreasing_behind_the_end"][0], [0, 15, 3], [20, -(2**31), 40], [40, 0]])
def test_decreasing_bounds_reach_nothing_outside_and_leave_nothing_unwritten(variant, bounds):
    cu = torch.tensor(bounds, dtype=torch.int32)
    q, k, v, grad = torch.randn(4, T, 1, 24).unbind(0)
    out, lse = kernels.attention_fwd(q, k, v, 0.3, cu, T)
    gradients = kernels_bwd.attention_bwd(grad, q, k, v, out, lse, 0.3, cu, T)
    assert not lse.isnan().any() and all(x.isfinite().all() for x in (out, *gradients))


def test_strided_bounds_and_statistics(variant):
    bounds = torch.tensor([0, 5, 5, 37, 40], dtype=torch.int32)
    q, k, v, grad = torch.randn(4, T, 2, 24).unbind(0)
    out, lse = kernels.attention_fwd(q, k, v, 0.3, bounds, 32)
    again = kernels.attention_fwd(q, k, v, 0.3, apart(bounds), 32)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    expected = kernels_bwd.attention_bwd(grad, q, k, v, out, lse, 0.3, bounds, 32)
    strided = [apart(x) for x in (grad, out, lse, bounds)]
    actual = kernels_bwd.attention_bwd(strided[0], q, k, v, *strided[1:3], 0.3, strided[3], 32)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def sparse(tmp_path, monkeypatch, shape, strides):
    """q, k and v [.., 3, D] of 2^31 elements and more, of which a file holds those that are written; 2^31 lie before
    the first, so that an index that overflows reads zeros."""
    from triton.runtime.interpreter import GridExecutor

    # copies all arguments onto themselves
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    reach = 2**31 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=reach, dtype=torch.bfloat16)
    (tmp_path / "sparse").unlink()
    x = memory.as_strided(shape, strides, 2**31)
    x.copy_(torch.randn(shape))
    return x.unbind(-2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "strides", [(48, 2**30, 16, 1), (2**27, 48, 16, 1)], ids=["heads_far_apart", "tokens_far_apart"]
)
def test_tensors_beyond_the_reach_of_32_bits(variant, tmp_path, monkeypatch, strides, packed):
    q, k, v = sparse(tmp_path, monkeypatch, (20, 3, 3, 16), strides)
    bounds, longest = (torch.tensor([0, 20], dtype=torch.int32), 20) if packed else (None, None)
    views = (q, k, v) if packed else (x[None] for x in (q, k, v))
    q, k, v = views
    grad = torch.randn(q.shape).to(q.dtype)

    def run(*tensors):
        out, lse = kernels.attention_fwd(*tensors, 0.25, bounds, longest)
        return out, lse, *kernels_bwd.attention_bwd(grad, *tensors, out, lse, 0.25, bounds, longest)

    for a, e in zip(run(q, k, v), run(*(x.contiguous() for x in (q, k, v))), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("sign", [1, -1])
def test_differences_between_scores_of_1e9_count(variant, dtype, sign):
    """Scores 2^30 + 128 i are exact in float32, as are their differences; their product with a scale is not."""
    q, k, v = (torch.zeros(1, 67, 1, 24) for _ in range(3))
    q[..., 0], k[..., 0] = sign * 2.0**15, 2.0**15
    q[..., 1], k[..., 1] = sign, 128.0 * torch.randint(0, 5, (1, 67, 1))
    v.normal_()
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse = kernels.attention_fwd(q, k, v, sign / 128, None, None)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), sign / 128, None, None)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [3e4, 1e6, 1e12])
def test_gradients_of_extreme_scores_are_finite(variant, size):
    q, k, v = (torch.randn(1, 67, 1, 24) for _ in range(3))
    for gradient in gradients(q * size, k * size, v, torch.randn(q.shape)):
        assert gradient.isfinite().all()


def test_scores_of_minus_infinity_that_fill_a_block(variant):
    """They weigh nothing, be they the first or the last; where there are no others, 0 / 0."""
    for rows in (slice(0, 32), slice(32, 64)):
        q, k, v = fused_qkv(64, 1, 24, batch=1)
        q, k = q.abs(), k.clone()
        k[0, rows, 0, 3] = -torch.inf
        torch.testing.assert_close(ops.attention(q, k, v).double(), exact(q, k, v), rtol=1e-5, atol=1e-6)
    k[..., 3] = -torch.inf
    assert ops.attention(q, k, v).isnan().all()


@pytest.mark.parametrize(
    "views",
    [
        lambda: [torch.randn(2, 3, 21, 24).transpose(1, 2) for _ in range(3)],
        lambda: [torch.randn(2, 21, 3, 40)[..., 9:33] for _ in range(3)],
        lambda: [torch.randn(1, 21, 3, 24).expand(2, -1, -1, -1) for _ in range(3)],
        lambda: [torch.randn(2, 42, 3, 24)[:, ::2], torch.randn(2, 21, 6, 24)[:, :, ::2], torch.randn(2, 21, 3, 24)],
    ],
    ids=["heads_first", "unaligned", "expanded", "mixed"],
)
def test_strides(views):
    q, k, v = views()
    torch.testing.assert_close(ops.attention(q, k, v).double(), exact(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)])
def test_nothing_to_do(shape):
    q = torch.empty(shape, requires_grad=True)
    out = ops.attention(q, q, q)
    assert out.shape == shape
    out.sum().backward()
    assert q.grad.shape == shape


def test_nothing_but_empty_segments():
    q = torch.empty(0, 2, 16)
    assert ops.attention(q, q, q, cu_seqlens=torch.zeros(3, dtype=torch.int32), max_seqlen=0).shape == q.shape


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_as_the_reference(variant, value):
    q, k, v = fused_qkv(40, 1, 16, batch=1)
    k[0, 33, 0, 2] = value
    v[0, 2, 0, 3] = value
    torch.testing.assert_close(ops.attention(q, k, v).double(), exact(q, k, v), rtol=1e-5, atol=1e-6, equal_nan=True)


def gradients(q, k, v, weight, **kwargs):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad((ops.attention(*inputs, **kwargs) * weight).sum(), inputs)


@pytest.mark.parametrize("head_dim", [16, 72, 96])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_gradients(variant, tokens, head_dim, scale):
    q, k, v = fused_qkv(tokens, 2, head_dim)
    weight = torch.randn(q.shape)
    actual = gradients(q, k, v, weight, scale=scale)
    with vlmkern.use_backend("reference"):
        expected = gradients(q.double(), k.double(), v.double(), weight.double(), scale=scale)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_gradients(variant, dtype):
    q, k, v = fused_qkv(50, 1, 72, batch=1, dtype=dtype)
    weight = torch.randn(q.shape).to(dtype)

    def eager(index, t):
        inputs = [x.detach().to(t).requires_grad_() for x in (q, k, v)]
        a, b, c = (x.transpose(1, 2) for x in inputs)
        out = ((a @ b.mT * 72**-0.5).softmax(-1) @ c).transpose(1, 2)
        return torch.autograd.grad((out * weight.to(t)).sum(), inputs)[index]

    for index, gradient in enumerate(gradients(q, k, v, weight)):
        low_precision_close(gradient, lambda t, index=index: eager(index, t))


def test_packed_gradients(variant):
    bounds = torch.tensor([0, 5, 5, 42, 60], dtype=torch.int32)
    q, k, v = (torch.randn(60, 2, 24) for _ in range(3))
    weight = torch.randn(q.shape)
    actual = gradients(q, k, v, weight, cu_seqlens=bounds, max_seqlen=37)
    with vlmkern.use_backend("reference"):
        expected = gradients(q.double(), k.double(), v.double(), weight.double(), cu_seqlens=bounds, max_seqlen=37)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_sum_and_of_one_tensor():
    """A gradient of strides zero; q, k and v one tensor."""
    x = torch.randn(1, 9, 2, 16, requires_grad=True)
    (actual,) = torch.autograd.grad(ops.attention(x, x, x).sum(), x)
    with vlmkern.use_backend("reference"):
        (expected,) = torch.autograd.grad(ops.attention(x, x, x).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_bitwise_repeatable(variant):
    q, k, v = fused_qkv(37, 2, 24)
    weight = torch.randn(q.shape)
    assert torch.equal(ops.attention(q, k, v), ops.attention(q, k, v))
    for a, b in zip(gradients(q, k, v, weight), gradients(q, k, v, weight), strict=True):
        assert torch.equal(a, b)


def test_declines_what_it_has_no_kernel_for():
    for x in (torch.randn(1, 4, 1, 16).double(), torch.randn(1, 4, 1, 264)):
        with pytest.raises(vlmkern.BackendUnavailable, match="head dimension"):
            ops.attention(x, x, x)
