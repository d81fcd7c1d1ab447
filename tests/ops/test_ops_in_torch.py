"""What torch expects of any op, asked of every op: strides, torch.func, results that may be written to, sizes of zero,
backwards that are called by hand, processes that are forked."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import vlmkern
from vlmkern import ops


def attention(rows=5, dtype=torch.float32):
    q, k, v = torch.randn(3, 2, rows, 2, 8, dtype=dtype)
    return ops.attention, (q, k, v)


def attention_packed(rows=5, dtype=torch.float32):
    q, k, v = torch.randn(3, rows, 2, 8, dtype=dtype)
    bounds = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    return lambda q, k, v: ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=rows), (q, k, v)


def pool(heads):
    def make(rows=2, dtype=torch.float32):
        features = torch.randn(2, rows, 15, 6, dtype=dtype)
        w_q, w_kv, w_o = (torch.randn(*s, dtype=dtype) for s in ((8, 12), (14, 12), (5, 6)))
        b_q, b_kv, b_o, pad_embed = (torch.randn(*s, dtype=dtype) for s in ((8,), (14,), (5,), (2, 12)))
        mask = torch.tensor([1.0, 0.0, 0.5]).repeat(5).expand(rows, 15)

        def call(first, second, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed):
            return ops.attention_pool(
                [first, second],
                w_q,
                b_q,
                w_kv,
                b_kv,
                w_o,
                b_o,
                grid=(3, 5),
                num_heads=heads,
                pad_embed=pad_embed,
                mask=mask,
            )

        return call, (*features, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed)

    return make


def swiglu_mlp(rows=7, dtype=torch.float32):
    tensors = [torch.randn(*s, dtype=dtype) for s in ((rows, 6), (20, 6), (5, 10), (20,), (5,))]
    return lambda x, u, d, bu, bd: ops.swiglu_mlp(x, u, d, b_up=bu, b_down=bd), tuple(tensors)


def linear(rows=7, dtype=torch.float32):
    tensors = [torch.randn(*s, dtype=dtype) for s in ((rows, 6), (5, 6), (5,), (rows, 5))]
    return lambda x, w, b, r: ops.linear(x, w, b, activation="gelu_tanh", residual=r), tuple(tensors)


def linear_few_rows(rows=2, dtype=torch.float32):
    return linear(rows, dtype)


def add_layer_norm(rows=7, dtype=torch.float32):
    tensors = [torch.randn(*s, dtype=dtype) for s in ((rows, 6), (rows, 6), (6,), (6,))]
    return lambda x, r, w, b: ops.add_layer_norm(x, r, w, b)[0], tuple(tensors)


def rms_norm(rows=7, dtype=torch.float32):
    tensors = [torch.randn(*s, dtype=dtype) for s in ((rows, 6), (6,), (rows, 6))]
    return lambda x, w, r: ops.rms_norm(x, w, residual=r, offset=0.5)[0], tuple(tensors)


OPS = {
    "attention": attention,
    "attention_packed": attention_packed,
    "attention_pool": pool(2),
    "attention_pool_one_head": pool(1),
    "swiglu_mlp": swiglu_mlp,
    "linear": linear,
    "linear_few_rows": linear_few_rows,
    "add_layer_norm": add_layer_norm,
    "rms_norm": rms_norm,
}


@pytest.fixture(params=OPS)
def case(request):
    """(call, tensors) of each op."""
    return OPS[request.param]()


@pytest.fixture(params=["reference", "auto"])
def backend(request):
    with vlmkern.use_backend(request.param):
        yield


def views(tensor):
    """The same values with other strides, the last dimension's too where it is the only one."""
    if tensor.dim() == 1:
        gaps = torch.full((3 * len(tensor) + 2,), torch.nan, dtype=tensor.dtype)[2:]
        gaps[: 3 * len(tensor) : 3] = tensor
        yield gaps[: 3 * len(tensor) : 3]
        yield tensor[:1].expand(len(tensor))
    else:
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 7), torch.nan, dtype=tensor.dtype)
        wide[..., 3:-4] = tensor
        yield wide[..., 3:-4]
        yield tensor[:1].expand(tensor.shape)


