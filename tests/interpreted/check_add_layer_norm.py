"""The Triton kernels of `vlmkern.ops.add_layer_norm` in the interpreter, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strided import apart
from support import LOW_PRECISION, low_precision_close

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch

# the widths at which a row is one block, two, and two of which the second is not full
COLS = [1, 2, 3, 5, 16, 24, 33, 127, 130]
BLOCKS = {
    "a_row": (
        {"BLOCK_M": 1, "num_warps": 4},
        {"BLOCK_M": 1, "PROGRAMS": 3, "STAGES": 1, "num_warps": 4},
    ),
    "four_rows": (
        {"BLOCK_M": 4, "num_warps": 4},
        {"BLOCK_M": 4, "PROGRAMS": 2, "STAGES": 2, "num_warps": 4},
    ),
}


@pytest.fixture(autouse=True)
def triton_backend():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    with vlmkern.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BLOCKS)
def blocks(request):
    forward, backward = BLOCKS[request.param]
    with (
        _launch.forced("add_layer_norm_fwd_kernel", forward),
        _launch.forced("add_layer_norm_bwd_kernel", backward),
    ):
        yield


def make(rows, cols, dtype=torch.float32):
    shapes = ((rows, cols), (rows, cols), (cols,), (cols,))
    return [(torch.randn(shape) + 0.5).to(dtype) for shape in shapes]


def eager(x, residual=None, weight=None, bias=None, eps=1e-6):
    summed = x if residual is None else x + residual
    return F.layer_norm(summed, x.shape[-1:], weight, bias, eps), summed


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", [1, 11])
def test_float32(blocks, rows, cols):
    x, *others = make(rows, cols)
    for present in ((True, True, True), (False, True, True), (True, False, False), (False, True, False)):
        chosen = [t if there else None for t, there in zip(others, present, strict=True)]
        normed, summed = ops.add_layer_norm(x, *chosen)
        torch.testing.assert_close(normed, eager(x, *chosen)[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(summed, eager(x, *chosen)[1])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("cols", [24, 1152])
def test_low_precision(dtype, cols):
    tensors = make(5, cols, dtype)
    normed, summed = ops.add_layer_norm(*tensors)
    assert normed.dtype == summed.dtype == dtype
    assert torch.equal(summed, tensors[0] + tensors[1])
    low_precision_close(normed, lambda t: eager(*(v.to(t) for v in (summed, torch.zeros(()), *tensors[2:])))[0])
    again, _ = ops.add_layer_norm(summed, None, *tensors[2:])
    assert torch.equal(normed, again)


@pytest.mark.parametrize("cols", [288, 4096, 8192])
def test_shipped_configurations(cols):
    tensors = [t.requires_grad_() for t in make(2, cols)]
    weight = torch.randn(2, cols)
    for a, e in zip(gradients(tensors, weight), gradients(tensors, weight, eager), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_strides_and_leading_dimensions(blocks):
    views = (
        torch.randn(2, 3, 24),
        torch.randn(24, 2, 3).permute(1, 2, 0),
        torch.randn(2, 3, 50)[..., 5:29],
        torch.randn(1, 1, 24).expand(2, 3, -1),
    )
    for x in views:
        for residual in views:
            normed, summed = ops.add_layer_norm(x, residual, torch.randn(48)[::2], None)
            assert normed.is_contiguous() and summed.is_contiguous()
            torch.testing.assert_close(summed, x + residual)
            torch.testing.assert_close(ops.add_layer_norm(x, residual, None, None), eager(x, residual))


def test_arguments_that_are_not_dense(blocks):
    tensors, weight = make(6, 33), torch.randn(6, 33)
    strided = [apart(t).requires_grad_() for t in tensors]
    for a, e in zip(ops.add_layer_norm(*strided), eager(*tensors), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    expected = gradients([t.requires_grad_() for t in tensors], weight, eager)
    for a, e in zip(gradients(strided, apart(weight)), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_nothing_to_do(shape):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    normed, summed = ops.add_layer_norm(x, x, weight, None)
    assert normed.shape == summed.shape == shape
    normed.sum().backward()
    assert x.grad.shape == shape and weight.grad.eq(0).all()


def test_not_finite_as_the_reference(blocks):
    x, residual, weight, bias = make(5, 33)
    x[0, 32], x[1, 0], residual[2, 5] = torch.nan, torch.inf, -torch.inf
    x[3, 1], residual[3, 1] = torch.inf, -torch.inf
    actual, expected = ops.add_layer_norm(x, residual, weight, bias), eager(x, residual, weight, bias)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_large_means_and_rows_of_one_value(blocks):
    x, residual, weight, bias = make(6, 100)
    x += 3000
    x[2], residual[2] = 2.0, 1.0
    normed, _ = ops.add_layer_norm(x, residual, weight, bias)
    exact, _ = eager(*(t.double() for t in (x + residual, torch.zeros(()), weight, bias)))
    torch.testing.assert_close(normed.double(), exact, rtol=1e-3, atol=1e-3)
    assert torch.equal(normed[2], bias)


def gradients(tensors, weight, function=ops.add_layer_norm):
    """Of both results, by those tensors that take gradients."""
    normed, summed = function(*tensors)
    loss = (normed * weight).sum() + (summed * weight.flip(0)).sum()
    return torch.autograd.grad(loss, [t for t in tensors if t is not None and t.requires_grad])


@pytest.mark.parametrize("cols", COLS[1:])
@pytest.mark.parametrize("rows", [1, 11])
def test_gradients(blocks, rows, cols):
    tensors = [t.requires_grad_() for t in make(rows, cols)]
    weight = torch.randn(rows, cols)
    for chosen in (tensors, [tensors[0], None, *tensors[2:]], [*tensors[:2], None, None]):
        # two columns are 1 and -1 whatever they were, so that what reaches x is all rounding
        doubles = [None if t is None else t.detach().double().requires_grad_() for t in chosen]
        actual, expected = gradients(chosen, weight), gradients(doubles, weight.double(), eager)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_gradients(blocks, dtype):
    tensors = [t.requires_grad_() for t in make(20, 72, dtype)]
    weight = torch.randn(20, 72).to(dtype)

    def run(index, t):
        inputs = [v.detach().to(t).requires_grad_() for v in tensors]
        return gradients(inputs, weight.to(t), eager)[index]

    for index, gradient in enumerate(gradients(tensors, weight)):
        low_precision_close(gradient, lambda t, index=index: run(index, t))


@pytest.mark.parametrize("trained", range(4))
@pytest.mark.parametrize("used", [0, 1])
def test_partial_gradients_of_a_sum(trained, used):
    tensors = make(7, 20)
    tensors[trained].requires_grad_()
    if used == 1 and trained > 1:
        pytest.skip("the sum has no weights")
    scale = torch.randn(20)
    (ops.add_layer_norm(*tensors)[used] * scale).sum().backward()
    actual, tensors[trained].grad = tensors[trained].grad, None
    (eager(*tensors)[used] * scale).sum().backward()
    torch.testing.assert_close(actual, tensors[trained].grad, rtol=1e-4, atol=1e-5)


def test_frozen_weights_are_not_summed_over():
    x, residual, weight, bias = make(7, 20)
    x.requires_grad_()
    normed, _ = ops.add_layer_norm(x, residual, weight, bias)
    with _launch.recording(90) as launches:
        normed.sum().backward()
    assert [launch.constants["PARAMETERS"] for launch in launches] == [False]


def test_bitwise_repeatable(blocks):
    tensors = [t.requires_grad_() for t in make(11, 72, torch.bfloat16)]
    weight = torch.randn(11, 72).bfloat16()
    for a, b in zip(gradients(tensors, weight), gradients(tensors, weight), strict=True):
        assert torch.equal(a, b)


def test_declines_what_it_has_no_kernel_for():
    for x in (torch.randn(2, 8).double(), torch.randn(1, 8200), torch.randn(2, 0)):
        with pytest.raises(vlmkern.BackendUnavailable, match="columns"):
            ops.add_layer_norm(x, x, None, None)
