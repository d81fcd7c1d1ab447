"""What `vlmkern.kernels._interpreter` corrects: bfloat16 casts, products and loops, and arithmetic on bit patterns."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import vlmkern.kernels.attention.forward  # noqa: F401  (any kernel patches the interpreter)


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


def test_casts_round_to_nearest():
    x = torch.randn(256) * torch.logspace(-40, 38, 256)
    x[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y = torch.empty(256, dtype=torch.bfloat16)
    cast[(1,)](x, y, 256)
    assert torch.equal(y.nan_to_num(1.5), x.bfloat16().nan_to_num(1.5))
    for wide in (torch.float32, torch.float16):
        z = torch.empty(256, dtype=wide)
        cast[(1,)](y, z, 256)
        assert torch.equal(z.nan_to_num(1.5), y.to(wide).nan_to_num(1.5))


def test_products_and_loops_over_loaded_bounds():
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    dot[(1,)](a, b, c, torch.tensor([2], dtype=torch.int32), 16)
    torch.testing.assert_close(c, 2 * (a.float() @ b.float()), rtol=1e-5, atol=1e-5)


def test_arithmetic_on_bit_patterns_raises():
    a, c = torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    for kernel, arguments in ((add, (a, 16)), (total, (a, c, 16))):
        with pytest.raises(Exception) as error:
            kernel[(1,)](*arguments)
        assert "bfloat16" in str(error.value) or "bfloat16" in str(error.value.__cause__)
