"""The Triton kernels of `vlmkern.ops.attention` in the interpreter: forward and backward, every variant."""

from __future__ import annotations

import pytest
import torch
from support import LOW_PRECISION, low_precision_close

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch
from vlmkern.reference import attention as reference

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


def test_bounds_that_were_not_checked_reach_nothing_outside():
    """On GPUs the values of cu_seqlens are trusted by the host."""
    from vlmkern.kernels.attention import attention_fwd

    q, k, v = (torch.randn(20, 1, 16) for _ in range(3))
    for bounds in ([0, 7, 900], [-50, 7, 20], [0, 15, 3]):
        attention_fwd(q, k, v, 0.25, torch.tensor(bounds, dtype=torch.int32), 20)


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