def test_every_argument_strided(case, backend):
    call, tensors = case
    for i, tensor in enumerate(tensors):
        for view in views(tensor):
            given = [*tensors[:i], view, *tensors[i + 1 :]]
            leaves = [t.detach().requires_grad_() for t in given]
            exact = [t.double().requires_grad_() for t in given]
            actual, expected = call(*leaves), call(*exact)
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
            grads = torch.autograd.grad(actual.square().sum(), leaves)
            for a, e in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
                assert (a - e).abs().max() <= 1e-4 * e.abs().max() + 1e-6


def test_gradients_that_overlap(case, backend):
    call, tensors = case
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves)
    for strides in ((0,), (1,), (2, 1), (0, 1), (1, 0)):
        grad = torch.randn(400).as_strided(y.shape, (*[1] * (y.dim() - len(strides)), *strides))
        actual = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        for a, e in zip(
            actual, torch.autograd.grad(y, leaves, grad.clone().contiguous(), retain_graph=True), strict=True
        ):
            assert (a - e).abs().max() <= 1e-5 * e.abs().max() + 1e-6


def test_features_without_channels(backend):
    features = [torch.empty(2, 9, 0, requires_grad=True) for _ in range(3)]
    w_q, w_kv, w_o = (torch.randn(*s).requires_grad_() for s in ((4, 0), (10, 0), (3, 6)))
    b_q, b_kv = torch.randn(4).requires_grad_(), torch.randn(10).requires_grad_()
    y = ops.attention_pool(features, w_q, b_q, w_kv, b_kv, w_o, None, grid=(3, 3), num_heads=2)
    y.sum().backward()
    torch.testing.assert_close(y, (w_o @ b_kv[4:]).expand(2, 4, 3))
    assert all(t.grad.shape == t.shape for t in (*features, w_q, w_kv, w_o, b_q, b_kv))


def test_forward_mode_raises(case, backend):
    call, tensors = case
    tangents = tuple(torch.ones_like(t) for t in tensors)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, tuple(tensors), tangents)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(torch.func.grad(lambda *t: call(*t).sum()), tuple(tensors), tangents)
    for i in range(len(tensors)):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(*(forward_ad.make_dual(t, torch.ones_like(t)) if i == j else t for j, t in enumerate(tensors)))
    with forward_ad.dual_level():
        assert call(*tensors).isfinite().all()


def test_torch_func(case, backend):
    call, tensors = case
    loss = lambda *t: call(*t).square().sum()  # noqa: E731
    leaves = [t.detach().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    every = tuple(range(len(tensors)))
    value, pull = torch.func.vjp(loss, *tensors)
    for actual in (torch.func.grad(loss, argnums=every)(*tensors), pull(torch.ones_like(value))):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="first-order gradients only"):
        torch.func.grad(lambda *t: torch.func.grad(loss)(*t).square().sum())(*tensors)


def test_results_may_be_written_to_in_training(request, case, backend):
    call, tensors = case
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves)
    assert y._base is None
    expected = torch.autograd.grad(y.sum(), leaves)
    y = call(*leaves)
    y += 1
    y.mul_(2)
    if request.node.callspec.params["case"].startswith("attention") and "pool" not in request.node.name:
        # its gradient needs the result, as that of torch's own attention does: torch says so
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), leaves)
        return
    for a, e in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, 2 * e)


@pytest.mark.parametrize("trained", [slice(None), slice(1), slice(1, None)], ids=["all", "input", "weights"])
def test_training_without_a_row(request, backend, trained):
    for name, make in OPS.items():
        call, tensors = make(rows=0)
        leaves = [t.requires_grad_() for t in tensors[trained]]
        y = call(*tensors)
        assert y.numel() == 0, name
        for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert gradient.shape == leaf.shape and gradient.eq(0).all(), name


