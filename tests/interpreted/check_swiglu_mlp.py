"""The Triton kernels of `vlmkern.ops.swiglu_mlp` in the interpreter: the fused product in every variant, the
elementwise kernels, and the choice between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strided import apart
from support import LOW_PRECISION, low_precision_close

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch
from vlmkern.kernels.swiglu_mlp import gate as kernels

SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
VARIANTS = {
    "pointers": SMALL | {"TMA": False, "PERSISTENT": False},
    "descriptors": SMALL | {"TMA": True, "PERSISTENT": False},
    "persistent": SMALL | {"TMA": True, "PERSISTENT": True},
}


@pytest.fixture(autouse=True)
def triton_backend():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    with vlmkern.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 3)
    with _launch.forced("swiglu_mlp_fwd_kernel", VARIANTS[request.param]):
        yield request.param


def make(rows, channels, features, out, dtype=torch.float32):
    shapes = ((rows, channels), (2 * features, channels), (out, features), (2 * features,), (out,))
    return [
        (torch.randn(shape) * (shape[-1] ** -0.5 if i in (1, 2) else 1)).to(dtype) for i, shape in enumerate(shapes)
    ]


def eager(x, w_up, w_down, b_up=None, b_down=None):
    value, gate = F.linear(x, w_up, b_up).chunk(2, -1)
    return F.linear(F.silu(gate) * value, w_down, b_down)


def eager_hidden(x, w_up, b_up=None):
    value, gate = F.linear(x, w_up, b_up).chunk(2, -1)
    return F.silu(gate) * value


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    "rows, channels, features", [(64, 16, 16), (70, 40, 24), (97, 72, 41), (131, 33, 7), (65, 1, 1)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_fused_product(variant, dtype, rows, channels, features, bias):
    x, w_up, _, b_up, _ = make(rows, channels, features, 1, dtype)
    b_up = b_up if bias else None
    hidden = kernels.swiglu_mlp_fwd(x, w_up, b_up)
    assert hidden.is_contiguous() and hidden.dtype == dtype
    low_precision_close(hidden, lambda t: eager_hidden(x.to(t), w_up.to(t), None if b_up is None else b_up.to(t)))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("shape", [(1, 9), (2, 40), (5, 0)])
def test_whole(dtype, shape):
    """Few rows, with a product of the library's, many, and none."""
    _, w_up, w_down, b_up, b_down = make(1, 40, 24, 9, dtype)
    x = torch.randn(*shape, 40).to(dtype)
    y = ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down)
    assert y.shape == (*shape, 9)
    if y.numel():
        low_precision_close(y, lambda t: eager(*(v.to(t) for v in (x, w_up, w_down, b_up, b_down))))


@pytest.mark.parametrize("rows", [1, 7, 80])
def test_float32(rows):
    tensors = make(rows, 24, 19, 5)
    exact = eager(*(t.double() for t in tensors))
    y = ops.swiglu_mlp(*tensors[:3], b_up=tensors[3], b_down=tensors[4])
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_shipped_configurations():
    for rows in (64, 300):
        x, w_up, w_down, _, _ = make(rows, 136, 264, 8, torch.bfloat16)
        low_precision_close(
            ops.swiglu_mlp(x, w_up, w_down), lambda t, v=(x, w_up, w_down): eager(*(a.to(t) for a in v))
        )
    for _, config in _launch.rows("swiglu_mlp_fwd_kernel", 90, 16):
        x, w_up, _, _, _ = make(150, 136, 136, 1, torch.bfloat16)
        with _launch.forced("swiglu_mlp_fwd_kernel", config):
            low_precision_close(
                kernels.swiglu_mlp_fwd(x, w_up, None), lambda t, v=(x, w_up): eager_hidden(*(a.to(t) for a in v))
            )


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: torch.stack([t, t], 1)[:, 0],
        lambda t: F.pad(t, (3, 4))[:, 3:-4],
        lambda t: t.T.contiguous().T,
    ],
    ids=["dense", "rows_apart", "unaligned", "columns_first"],
)
def test_strides(variant, view):
    x, w_up, w_down, _, _ = make(70, 40, 24, 9, torch.bfloat16)
    expected = ops.swiglu_mlp(x, w_up, w_down)
    assert torch.equal(ops.swiglu_mlp(view(x), w_up, w_down), expected)
    actual = ops.swiglu_mlp(x, view(w_up), view(w_down))
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [3, 70])
def test_arguments_that_are_not_dense(variant, rows):
    """Of the fused product and of the elementwise kernels."""
    tensors = make(rows, 40, 24, 9, torch.bfloat16)
    weight = torch.randn(rows, 9).bfloat16()
    strided = [apart(t).requires_grad_() for t in tensors]
    expected = gradients([t.requires_grad_() for t in tensors], weight)
    for a, e in zip(gradients(strided, apart(weight)), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)
    actual = ops.swiglu_mlp(*strided[:3], b_up=strided[3], b_down=strided[4])
    expected = ops.swiglu_mlp(*tensors[:3], b_up=tensors[3], b_down=tensors[4])
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    # the fused product takes weights whose rows alone are apart
    hidden = kernels.swiglu_mlp_fwd(*strided[:1], tensors[1], strided[3])
    assert torch.equal(hidden, kernels.swiglu_mlp_fwd(*tensors[:2], tensors[3]))
    up, grad = torch.randn(2, rows, 48).bfloat16()
    assert torch.equal(kernels.silu_mul(apart(up)), kernels.silu_mul(up))
    for a, e in zip(
        kernels.silu_mul_bwd(apart(grad[:, :24]), apart(up)), kernels.silu_mul_bwd(grad[:, :24], up), strict=True
    ):
        assert torch.equal(a, e)


