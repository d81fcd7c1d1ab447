"""The C++ kernels of layer norm and RMS norm themselves: every instruction set, strides, threads, arguments they must
refuse, and how exact they are where sums of squares cancel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_backends import run_python
from test_native_properties import DTYPES, strided

import vlmkern
from vlmkern import ops

report = vlmkern.backends()["native"]
pytestmark = pytest.mark.skipif(not report["available"], reason=report.get("reason", ""))

NORMS = pytest.mark.parametrize("centred", [True, False], ids=["layer_norm", "rms_norm"])


def ours(x, residual, weight, bias, centred, eps=1e-5, offset=0.0):
    """(normed, summed) of the op that the flag means; RMS norm has an offset in place of a bias."""
    with vlmkern.use_backend("native"):
        if centred:
            return ops.add_layer_norm(x, residual, weight, bias, eps=eps)
        found = ops.rms_norm(x, weight, residual=residual, eps=eps, offset=offset)
        return (found, x) if residual is None else found


def exact(x, residual, weight, bias, centred, eps=1e-5, offset=0.0):
    """In float64, the sum as rounded to the dtype of x; gradients pass through that rounding."""
    wide = [None if t is None else t.double() for t in (x, residual, weight, bias)]
    total = wide[0] if residual is None else wide[0] + wide[1]
    summed = total + (total.detach().to(x.dtype).double() - total.detach())
    n = summed - summed.mean(-1, keepdim=True) if centred else summed
    n = n / (n.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        n = n * (wide[2] if centred else wide[2] + offset)
    return (n if bias is None or not centred else n + wide[3]), summed


def near(actual, expected, dtype, size=None):
    """A rounding to the dtype, and roundings of float32 next to the largest value."""
    assert actual.shape == expected.shape and actual.dtype == dtype and actual.is_contiguous()
    if expected.numel():
        largest = expected.abs().amax() if size is None else size
        limit = torch.finfo(dtype).eps * expected.abs() + 3e-6 * largest + torch.finfo(dtype).smallest_normal
        assert ((actual.double() - expected).abs() <= limit).all()


@NORMS
@given(data=st.data(), dtype=DTYPES, lead=st.lists(st.integers(0, 5), max_size=4), cols=st.integers(1, 150))
def test_random_shapes_and_strides(centred, data, dtype, lead, cols):
    x, residual = (data.draw(strided((*lead, cols), dtype)) for _ in range(2))
    weight, bias = (data.draw(strided((cols,), dtype)) for _ in range(2))
    residual = residual if data.draw(st.booleans()) else None
    weight = weight if not centred or data.draw(st.booleans()) else None
    bias = bias if data.draw(st.booleans()) else None
    # a column or two are at their mean, or at equal distances from it, and then all is rounding
    arguments = (x, residual, weight, bias, centred, 1e-2, data.draw(st.sampled_from([0.0, 1.0])))
    found, expected = ours(*arguments), exact(*arguments)
    near(found[0], expected[0], dtype)
    assert torch.equal(found[1].double(), expected[1])


@NORMS
@given(data=st.data(), dtype=DTYPES, lead=st.lists(st.integers(0, 9), max_size=4), cols=st.integers(1, 150))
def test_random_gradients(centred, data, dtype, lead, cols):
    x, grad, grad_summed = (data.draw(strided((*lead, cols), dtype)) for _ in range(3))
    weight, bias = (data.draw(strided((cols,), dtype)) for _ in range(2))
    residual = torch.zeros_like(x) if data.draw(st.booleans()) else None
    trained = [t for t in (x, weight, *([bias] if centred else [])) if data.draw(st.booleans())] or [x]

    def gradients(function, leaves):
        arguments = [leaves.get(id(t), t) for t in (x, residual, weight, bias)]
        normed, summed = function(*arguments, centred, 1e-2, 0.5)
        pairs = [(normed, grad.to(normed.dtype))]
        pairs += [] if residual is None else [(summed, grad_summed.to(summed.dtype))]
        outputs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        return torch.autograd.grad(outputs, list(leaves.values()), grads)

    found = gradients(ours, {id(t): t.detach().requires_grad_() for t in trained})
    expected = gradients(exact, {id(t): t.double().requires_grad_() for t in trained})
    # what cancels in a gradient by x is as large as scale * grad * weight, and the scale is at most 10
    size = 10 * (1 + grad.double().abs().max() * (1 + weight.double().abs().max())) if grad.numel() else 1.0
    for a, e, t in zip(found, expected, trained, strict=True):
        terms = 1.0 if t is x else grad.shape[:-1].numel()
        near(a, e, dtype, size * max(terms, 1.0))


EVERY_ISA = """
import torch
import test_native_norms as t
torch.manual_seed(0)
for centred in (True, False):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, cols in ((1, 1), (3, 7), (5, 16), (9, 33), (37, 72), (21, 130), (5, 1152), (6, 2100)):
            x, residual, grad, grad_summed = torch.randn(4, rows, cols).to(dtype).unbind(0)
            weight, bias = torch.randn(2, cols).to(dtype).unbind(0)
            for other in (None, residual):
                leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
                doubles = [v.double().requires_grad_() for v in (x, weight, bias)]
                ours = t.ours(leaves[0], other, *leaves[1:], centred, 1e-2, 1.0)
                # with the sum as rounded, so that upcast arguments are rounded no more
                total = doubles[0] if other is None else doubles[0] + ((x + other).double() - doubles[0].detach())
                exact = t.exact(total, None, *doubles[1:], centred, 1e-2, 1.0)
                t.near(ours[0], exact[0], dtype)
                grads = (grad, grad_summed)[: 1 if other is None else 2]
                kept = [v for v in range(3) if v < 2 or centred]
                found = torch.autograd.grad(ours[: len(grads)], [leaves[v] for v in kept], grads)
                doubled = [g.double() for g in grads]
                expected = torch.autograd.grad(exact[: len(grads)], [doubles[v] for v in kept], doubled)
                for a, e in zip(found, expected):
                    t.near(a, e, dtype, 10 * max(1.0, e.abs().max().item()) * (1 + grad.double().abs().max().item()))
