"""Triton kernels on CPU, in Triton's interpreter: a process of their own, as the variable must be set before the
first import of triton."""

from __future__ import annotations

import pytest
from test_backends import run_python

pytest.importorskip("triton")

CHECK = """
import torch, vlmkern
from vlmkern import ops
from vlmkern.kernels import swiglu_mlp as kernels
from vlmkern.reference import swiglu_mlp as reference

assert vlmkern.backends()["triton"]["available"] and vlmkern.backends()["triton"]["interpreter"]
torch.manual_seed(0)
for dtype, rtol in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
    for rows, features in ((1, 1), (3, 7), (2, 1024), (2, 1025)):
        up = (torch.randn(rows, 2 * features) * 4).to(dtype)
        torch.testing.assert_close(kernels.silu_mul(up), reference.silu_mul(up), rtol=rtol, atol=1e-6)
        grad = torch.randn(rows, features).to(dtype)
        limit = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
        for actual, exact in zip(kernels.silu_mul_bwd(grad, up), reference.silu_mul_bwd(grad.double(), up.double())):
            torch.testing.assert_close(actual.double(), exact, rtol=limit, atol=limit)
    wide = torch.randn(4, 50).to(dtype)
    torch.testing.assert_close(kernels.silu_mul(wide[:, 3:37]), reference.silu_mul(wide[:, 3:37]), rtol=rtol, atol=1e-6)

with vlmkern.use_backend("triton"):
    tensors = [torch.randn(*s, requires_grad=True) for s in ((2, 3, 4), (10, 4), (6, 5))]
    actual = torch.autograd.grad(ops.swiglu_mlp(*tensors).sum(), tensors)
expected = torch.autograd.grad(ops.swiglu_mlp(*(t.double() for t in tensors)).sum(), tensors)
for a, e in zip(actual, expected):
    torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
assert ops.swiglu_mlp(torch.randn(0, 4), *tensors[1:]).shape == (0, 6)
print("passed")
"""

MEND = """
import torch, triton, triton.language as tl
from vlmkern.kernels import swiglu_mlp  # applies the mend

@triton.jit
def cast(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o).to(p_y.dtype.element_ty))

@triton.jit
def dot(p_a, p_b, p_c, p_n, N: tl.constexpr):
    o = tl.arange(0, N)
    acc = tl.zeros([N, N], dtype=tl.float32)
    for _ in range(tl.load(p_n)):
        a = tl.load(p_a + o[:, None] * N + o[None, :])
        acc = tl.dot(a, tl.load(p_b + o[:, None] * N + o[None, :]), acc)
    tl.store(p_c + o[:, None] * N + o[None, :], acc)

@triton.jit
def add(p_x, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_x + o, tl.load(p_x + o) + tl.load(p_x + o))

@triton.jit
def total(p_x, p_y, N: tl.constexpr):
    tl.store(p_y, tl.sum(tl.load(p_x + tl.arange(0, N)), 0))

x = torch.randn(256) * torch.logspace(-40, 38, 256)
x[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
y = torch.empty(256, dtype=torch.bfloat16)
cast[(1,)](x, y, 256)
assert torch.equal(y.nan_to_num(1.5), x.bfloat16().nan_to_num(1.5))
for wide in (torch.float32, torch.float16):
    z = torch.empty(256, dtype=wide)
    cast[(1,)](y, z, 256)
    assert torch.equal(z.nan_to_num(1.5), y.to(wide).nan_to_num(1.5))

a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
dot[(1,)](a, b, c, torch.tensor([2], dtype=torch.int32), 16)
torch.testing.assert_close(c, 2 * (a.float() @ b.float()), rtol=1e-5, atol=1e-5)
for kernel, arguments in ((add, (a, 16)), (total, (a, c, 16))):
    try:
        kernel[(1,)](*arguments)
    except Exception as error:
        assert "bfloat16" in str(error) or "bfloat16" in str(error.__cause__), error
    else:
        raise AssertionError("bit arithmetic went through")
print("passed")
"""


@pytest.mark.parametrize("code", [CHECK, MEND], ids=["kernels", "mend"])
def test_interpreter(code, tmp_path):
    # triton reads a kernel's source from its file
    script = tmp_path / "check.py"
    script.write_text(code)
    result = run_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "passed"
