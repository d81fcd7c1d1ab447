"""Rotary, and packed keys of other lengths than queries, in attention's Triton kernels in the interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_forms import exact
from attention_kernels import agree, dense, gradients, tables, triton_backend, variant

from vlmkern import ops
from vlmkern.kernels.attention import backward, forward, rotary

__all__ = ["triton_backend", "variant"]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim, width", [(16, 8), (72, 36), (80, 80), (10, 5), (160, 80)])
def test_rotary(variant, dim, width, interleaved):
    q, k, v = dense(20, 20, 2, 1, dim, batch=2)
    cos, sin = tables(20, dim // 2)
    if width == dim:
        cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    agree(q, k, v, {"rotary": (cos, sin), "interleaved": interleaved})


def test_rotary_by_image_of_keys_and_of_any_strides(variant):
    q, k, v = dense(20, 40, 1, 1, 24, batch=2)
    options = {"causal": True, "rotary_k": tuple(t[::2, 3:15] for t in tables(80, 20))}
    agree(q, k, v, options | {"rotary": tables(2, 20, 12)})
    cos, sin = tables(20, 12)
    # strides that differ, of which kernels take one
    wide = torch.cat((sin, sin), -1)
    agree(q, k, v, options | {"rotary": (cos.expand(2, 20, 12), wide.expand(2, 20, 24)[..., 12:])})


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_queries_and_keys_are_rounded_to_their_dtype(variant, interleaved):
    """As a model's own rotation is, before attention sees them."""
    q, k, v = dense(40, 40, 2, 1, 72, dtype=torch.bfloat16)
    cos, sin = tables(40, 36)
    angle = torch.complex(cos, sin)[:, None]

    def turn(x):
        pairs = x.float().unflatten(-1, (36, 2)) if interleaved else x.float().unflatten(-1, (2, 36)).mT
        product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
        return (product if interleaved else product.mT).flatten(-2).to(x.dtype)

    options = {"rotary": (cos, sin), "interleaved": interleaved}
    out, before = ops.attention(q, k, v, **options), ops.attention(turn(q), turn(k), v)
    # the same but where a rounding falls on the other side
    assert (out.float() - before.float()).abs().max() <= 2e-2 and (out != before).float().mean() < 0.02
    grad = torch.randn_like(q)
    found = gradients(lambda *t: ops.attention(*t, **options), (q, k, v), grad)
    expected = gradients(lambda *t: exact(*t, **options)[0], [t.double() for t in (q, k, v)], grad.double())
    for a, e in zip(found, expected, strict=True):
        assert (a.double() - e).abs().max() <= 3e-2 * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back(dtype, interleaved):
    x = torch.randn(2, 11, 3, 18)
    turn = rotary.tables_of(*tables(2, 11, 9), interleaved)
    there = rotary.turned(x, turn, torch.float32)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    assert (there - x).abs().max() > 0.1
    back = rotary.turned(there, turn, dtype, back=True)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


LENGTHS, LENGTHS_K = [5, 0, 40, 3, 7], [9, 4, 40, 2, 0]


def packed(lengths, lengths_k, heads=2, heads_k=1, dim=24):
    bounds, bounds_k = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths, lengths_k))
    q, k, v = torch.randn(sum(lengths), heads, dim), *torch.randn(2, sum(lengths_k), heads_k, dim)
    of_keys = {"cu_seqlens_k": bounds_k, "max_seqlen_k": max(lengths_k)}
    return q, k, v, {"cu_seqlens": bounds, "max_seqlen": max(lengths), **of_keys}


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (9, 4)}, {"causal": True, "window": (20, -1), "softcap": 3.0, "rotary": True}],
    ids=["lengths", "causal", "window", "everything"],
)
def test_packed(variant, options):
    q, k, v, bounds = packed(LENGTHS, LENGTHS_K)
    if "rotary" in options:
        options = options | {"rotary": tables(len(q), 12), "rotary_k": tables(len(k), 12)}
    agree(q, k, v, bounds | options)


def test_packed_of_equal_lengths(variant):
    q, k, v, bounds = packed(LENGTHS, LENGTHS)
    options = {key: bounds[key] for key in ("cu_seqlens", "max_seqlen")}
    agree(q, k, v, options | {"causal": True, "rotary": tables(len(q), 12)})


def test_packed_segments_of_keys_do_not_bleed(variant):
    q, k, v, bounds = packed(LENGTHS, LENGTHS_K)
    out = ops.attention(q, k, v, causal=True, **bounds)
    k[13:53], v[13:53] = torch.nan, torch.nan
    poisoned = ops.attention(q, k, v, causal=True, **bounds)
    assert torch.equal(poisoned[:5], out[:5]) and torch.equal(poisoned[45:], out[45:])
    assert poisoned[5:45].isnan().all()


@pytest.mark.parametrize("bounds_k", [[7, 9, 30], [0, 3, 60], [20, -(2**31), 40], [0, 15, 3], [0, 0, 0]])
def test_bounds_of_keys_are_not_trusted(variant, bounds_k):
    q, grad = torch.randn(2, 40, 2, 24).unbind(0)
    k, v = torch.randn(2, 40, 1, 24).unbind(0)
    bounds = (torch.tensor([0, 18, 40], dtype=torch.int32), 30, torch.tensor(bounds_k, dtype=torch.int32), 25)
    out, lse = forward.attention_fwd(q, k, v, 0.3, *bounds, right=0)
    found = backward.attention_bwd(grad, q, k, v, out, lse, 0.3, *bounds, right=0)
    assert not lse.isnan().any() and all(x.isfinite().all() for x in (out, *found))