def test_rows_that_repeat(variant):
    x, w_up, w_down, _, _ = make(1, 40, 24, 9, torch.bfloat16)
    many = ops.swiglu_mlp(x.expand(70, -1), w_up, w_down)
    assert torch.equal(many, ops.swiglu_mlp(x.repeat(70, 1), w_up, w_down))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_extreme_gates(variant, dtype):
    """Of the elementwise kernel and of the fused product: the largest and smallest values, infinities and NaN."""
    top = torch.finfo(dtype).max
    gate = torch.tensor([0.0, -0.0, 80.0, -80.0, 104.0, -104.0, top, -top, torch.inf, -torch.inf, torch.nan]).to(dtype)
    expected = F.silu(gate.float()).to(dtype)
    up = torch.stack([torch.ones_like(gate), gate], 1)
    actual = kernels.silu_mul(up).flatten()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    if dtype in LOW_PRECISION:
        b_up = torch.cat([torch.ones_like(gate), gate])
        zeros = torch.zeros(len(b_up), 16, dtype=dtype)
        hidden = kernels.swiglu_mlp_fwd(torch.ones(64, 16, dtype=dtype), zeros, b_up)
        torch.testing.assert_close(hidden, expected.expand(64, -1), equal_nan=True, rtol=1e-6, atol=1e-6)


def test_a_bad_row_stays_alone(variant):
    x, w_up, _, _, _ = make(70, 40, 24, 1, torch.bfloat16)
    expected = kernels.swiglu_mlp_fwd(x, w_up, None)
    x[69], x[3, 2] = torch.nan, torch.inf
    actual = kernels.swiglu_mlp_fwd(x, w_up, None)
    good = [i for i in range(70) if i not in (3, 69)]
    assert torch.equal(actual[good], expected[good])
    assert actual[69].isnan().all() and not actual[3].isfinite().any()


def gradients(inputs, weight):
    x, w_up, w_down, b_up, b_down = inputs
    out = ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down)
    return torch.autograd.grad((out * weight).sum(), [t for t in inputs if t.requires_grad])


@pytest.mark.parametrize("rows", [3, 70])
def test_gradients(rows):
    tensors = [t.requires_grad_() for t in make(rows, 12, 37, 6)]
    weight = torch.randn(rows, 6)
    actual = gradients(tensors, weight)
    with vlmkern.use_backend("reference"):
        expected = gradients([t.detach().double().requires_grad_() for t in tensors], weight.double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_gradients(dtype):
    tensors = [t.requires_grad_() for t in make(70, 40, 24, 9, dtype)]
    weight = torch.randn(70, 9).to(dtype)

    def run(index, t):
        inputs = [x.detach().to(t).requires_grad_() for x in tensors]
        return torch.autograd.grad((eager(*inputs) * weight.to(t)).sum(), inputs)[index]

    for index, gradient in enumerate(gradients(tensors, weight)):
        low_precision_close(gradient, lambda t, index=index: run(index, t))


@pytest.mark.parametrize("trained", range(5))
def test_partial_gradients_of_a_sum(trained):
    tensors = make(66, 8, 5, 4, torch.bfloat16)
    tensors[trained].requires_grad_()
    x, w_up, w_down, b_up, b_down = tensors
    ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down).sum().backward()
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    eager(*exact).sum().backward()
    reach = exact[trained].grad.abs().max()
    assert (tensors[trained].grad.double() - exact[trained].grad).abs().max() <= 2e-2 * reach


def test_bitwise_repeatable(variant):
    tensors = [t.requires_grad_() for t in make(70, 40, 24, 9, torch.bfloat16)]
    weight = torch.ones(70, 9, dtype=torch.bfloat16)
    for a, b in zip(gradients(tensors, weight), gradients(tensors, weight), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(kernels.swiglu_mlp_fwd(*(t.detach() for t in tensors[:2]), None) for _ in range(2)))


def test_which_product():
    """The library's in float32, for few rows, and for weights that were transposed."""
    x, w_up, w_down, _, _ = make(70, 40, 24, 9, torch.bfloat16)
    for rows, weight, expected in (
        (x, w_up, "swiglu_mlp_fwd_kernel"),
        (x[:5], w_up, "silu_mul_fwd_kernel"),
        (x, w_up.T.contiguous().T, "silu_mul_fwd_kernel"),
        (x.float(), w_up.float(), "silu_mul_fwd_kernel"),
    ):
        with _launch.recording(90) as launches:
            ops.swiglu_mlp(rows, weight, w_down.to(rows.dtype))
        assert [launch.kernel.__name__ for launch in launches] == [expected]


def test_declines_what_it_has_no_kernel_for():
    with pytest.raises(vlmkern.BackendUnavailable, match="float64"):
        ops.swiglu_mlp(*(t.double() for t in make(3, 4, 5, 6)[:3]))
