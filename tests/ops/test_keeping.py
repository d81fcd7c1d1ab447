"""What ops keep of a forward for their gradients: by default what saves a product, under `recompute` nothing."""

from __future__ import annotations

import pytest
import torch
from support import op_backends
from torch.utils.checkpoint import checkpoint

import vlmkern
from vlmkern import ops

ROWS, CHANNELS, HIDDEN, OUT = (2, 5), 6, 7, 4


def tensors(dtype=torch.float64):
    shapes = ((*ROWS, CHANNELS), (2 * HIDDEN, CHANNELS), (OUT, HIDDEN), (2 * HIDDEN,), (OUT,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def linear(x, w_up, w_down, b_up, b_down, **options):
    return ops.linear(x, w_up, b_up, activation="gelu_tanh", **options)


def swiglu_mlp(x, w_up, w_down, b_up, b_down, **options):
    return ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down, **options)


each_op = pytest.mark.parametrize("op", [linear, swiglu_mlp])


def kept(call):
    """The result, and the shapes of what autograd saves for its gradients."""
    shapes = []

    def save(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        return call(), shapes


@each_op
def test_both_ways_give_the_same_gradients(op):
    inputs = tensors()
    used = inputs if op is swiglu_mlp else [inputs[0], inputs[1], inputs[3]]
    results = [op(*inputs, recompute=again) for again in (False, True)]
    torch.testing.assert_close(*results)
    grad = torch.randn_like(results[0])
    keeping, recomputing = (torch.autograd.grad(y, used, grad) for y in results)
    for a, b in zip(keeping, recomputing, strict=True):
        torch.testing.assert_close(a, b)


@each_op
def test_gradcheck(op):
    inputs = tensors()
    for again in (False, True):
        assert torch.autograd.gradcheck(lambda *t: op(*t, recompute=again), inputs)  # noqa: B023


@pytest.mark.parametrize("backend", op_backends("linear_bwd"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_op
def test_backends_agree_with_float64(op, dtype, backend):
    inputs = tensors(dtype)
    used = inputs if op is swiglu_mlp else [inputs[0], inputs[1], inputs[3]]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    exact_used = exact if op is swiglu_mlp else [exact[0], exact[1], exact[3]]
    with vlmkern.use_backend(backend):
        y = op(*inputs)
        grads = torch.autograd.grad(y.float().square().sum(), used)
    expected = op(*exact, recompute=True)
    limit = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit)
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), exact_used), strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a.double() / scale, b / scale, rtol=0, atol=limit)


@each_op
def test_what_is_kept(op):
    inputs = tensors()
    width = (*ROWS, 2 * HIDDEN)
    (_, by_default), (_, recomputing) = (kept(lambda: op(*inputs, recompute=again)) for again in (False, True))  # noqa: B023
    assert by_default.count(width) == 1 and recomputing.count(width) == 0
    assert sorted(s for s in by_default if s != width) == sorted(recomputing)


def test_nothing_is_kept_that_no_gradient_needs():
    inputs = [t.detach() for t in tensors()]
    residual = torch.randn(*ROWS, 2 * HIDDEN, dtype=torch.float64, requires_grad=True)
    x, w_up, _, b_up, _ = inputs
    for options in ({"activation": "none"}, {"activation": "silu"}):
        y, shapes = kept(lambda: ops.linear(x, w_up, b_up, residual=residual, **options))  # noqa: B023
        assert (*ROWS, 2 * HIDDEN) not in shapes
        (grad,) = torch.autograd.grad(y.sum(), residual)
        assert (grad == 1).all()
    with torch.no_grad():
        assert "_keep" not in str(vlmkern.explain(swiglu_mlp, *tensors()))


@each_op
def test_a_checkpoint_keeps_its_arguments_alone(op):
    inputs = tensors()
    y, shapes = kept(lambda: checkpoint(op, *inputs, use_reentrant=False))
    assert (*ROWS, 2 * HIDDEN) not in shapes
    used = [inputs[0], inputs[1]]
    for a, b in zip(torch.autograd.grad(y.sum(), used), torch.autograd.grad(op(*inputs).sum(), used), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["linear_keep", "swiglu_mlp_keep"])
def test_opcheck(name):
    x, w_up, w_down, b_up, b_down = tensors()
    args = (x, w_up, b_up, "silu", None) if name == "linear_keep" else (x, w_up, w_down, b_up, b_down)
    torch.library.opcheck(getattr(torch.ops.vlmkern, name).default, args)


@each_op
def test_compiled_training_step(op):
    inputs = tensors(torch.float32)
    torch._dynamo.reset()

    def step(*given):
        return op(*given).square().sum()

    expected = torch.autograd.grad(step(*inputs), inputs[:2])
    actual = torch.autograd.grad(torch.compile(step, fullgraph=True)(*inputs), inputs[:2])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@each_op
def test_autocast_and_transforms(op):
    inputs = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(*inputs)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), inputs[0])[0].dtype == torch.float32
    double = tensors()
    of_x = torch.func.grad(lambda x: op(x, *double[1:]).sum())(double[0])
    torch.testing.assert_close(of_x, torch.autograd.grad(op(*double).sum(), double[0])[0])


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 14)])
def test_what_was_kept_is_checked(shape):
    x, w_up, w_down, b_up, _ = (t.detach() for t in tensors())
    grad, wrong = torch.randn(*ROWS, 2 * HIDDEN, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"before: got shape"):
        torch.ops.vlmkern.linear_bwd(grad, x, w_up, b_up, "silu", [True] * 4, wrong)
    with pytest.raises(ValueError, match=r"up: got shape"):
        torch.ops.vlmkern.swiglu_mlp_bwd(grad[..., :OUT], x, w_up, w_down, b_up, [True] * 5, wrong)


@pytest.mark.parametrize("backend", op_backends("linear_bwd"))
def test_what_was_kept_may_have_any_strides(backend):
    x, w_up, w_down, b_up, _ = (t.detach().float() for t in tensors())
    kept = torch.nn.functional.linear(x, w_up, b_up)
    strided = torch.stack([kept.mT, kept.mT], -1)[..., 0].mT
    grad = torch.randn_like(kept)
    for given in (kept, strided):
        of_linear = torch.ops.vlmkern.linear_bwd(grad, x, w_up, b_up, "silu", [True] * 4, given, backend)
        of_swiglu = torch.ops.vlmkern.swiglu_mlp_bwd(grad[..., :OUT], x, w_up, w_down, b_up, [True] * 5, given, backend)
        again = torch.ops.vlmkern.linear_bwd(grad, x, w_up, b_up, "silu", [True] * 4, None, "reference")
        for a, b in zip(of_linear, again, strict=True):
            torch.testing.assert_close(a, b)
        again = torch.ops.vlmkern.swiglu_mlp_bwd(grad[..., :OUT], x, w_up, w_down, b_up, [True] * 5, None, "reference")
        for a, b in zip(of_swiglu, again, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", ["x", 3.0, [1], None])
@each_op
def test_what_is_no_tensor_raises_as_ever(op, bad):
    inputs = tensors()
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        op(bad, *inputs[1:])
