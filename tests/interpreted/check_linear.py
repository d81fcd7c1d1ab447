"""The Triton kernels of `vlmkern.ops.linear` in the interpreter: every activation, with and without bias and residual,
forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strided import apart
from support import LOW_PRECISION, low_precision_close

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch
from vlmkern.kernels.linear import epilogue as kernels

EAGER = {
    "none": lambda y: y,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}
ACTIVATIONS = [name for name in EAGER if name != "none"]
SMALL = {"BLOCK_M": 4, "BLOCK_N": 16, "num_warps": 4}
# where functions of this kind go wrong: their zeros, tails, ends and beyond
VALUES = [0.0, -0.0, 1e-30, 0.75, -0.75, 3.0, -3.0, 6.0, -6.0, 14.0, -14.0, 29.0, -29.0, 31.0, -31.0, 200.0, -200.0]
EXTREMES = [3e4, -3e4, torch.inf, -torch.inf, torch.nan]


@pytest.fixture(autouse=True)
def triton_backend():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    with vlmkern.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["small", "shipped"])
def blocks(request):
    if request.param == "shipped":
        yield
        return
    with _launch.forced("linear_fwd_kernel", SMALL), _launch.forced("linear_bwd_kernel", SMALL):
        yield


def make(rows, inputs, outputs, dtype=torch.float32):
    tensors = (
        torch.randn(rows, inputs),
        torch.randn(outputs, inputs) * inputs**-0.5,
        torch.randn(outputs),
        torch.randn(rows, outputs),
    )
    return [t.to(dtype) for t in tensors]


def eager(x, weight, bias=None, residual=None, activation="none"):
    y = EAGER[activation](F.linear(x, weight, bias))
    return y if residual is None else y + residual


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("rows, outputs", [(1, 1), (3, 17), (9, 300)])
def test_float32(blocks, activation, rows, outputs):
    x, weight, *others = make(rows, 24, outputs)
    for present in ((True, True), (True, False), (False, True), (False, False)):
        bias, residual = (t if there else None for t, there in zip(others, present, strict=True))
        y = ops.linear(x, weight, bias, activation=activation, residual=residual)
        torch.testing.assert_close(y, eager(x, weight, bias, residual, activation), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("activation", EAGER)
def test_low_precision(blocks, dtype, activation):
    tensors = make(13, 64, 75, dtype)
    y = ops.linear(*tensors[:3], activation=activation, residual=tensors[3])
    assert y.dtype == dtype
    low_precision_close(y, lambda t: eager(*(v.to(t) for v in tensors), activation))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(dtype, activation):
    """Against float64, whose infinities are the mathematics': torch's float32 on CPUs makes NaN of gelu(inf)."""
    values = torch.tensor(VALUES).to(dtype)
    actual = kernels.finish_(values[None].clone(), None, activation, None)[0]
    exact = EAGER[activation](values.double())
    bound = 2 * torch.finfo(dtype).eps
    assert ((actual.double() - exact).abs() <= bound * exact.abs() + bound * values.double().abs() * 1e-2).all()
    extremes = torch.tensor(EXTREMES).to(dtype)
    actual = kernels.finish_(extremes[None].clone(), None, activation, None)[0]
    torch.testing.assert_close(actual, EAGER[activation](extremes.double()).to(dtype), equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_of_values(activation):
    values = torch.tensor([*VALUES, 1e20, -1e20, 3e38, -3e38]).double().requires_grad_()
    (exact,) = torch.autograd.grad(EAGER[activation](values).sum(), values)
    y = values.detach().float()[None]
    actual = kernels.activation_bwd_(torch.ones_like(y), y.clone(), None, activation)[0]
    torch.testing.assert_close(actual.double(), exact.nan_to_num(0.0, 0.0, 0.0), rtol=1e-5, atol=1e-6)
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan]).double().requires_grad_()
    (expected,) = torch.autograd.grad(EAGER[activation](extremes).sum(), extremes)
    y = extremes.detach().float()[None]
    actual = kernels.activation_bwd_(torch.ones_like(y), y.clone(), None, activation)[0]
    torch.testing.assert_close(actual.double(), expected, equal_nan=True)


def test_strides_and_leading_dimensions(blocks):
    x, weight = torch.randn(40, 6).T.reshape(2, 3, 40), torch.randn(9, 80)[:, 5:45]
    for residual in (torch.randn(9, 6).T, torch.randn(6, 20)[:, 4:13], torch.randn(1, 9).expand(6, -1)):
        given = residual.unflatten(0, (2, 3))
        y = ops.linear(x, weight, torch.randn(18)[::2], activation="silu", residual=given)
        assert y.shape == (2, 3, 9) and y.is_contiguous()
        y = ops.linear(x, weight, residual=given)
        torch.testing.assert_close(y, eager(x, weight, None, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", EAGER)
def test_arguments_that_are_not_dense(blocks, activation):
    tensors, weight = make(6, 12, 37), torch.randn(6, 37)
    strided = [apart(t).requires_grad_() for t in tensors]
    y = ops.linear(*strided[:3], activation=activation, residual=strided[3])
    torch.testing.assert_close(y, eager(*tensors, activation), rtol=1e-5, atol=1e-5)
    expected = gradients([t.requires_grad_() for t in tensors], weight, activation)
    for a, e in zip(gradients(strided, apart(weight), activation), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_arguments_are_not_written_to():
    tensors = make(5, 16, 9)
    before = [t.clone() for t in tensors]
    for activation in EAGER:
        ops.linear(*tensors[:3], activation=activation, residual=tensors[3])
        ops.linear(*tensors[:3], activation=activation)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 5), (3, 0, 5), (3, 8, 0)])
def test_nothing_to_do(shape):
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias, residual = torch.randn(outputs), torch.randn(rows, outputs)
    for activation in EAGER:
        y = ops.linear(x, weight, bias, activation=activation, residual=residual)
        torch.testing.assert_close(y, eager(x, weight, bias, residual, activation))


def test_gradients_of_nothing():
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    ops.linear(x, weight, activation="silu").sum().backward()
    assert x.grad.shape == x.shape and weight.grad.eq(0).all()


def gradients(tensors, weight, activation, with_bias=True, with_residual=True):
    x, w, b, r = tensors
    y = ops.linear(x, w, b if with_bias else None, activation=activation, residual=r if with_residual else None)
    used = [x, w, *([b] if with_bias else []), *([r] if with_residual else [])]
    return torch.autograd.grad((y * weight).sum(), used)


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("present", [(True, True), (False, False)])
def test_gradients(blocks, activation, present):
    tensors = [t.requires_grad_() for t in make(6, 12, 37)]
    weight = torch.randn(6, 37)
    actual = gradients(tensors, weight, activation, *present)
    with vlmkern.use_backend("reference"):
        doubles = [t.detach().double().requires_grad_() for t in tensors]
        expected = gradients(doubles, weight.double(), activation, *present)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_low_precision_gradients(dtype, activation):
    tensors = [t.requires_grad_() for t in make(9, 40, 24, dtype)]
    weight = torch.randn(9, 24).to(dtype)

    def run(index, t):
        inputs = [x.detach().to(t).requires_grad_() for x in tensors]
        return torch.autograd.grad((eager(*inputs, activation) * weight.to(t)).sum(), inputs)[index]

    for index, gradient in enumerate(gradients(tensors, weight, activation)):
        low_precision_close(gradient, lambda t, index=index: run(index, t))


@pytest.mark.parametrize("trained", range(4))
def test_partial_gradients_of_a_sum(trained):
    tensors = make(7, 6, 5)
    tensors[trained].requires_grad_()
    x, w, b, r = tensors
    ops.linear(x, w, b, activation="gelu_tanh", residual=r).sum().backward()
    actual, tensors[trained].grad = tensors[trained].grad, None
    eager(x, w, b, r, "gelu_tanh").sum().backward()
    torch.testing.assert_close(actual, tensors[trained].grad, rtol=1e-4, atol=1e-5)


def test_bitwise_repeatable(blocks):
    tensors = [t.requires_grad_() for t in make(7, 16, 40, torch.bfloat16)]
    weight = torch.ones(7, 40, dtype=torch.bfloat16)
    for a, b in zip(*(gradients(tensors, weight, "gelu_tanh") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_no_kernel_where_nothing_is_left_to_do():
    x, weight, bias, residual = make(3, 8, 5)
    for activation, others, expected in (("none", None, 0), ("none", residual, 1), ("silu", None, 1)):
        with _launch.recording(90) as launches:
            ops.linear(x, weight, bias, activation=activation, residual=others)
        assert len(launches) == expected


def test_declines_what_it_has_no_kernel_for():
    x, weight, _, _ = make(3, 8, 5, torch.float64)
    with pytest.raises(vlmkern.BackendUnavailable, match="float64"):
        ops.linear(x, weight)