print(t.vlmkern.backends()["native"]["isa"])
"""


@pytest.mark.parametrize("isa", report.get("isas", []))
def test_every_usable_isa_by_force(isa):
    result = run_python(EVERY_ISA, VLMKERN_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


@pytest.mark.parametrize("cols", [33, 1152, 8192])
def test_as_exact_as_torch_where_rows_are_far_from_zero(cols):
    """Large means, and single values a thousand times as large as the rest, at the front, where the pivot is, and
    behind: no more than 1.5 times the error of torch's layer norm, and a few units in the last place of each result."""
    plain = torch.randn(200, cols)
    for mean, places in ((0.0, []), (3000.0, []), (0.0, [0]), (0.0, range(16)), (0.0, [cols - 1]), (50.0, [0, 20])):
        x = plain + mean
        x[:, list(places)] += 1e4
        result = F.layer_norm(x.double(), (cols,), eps=1e-5)
        ours_error, torch_error = (
            (y.double() - result).abs().max()
            for y in (ours(x, None, None, None, True)[0], F.layer_norm(x, (cols,), eps=1e-5))
        )
        assert ours_error <= 1.5 * torch_error + 8 * torch.finfo(torch.float32).eps * result.abs().max(), (mean, places)


def test_rows_of_one_value_have_no_variance():
    """However their mean is rounded on its way: exactly the bias, and a gradient without NaN."""
    values = torch.tensor([0.1, 1e4 / 3, -1e30 / 7, 3e38, 1e-40])
    for cols in (1, 3, 7, 16, 33, 1151):
        x = values[:, None].expand(-1, cols).contiguous().requires_grad_()
        bias = torch.randn(cols)
        normed, _ = ours(x, None, None, bias, True)
        assert torch.equal(normed, bias.expand_as(x))
        (gradient,) = torch.autograd.grad(normed, x, torch.randn(5, cols))
        assert gradient.isfinite().all()


