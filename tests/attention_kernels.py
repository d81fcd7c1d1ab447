"""What checks of attention's Triton kernels share: small blocks, by pointers and by descriptors, and the comparison of
result and gradients with float64."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from attention_forms import exact

import vlmkern
from vlmkern import ops
from vlmkern.kernels import _launch

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
# wide blocks of what is looped over, and narrow ones
VARIANTS = {
    "pointers": SMALL | {"TMA": False},
    "descriptors": SMALL | {"TMA": True},
    "wide_rows": SMALL | {"BLOCK_M": 64, "BLOCK_N": 16, "TMA": False},
}
KERNELS = ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkv_kernel")


@pytest.fixture(autouse=True)
def triton_backend():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    with vlmkern.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=VARIANTS)
def variant(request):
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(_launch.forced(kernel, VARIANTS[request.param]))
        yield request.param


def tables(*shape):
    angles = 6 * torch.rand(*shape)
    return angles.cos(), angles.sin()


def dense(queries, keys, heads, heads_k, dim, batch=1, dtype=torch.float32):
    q = torch.randn(batch, queries, heads, dim)
    k, v = torch.randn(batch, keys, 2, heads_k, dim).unbind(2)
    return tuple(t.to(dtype) for t in (q, k, v))


def gradients(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def agree(q, k, v, options, rtol=1e-5, atol=5e-6):
    """Result and gradients in float32 with float64's."""
    grad = torch.randn_like(q)
    torch.testing.assert_close(
        ops.attention(q, k, v, **options).double(), exact(q, k, v, **options)[0], rtol=rtol, atol=atol
    )
    found = gradients(lambda *t: ops.attention(*t, **options), (q, k, v), grad)
    expected = gradients(lambda *t: exact(*t, **options)[0], [t.double() for t in (q, k, v)], grad.double())
    for a, e in zip(found, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a.double(), e, rtol=10 * rtol, atol=10 * atol)