def test_training_without_a_kept_window(backend):
    features, w_q, w_kv, w_o = (torch.randn(*s).requires_grad_() for s in ((2, 9, 4), (6, 4), (12, 4), (3, 6)))
    keep = torch.empty(0, dtype=torch.int64)
    y = ops.attention_pool([features], w_q, None, w_kv, None, w_o, None, grid=(3, 3), num_heads=2, keep=keep)
    y.sum().backward()
    assert y.shape == (0, 3) and all(t.grad.eq(0).all() for t in (features, w_q, w_kv, w_o))


@pytest.mark.parametrize("sizes", [s for s in itertools.product((0, 3), repeat=4) if 0 in s])
def test_training_with_sizes_of_zero(backend, sizes):
    rows, c, f, e = sizes
    x, up, down, weight = (torch.randn(*s).requires_grad_() for s in ((rows, c), (2 * f, c), (e, f), (e, c)))
    bias, residual = torch.randn(e).requires_grad_(), torch.randn(rows, e).requires_grad_()
    for y, leaves in (
        (ops.swiglu_mlp(x, up, down, b_down=bias), (x, up, down, bias)),
        (ops.linear(x, weight, bias, activation="silu", residual=residual), (x, weight, bias, residual)),
    ):
        assert y.shape == (rows, e)
        for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert gradient.shape == leaf.shape and gradient.isfinite().all()


def test_autocast_takes_rows_that_overlap(case):
    call, tensors = case
    for i, tensor in enumerate(tensors):
        if tensor.dim() < 2:
            continue
        overlapping = torch.randn(tensor.numel() + 1)
        size = tensor.shape[-1]
        strides = [1] * (tensor.dim() - 1)
        strides[0] = size // 2
        view = overlapping.as_strided(tensor.shape, (*strides, 1))
        given = [*tensors[:i], view, *tensors[i + 1 :]]
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*given)
        expected = call(
            *(t.bfloat16() if t.stride(-1) == 1 and i != j else t.contiguous().bfloat16() for j, t in enumerate(given))
        )
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


RAW = torch.ops.vlmkern
X, W, GRAD = torch.randn(6, 4), torch.randn(5, 4), torch.randn(6, 5)
UP, DOWN = torch.randn(20, 4), torch.randn(5, 10)
Q, LSE = torch.randn(2, 5, 2, 8), torch.randn(2, 2, 5)
PACKED, PACKED_LSE = torch.randn(5, 2, 8), torch.randn(2, 5)
POOL = ([torch.randn(2, 9, 4)], torch.randn(6, 4), None, torch.randn(12, 4), None, torch.randn(3, 6))
POOL_REST = ([3, 3], 2, [2, 2], None, None)
POOL_WANTED = [True] * 8


