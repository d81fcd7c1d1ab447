"""The Triton kernels of `vlmkern.ops.rms_norm` in the interpreter, forward and backward."""

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
COLS = [1, 2, 3, 16, 24, 33, 130]
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
    with _launch.forced("rms_norm_fwd_kernel", forward), _launch.forced("rms_norm_bwd_kernel", backward):
        yield


def make(*shape, dtype=torch.float32):
    return [(torch.randn(s) + 0.5).to(dtype) for s in (shape, shape[-1:], shape)]


def ours(x, weight, residual=None, offset=0.0):
    found = ops.rms_norm(x, weight, residual=residual, offset=offset)
    return (found, x) if residual is None else found


def eager(x, weight, residual=None, offset=0.0):
    summed = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(summed.to(wide), x.shape[-1:], weight.to(wide) + offset, 1e-6).to(x.dtype), summed


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", [1, 11])
def test_float32(blocks, rows, cols):
    x, weight, residual = make(rows, cols)
    for other in (residual, None):
        for offset in (0.0, 1.0):
            normed, summed = ours(x, weight, other, offset)
            torch.testing.assert_close(normed, eager(x, weight, other, offset)[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(summed, eager(x, weight, other)[1])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("cols", [24, 1152])
def test_low_precision(dtype, cols):
    x, weight, residual = make(5, cols, dtype=dtype)
    normed, summed = ours(x, weight, residual, 1.0)
    assert normed.dtype == summed.dtype == dtype
    assert torch.equal(summed, x + residual)
    low_precision_close(normed, lambda t: eager(summed.to(t), weight.to(t), None, 1.0)[0])
    assert torch.equal(normed, ours(summed, weight, None, 1.0)[0])


@pytest.mark.parametrize("cols", [128, 2048, 8192])
def test_shipped_configurations(cols):
    tensors = [t.requires_grad_() for t in make(2, cols)]
    weight = torch.randn(2, cols)
    for a, e in zip(gradients(tensors, weight), gradients(tensors, weight, eager), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def views():
    """[2, 3, 4, 24]: rows of one stride, two, three, and more than are counted through, and rows that repeat."""
    qkv = torch.randn(2, 3, 3, 4, 24)
    return (
        torch.randn(2, 3, 4, 24),
        qkv[:, :, 1],
        torch.randn(2, 4, 3, 3, 24)[:, :, 2].transpose(1, 2),
        torch.randn(24, 2, 3, 4).permute(1, 2, 3, 0),
        torch.randn(1, 3, 1, 24).expand(2, 3, 4, -1),
    )


def test_strides(blocks):
    weight = torch.randn(48)[::2]
    for x in views():
        for residual in (None, *views()):
            normed, summed = ours(x, weight, residual)
            assert normed.is_contiguous() and (residual is None or summed.is_contiguous())
            torch.testing.assert_close((normed, summed), eager(x, weight, residual), rtol=1e-4, atol=1e-5)


def test_gradients_of_strided_rows(blocks):
    weight = torch.randn(24, requires_grad=True)
    for x in views():
        for grad in views():
            leaf = x.detach().requires_grad_()
            actual = torch.autograd.grad(ours(leaf, weight)[0], (leaf, weight), grad)
            expected = torch.autograd.grad(eager(leaf, weight)[0], (leaf, weight), grad)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_more_dimensions_than_rows_are_counted_through(blocks):
    x = torch.randn(2, 3, 2, 2, 3, 8).permute(3, 1, 4, 0, 2, 5)
    weight = torch.randn(8)
    torch.testing.assert_close(ours(x, weight)[0], eager(x, weight)[0], rtol=1e-4, atol=1e-5)


def test_heads_are_read_in_place():
    q, _, _ = torch.randn(2, 3, 3, 4, 24).unbind(2)
    for x, levels in ((q, 2), (q.transpose(1, 2), 3), (q.contiguous(), 1)):
        with _launch.recording(90) as launches:
            ops.rms_norm(x, torch.ones(24))
        assert [call.args[0].data_ptr() for call in launches] == [x.data_ptr()]
        assert [call.constants["LEVELS"] for call in launches] == [levels]


def test_arguments_that_are_not_dense(blocks):
    tensors, weight = make(6, 33), torch.randn(6, 33)
    strided = [apart(t).requires_grad_() for t in tensors]
    torch.testing.assert_close(ours(*strided), eager(*tensors), rtol=1e-4, atol=1e-5)
    expected = gradients([t.requires_grad_() for t in tensors], weight, eager)
    torch.testing.assert_close(gradients(strided, apart(weight)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_nothing_to_do(shape):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    normed, summed = ours(x, weight, x)
    assert normed.shape == summed.shape == shape
    normed.sum().backward()
    assert x.grad.shape == shape and weight.grad.eq(0).all()


def test_not_finite_as_the_reference(blocks):
    x, weight, residual = make(5, 33)
    x[0, 32], x[1, 0], residual[2, 5], x[3, 1] = torch.nan, torch.inf, -torch.inf, 3e38
    actual, expected = ours(x, weight, residual), eager(x, weight, residual)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def gradients(tensors, weight, function=ours):
    """Of both results, by those tensors that take gradients."""
    normed, summed = function(*tensors)
    loss = (normed * weight).sum() + (summed * weight.flip(0)).sum()
    return torch.autograd.grad(loss, [t for t in tensors if t is not None and t.requires_grad])


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", [1, 11])
def test_gradients(blocks, rows, cols):
    tensors = [t.requires_grad_() for t in make(rows, cols)]
    weight = torch.randn(rows, cols)
    for chosen in (tensors, [*tensors[:2], None]):
        doubles = [None if t is None else t.detach().double().requires_grad_() for t in chosen]
        actual, expected = gradients(chosen, weight), gradients(doubles, weight.double(), eager)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_gradients(blocks, dtype):
    tensors = [t.requires_grad_() for t in make(20, 72, dtype=dtype)]
    weight = torch.randn(20, 72).to(dtype)

    def run(index, t):
        inputs = [v.detach().to(t).requires_grad_() for v in tensors]
        return gradients(inputs, weight.to(t), eager)[index]

    for index, gradient in enumerate(gradients(tensors, weight)):
        low_precision_close(gradient, lambda t, index=index: run(index, t))


def test_frozen_weights_are_not_summed_over():
    x, weight, _ = make(7, 20)
    with _launch.recording(90) as launches:
        ops.rms_norm(x.requires_grad_(), weight).sum().backward()
    assert [launch.constants.get("PARAMETERS") for launch in launches] == [None, False]


def test_bitwise_repeatable(blocks):
    tensors = [t.requires_grad_() for t in make(11, 72, dtype=torch.bfloat16)]
    weight = torch.randn(11, 72).bfloat16()
    for a, b in zip(gradients(tensors, weight), gradients(tensors, weight), strict=True):
        assert torch.equal(a, b)


def test_declines_what_it_has_no_kernel_for():
    for x in (torch.randn(2, 8).double(), torch.randn(1, 8200), torch.randn(2, 0), torch.randn(1).expand(2**30 + 1, 1)):
        with pytest.raises(vlmkern.BackendUnavailable, match="columns"):
            ops.rms_norm(x, x.new_ones(x.shape[-1]))