def test_squares_beyond_float32():
    """Are as torch has them: infinite, and the result 0; nothing is NaN that is finite there."""
    x = torch.randn(7, 40) * 1e25
    assert torch.equal(ours(x, None, None, None, True)[0], torch.zeros_like(x))
    assert torch.equal(ours(x, None, torch.ones(40), None, False)[0], torch.zeros_like(x))


@NORMS
def test_threads_change_no_bit(centred):
    x, residual, grad = torch.randn(3, 1001, 200).unbind(0)
    leaves = [t.requires_grad_() for t in (x, torch.randn(200), torch.randn(200))][: 3 if centred else 2]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            normed, summed = ours(leaves[0], residual, *leaves[1:], *([] if centred else [None]), centred)
            results.append([normed, summed, *torch.autograd.grad((normed, summed), leaves, (grad, grad))])
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], result)) for result in results[1:])


@NORMS
def test_sums_over_many_rows_do_not_drift(centred):
    """Of gradients by weight and bias over 100,000 rows, all of one sign: as exact as sums of shares are."""
    x, grad = torch.randn(100_000, 8), torch.rand(100_000, 8) + 1
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    leaves = [bias] if centred else [weight]
    x = x.sign() if not centred else x
    grad = grad * x if not centred else grad
    normed, _ = ours(x, None, weight, bias, centred)
    (found,) = torch.autograd.grad(normed, leaves, grad)
    doubles = [t.double().detach().requires_grad_() for t in (weight, bias)]
    normed, _ = exact(x.double(), None, *doubles, centred)
    (expected,) = torch.autograd.grad(normed, doubles[1:] if centred else doubles[:1], grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)


@NORMS
def test_concurrent_calls(centred):
    def run(x):
        x = x.detach().requires_grad_()
        weight = torch.linspace(-1, 1, x.shape[1], requires_grad=True)
        normed, _ = ours(x, None, weight, None, centred)
        return normed, *torch.autograd.grad(normed.sum(), (x, weight))

    inputs = [torch.randn(64, 513) for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(run, inputs))
    for x, found in zip(inputs, outputs, strict=True):
        assert all(map(torch.equal, found, run(x)))


def buffers(*shapes, dtype=torch.float32):
    """Tensors between guards of NaN, and a function that says whether the guards are as they were, and all between
    them is written."""
    stored = [torch.full((torch.Size(shape).numel() + 64,), torch.nan, dtype=dtype) for shape in shapes]

    def intact():
        return all(t[:32].isnan().all() and t[-32:].isnan().all() and (not t[32:-32].isnan().any()) for t in stored)

    return [t[32:-32] for t in stored], intact


ROWS = (24, 12, 4)  # strides of a dense [2, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, cols", [(1, 1), (5, 33), (130, 72)])
@NORMS
def test_writes_only_its_outputs(centred, rows, cols, dtype):
    extension, code = vlmkern.dispatch.extension.extension(), vlmkern.dispatch.extension.dtype_code(dtype)
    x, residual, grad = torch.randn(3, rows, cols).to(dtype).unbind(0)
    weight, bias = torch.randn(2, cols).to(dtype).unbind(0)
    sizes, strides, nothing = (1, 1, rows, cols), (0, 0, cols), (0, (0, 0, 0))
    (normed, summed), intact = buffers((rows, cols), (rows, cols), dtype=dtype)
    at = [(t.data_ptr(), strides) for t in (x, residual)]
    last = (normed.data_ptr(), summed.data_ptr(), 1e-2, 0.0, 1)
    extension.norm_fwd(code, centred, sizes, *at, weight.data_ptr(), bias.data_ptr(), *last)
    assert intact()
    outputs, intact = buffers((rows, cols), (cols,), (cols,), dtype=dtype)
    at = [(grad.data_ptr(), strides), nothing, (x.data_ptr(), strides)]
    extension.norm_bwd(code, centred, sizes, *at, weight.data_ptr(), *(t.data_ptr() for t in outputs), 1e-2, 0.0, 1)
    assert intact()