def pool_bwd(grad=None, features=None, w_kv=None, keep=None, wanted=None):
    inputs = [POOL[0] if features is None else features, *POOL[1:3], POOL[3] if w_kv is None else w_kv, *POOL[4:]]
    grad = torch.randn(2, 4, 3) if grad is None else grad
    return RAW.attention_pool_bwd(grad, *inputs, *POOL_REST, keep, POOL_WANTED if wanted is None else wanted)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: RAW.linear_bwd(GRAD[:, :3], X, W, None, "none", [True] * 4, None), "grad"),
        (lambda: RAW.linear_bwd(GRAD[:3], X, W, None, "none", [True] * 4, None), "grad"),
        (lambda: RAW.linear_bwd(GRAD, X, W[:, :2], None, "silu", [True] * 4, None), "weight"),
        (lambda: RAW.linear_bwd(GRAD, X, W, X[0], "silu", [True] * 4, None), "bias"),
        (lambda: RAW.linear_bwd(GRAD.double(), X, W, None, "none", [True] * 4, None), "grad"),
        (lambda: RAW.linear_bwd(GRAD, X, W, None, "tanh", [True] * 4, None), "activation"),
        (lambda: RAW.linear_bwd(GRAD, X, W, None, "none", [True] * 3, None), "wanted"),
        (lambda: RAW.swiglu_mlp_bwd(GRAD, X, UP, DOWN[:, :7], None, [True] * 5, None), "w_up"),
        (lambda: RAW.swiglu_mlp_bwd(GRAD, X, UP[:7], DOWN, None, [True] * 5, None), "w_up"),
        (lambda: RAW.swiglu_mlp_bwd(GRAD[:, :2], X, UP, DOWN, None, [True] * 5, None), "grad"),
        (lambda: RAW.swiglu_mlp_bwd(GRAD, X, UP, DOWN, UP[:7, 0], [True] * 5, None), "b_up"),
        (lambda: RAW.swiglu_mlp_bwd(GRAD, X, UP, DOWN, None, [True], None), "wanted"),
        (lambda: RAW.attention_bwd(Q, Q, Q[:, :, :0], Q, Q, LSE, 1.0, None, None), "k"),
        (lambda: RAW.attention_bwd(Q, Q, Q[:, :2], Q, Q, LSE, 1.0, None, None), "v"),
        (lambda: RAW.attention_bwd(Q[:, :2], Q, Q, Q, Q, LSE, 1.0, None, None), "grad"),
        (lambda: RAW.attention_bwd(Q, Q, Q, Q, Q[..., :4], LSE, 1.0, None, None), "out"),
        (lambda: RAW.attention_bwd(Q, Q, Q, Q, Q, LSE[:, :, :2], 1.0, None, None), "lse"),
        (lambda: RAW.attention_bwd(Q, Q, Q, Q, Q, LSE.double(), 1.0, None, None), "lse"),
        (lambda: RAW.attention_bwd(Q, Q, Q, Q, Q.mT.contiguous().mT, LSE, 1.0, None, None), "out"),
        (lambda: RAW.attention_bwd(*[PACKED] * 5, PACKED_LSE, 1.0, int32(0, 9), 9), "cu_seqlens"),
        (lambda: RAW.attention_bwd(*[PACKED] * 5, PACKED_LSE, 1.0, int32(0, 4, 2, 5), 5), "cu_seqlens"),
        (lambda: RAW.attention_bwd(*[PACKED] * 5, PACKED_LSE, 1.0, int32(0, 5), 2), "max_seqlen"),
        (lambda: RAW.attention(PACKED, PACKED, PACKED, 1.0, int32(0, 2, 9), 9), "cu_seqlens"),
        (lambda: pool_bwd(grad=torch.randn(2, 3, 3)), "grad"),
        (lambda: pool_bwd(grad=torch.randn(2, 4, 2)), "grad"),
        (lambda: pool_bwd(features=[torch.randn(2, 9, 3)]), "w_q"),
        (lambda: pool_bwd(features=[torch.randn(2, 8, 4)]), "features"),
        (lambda: pool_bwd(w_kv=torch.randn(9, 4)), "w_kv"),
        (lambda: pool_bwd(grad=torch.randn(1, 3), keep=torch.tensor([8])), "keep"),
        (lambda: pool_bwd(grad=torch.randn(1, 3), keep=torch.tensor([-1])), "keep"),
        (lambda: pool_bwd(wanted=[True] * 3), "wanted"),
        (lambda: RAW.attention_pool(*POOL, None, *POOL_REST, torch.tensor([8])), "keep"),
        (lambda: RAW.add_layer_norm_bwd(X[:3], None, X, None, None, 1e-6, [True] * 3), "grad"),
        (lambda: RAW.add_layer_norm_bwd(X, X[:, :2], X, None, None, 1e-6, [True] * 3), "grad_summed"),
        (lambda: RAW.add_layer_norm_bwd(X, None, X, X[0, :2], None, 1e-6, [True] * 3), "weight"),
        (lambda: RAW.add_layer_norm_bwd(X, None, X, None, None, 1e-6, [True]), "wanted"),
        (lambda: RAW.rms_norm_bwd(X[:3], None, X, X[0], 1e-6, 0.0, [True] * 2), "grad"),
        (lambda: RAW.rms_norm_bwd(X, X[:, :2], X, X[0], 1e-6, 0.0, [True] * 2), "grad_summed"),
        (lambda: RAW.rms_norm_bwd(X, None, X, X[0, :2], 1e-6, 0.0, [True] * 2), "weight"),
        (lambda: RAW.rms_norm_bwd(X, None, X, X[0].double(), 1e-6, 0.0, [True] * 2), "weight"),
        (lambda: RAW.rms_norm_bwd(X, None, X[0, 0], X[0], 1e-6, 0.0, [True] * 2), "x"),
        (lambda: RAW.rms_norm_bwd(X, None, X, X[0], 1e-6, 0.0, [True]), "wanted"),
        (lambda: RAW.rms_norm(X, X[0], X[:3], 1e-6, 0.0), "residual"),
    ],
)
def test_ops_called_by_hand_check_what_they_are_given(call, argument):
    with pytest.raises((ValueError, TypeError), match=rf"^({argument})"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.attention(None, Q, Q), "q: got NoneType, expected a torch.Tensor"),
        (lambda: ops.attention(Q, None, Q), "k: got None"),
        (lambda: ops.attention(torch.tensor(1.0), Q, Q), r"q: got shape \[\]"),
        (lambda: ops.attention(Q, Q, torch.tensor(1.0)), r"v: got shape \[\]"),
        (lambda: ops.attention(Q, Q, Q, scale=None, cu_seqlens=[0, 5], max_seqlen=5), "'cu_seqlens'"),
        (lambda: ops.linear(None, W), "x: got None"),
        (lambda: ops.linear(torch.tensor(1.0), W), r"x: got shape \[\]"),
        (lambda: ops.linear(X, W, 1.0), "'bias'"),
        (lambda: ops.swiglu_mlp(X, None, DOWN), "w_up: got None"),
        (lambda: ops.swiglu_mlp(torch.tensor(1.0), UP, DOWN), r"x: got shape \[\]"),
        (lambda: ops.add_layer_norm(torch.tensor(1.0), None, None, None), r"x: got shape \[\]"),
        (lambda: ops.rms_norm(None, X[0]), "x: got None"),
        (lambda: ops.rms_norm(X, None), "weight: got None"),
        (lambda: ops.rms_norm(X, X[0], residual=1.0), "'residual'"),
        (lambda: ops.attention_pool(None, *POOL[1:], None, grid=(3, 3), num_heads=2), "features: got NoneType"),
        (lambda: ops.attention_pool(X, *POOL[1:], None, grid=(3, 3), num_heads=2), "features: got Tensor"),
        (lambda: ops.attention_pool([None], *POOL[1:], None, grid=(3, 3), num_heads=2), "'features'"),
        (lambda: ops.attention_pool(*POOL, None, grid=3, num_heads=2), "grid: got int"),
        (lambda: ops.attention_pool(*POOL, None, grid=(3, 3), num_heads=2, window=None), "window: got NoneType"),
    ],
)
def test_what_is_no_tensor_is_named(call, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call()


def test_a_key_bias_that_is_not_a_number_is_seen():
    features, w_q, w_kv, w_o = (torch.randn(*s) for s in ((2, 9, 4), (6, 4), (12, 4), (3, 6)))
    for heads in (1, 2):
        for value in (torch.nan, torch.inf, -torch.inf):
            b_kv = torch.randn(12).index_fill_(0, torch.tensor([4]), value).requires_grad_()
            leaves = [t.clone().requires_grad_() for t in (features, w_q, w_kv, w_o)]
            f, q, kv, o = leaves
            y = ops.attention_pool([f], q, None, kv, b_kv, o, None, grid=(3, 3), num_heads=heads)
            assert y.isnan().all()
            y.sum().backward()
            # key 4 belongs to the last head, which every feature's gradient hears of
            assert f.grad.isnan().all() and b_kv.grad[4].isnan()


def test_features_that_are_not_numbers_reach_the_gradients():
    for backend in ("reference", "auto"):
        f, w_q, w_kv, w_o = (torch.randn(*s) for s in ((2, 9, 4), (6, 4), (12, 4), (3, 6)))
        f[0, 0, 1] = torch.nan
        b_kv = torch.zeros(12, requires_grad=True)
        with vlmkern.use_backend(backend):
            y = ops.attention_pool([f], w_q, None, w_kv, b_kv, w_o, None, grid=(3, 3), num_heads=2)
            y.sum().backward()
        assert y[0, 0].isnan().all() and not y.flatten(0, 1)[1:].isnan().any() and y.flatten(0, 1)[1:].isfinite().all()
        assert b_kv.grad.isnan().all(), backend


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_bfloat16_where_the_cpu_has_no_products_for_it():
    """On such CPUs torch's own products in bfloat16 work, but those of oneDNN that the ops call do not exist."""
    code = """
import torch
from vlmkern import ops
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
for dtype in (torch.bfloat16, torch.float16):
    x, w, b = torch.randn(40, 32), torch.randn(24, 32) / 6, torch.randn(24)
    up, down = torch.randn(48, 32) / 6, torch.randn(16, 24) / 5
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, b, up, down)]
    x, w, b, up, down = leaves
    for call in (lambda x, w, b, up, down: ops.linear(x, w, b, activation="gelu_tanh"),
                 lambda x, w, b, up, down: ops.linear(x[:2], w, b),
                 lambda x, w, b, up, down: ops.swiglu_mlp(x, up, down)):
        y, exact = call(*leaves), call(*(t.double() for t in leaves))
        assert (y.double() - exact).abs().max() < 0.03 * exact.abs().max(), dtype
        y.float().sum().backward()
    features = torch.randn(2, 2, 9, 16, dtype=dtype)
    pool = [torch.randn(*s).to(dtype) / 5 for s in ((16, 32), (16,), (32, 32), (32,), (8, 16), (8,))]
    y = ops.attention_pool(list(features), *pool, grid=(3, 3), num_heads=2)
    exact = ops.attention_pool(list(features.double()), *(t.double() for t in pool), grid=(3, 3), num_heads=2)
    assert (y.double() - exact).abs().max() < 0.03 * exact.abs().max(), dtype
print("fine")
"""
    result = run_python(code, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    assert result.stdout.strip() == "fine", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_forked_while_another_thread_computes():
    code = """
import os, sys, threading, time, torch
from vlmkern import ops
import vlmkern
torch.set_num_threads(1)
layer = torch.nn.Linear(64, 32).requires_grad_(False)
vlmkern.pack(layer)
# few rows: those of more are products of oneDNN, whose own locks a child may find taken
x, q = torch.randn(3, 64), torch.randn(1, 40, 2, 8)
def work():
    ops.linear(x, layer.weight, layer.bias)
    ops.attention(q, q, q)
    ops.swiglu_mlp(x, torch.ones(40, 64), torch.ones(3, 20))
stop = False
def forever():
    while not stop:
        work()
thread = threading.Thread(target=forever)
thread.start()
for _ in range(60):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    until = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, 9)
            stop = True
            sys.exit("a child hangs")
        time.sleep(0.001)
stop = True
print("fine")
"""
    result = run_python(code, OMP_NUM_THREADS="1")
    assert result.stdout.strip() == "fine", result.stderr