FORWARD = [0, True, (2, 2, 3, 4), (64, ROWS), (64, ROWS), 64, 64, 64, 64, 1e-6, 0.0, 1]
BACKWARD = [0, True, (2, 2, 3, 4), (64, ROWS), (64, ROWS), (64, ROWS), 64, 64, 64, 64, 1e-6, 0.0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: 5}, "dtype: got code 5"),
        ({2: (2, -2, 3, 4)}, "shape: got a size of -2"),
        ({2: (2**20, 2**20, 2**20, 4)}, "shape: too large"),
        ({2: (2**62, 1, 1, 0)}, "shape: too large"),
        ({3: (64, (24, -12, 4))}, "x: got a stride of -12"),
        ({3: (64, (24, 2**60, 4))}, "x: got a stride of"),
        ({4: (64, (2**60, 12, 4))}, "residual: got a stride of"),
        ({3: (0, ROWS)}, "null pointer"),
        ({7: 0}, "null pointer"),
        ({4: (0, ROWS)}, "summed: expected with residual"),
        ({8: 0}, "summed: expected with residual"),
    ],
)
def test_forward_refuses_arguments_that_describe_no_memory(changes, message):
    arguments = [changes.get(i, argument) for i, argument in enumerate(FORWARD)]
    with pytest.raises(ValueError, match=message):
        vlmkern.dispatch.extension.extension().norm_fwd(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: -1}, "dtype: got code -1"),
        ({2: (2, 2, 3, -4)}, "shape: got a size of -4"),
        ({2: (0, 2**40, 1, 2**40)}, "shape: too large"),
        ({3: (64, (24, 12, -4))}, "grad: got a stride of -4"),
        ({4: (64, (-24, 12, 4))}, "grad_summed: got a stride of -24"),
        ({5: (64, (24, 12, 2**60))}, "summed: got a stride of"),
        ({3: (0, ROWS)}, "null pointer"),
        ({5: (0, ROWS)}, "null pointer"),
        ({7: 0}, "null pointer"),
    ],
)
def test_backward_refuses_arguments_that_describe_no_memory(changes, message):
    arguments = [changes.get(i, argument) for i, argument in enumerate(BACKWARD)]
    with pytest.raises(ValueError, match=message):
        vlmkern.dispatch.extension.extension().norm_bwd(*arguments)


def test_nothing_to_do_touches_nothing():
    extension, nothing = vlmkern.dispatch.extension.extension(), (0, (0, 0, 0))
    for sizes in ((1, 0, 1, 8), (2, 1, 3, 0)):
        extension.norm_fwd(0, True, sizes, nothing, nothing, 0, 0, 0, 0, 1e-6, 0.0, 1)
        extension.norm_bwd(0, True, sizes, nothing, nothing, nothing, 0, 0, 0, 0, 1e-6, 0.0, 1)
    # gradients by weight and bias that nothing adds to are 0
    (d_weight, d_bias), intact = buffers((8,), (8,))
    pointers = (d_weight.data_ptr(), d_bias.data_ptr())
    extension.norm_bwd(0, True, (1, 0, 1, 8), nothing, nothing, nothing, 0, 0, *pointers, 1e-6, 0.0, 1)
    assert intact() and d_weight.eq(0).all() and d_bias.eq(0).all()


def test_strides_of_single_rows_are_never_followed():
    x, y = torch.randn(8), torch.empty(8)
    far = (x.data_ptr(), (2**62, -(2**62), 2**63 - 1))
    vlmkern.dispatch.extension.extension().norm_fwd(
        0, False, (1, 1, 1, 8), far, (0, (0, 0, 0)), 0, 0, y.data_ptr(), 0, 1e-6, 0.0, 1
    )
    torch.testing.assert_close(y, F.rms_norm(x, (8,), eps=1e-6))
