"""Kernels are compiled for a model, not for its inputs: new numbers of images, tokens, segments, windows and rows, and
new layouts of the same alignment, find the binaries of those before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from vlmkern.aot import compile_launch
from vlmkern.kernels import _launch
from vlmkern.kernels.add_layer_norm import norm as add_layer_norm
from vlmkern.kernels.attention import backward as attention_bwd
from vlmkern.kernels.attention import forward as attention_fwd
from vlmkern.kernels.attention_pool import absorbed as attention_pool_absorbed
from vlmkern.kernels.attention_pool import backward as attention_pool_bwd
from vlmkern.kernels.attention_pool import forward as pool
from vlmkern.kernels.attention_pool.windows import Windows
from vlmkern.kernels.linear import epilogue
from vlmkern.kernels.rms_norm import norm as rms_norm
from vlmkern.kernels.swiglu_mlp import gate as swiglu_mlp

DTYPES = (torch.bfloat16, torch.float32)
ATTENTION = ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkv_kernel")
# Triton's own rules tell 1 and multiples of 16 from the rest
COUNTS = (1, 2, 13, 16, 37, 64, 256, 729, 1024, 4093)


def compilations(calls: Iterable[Callable[[], Any]], dtype: torch.dtype, tma: bool = False) -> Counter[str]:
    """How often each kernel is compiled for these calls, one after the other, in one configuration."""
    found = set()

    def seen(key, fn, **_):
        found.add((fn.name.rsplit(".", 1)[-1], key))
        # nothing needs the binary
        return True

    with ExitStack() as stack:
        for kernel in (*ATTENTION, "swiglu_mlp_fwd_kernel"):
            configs = [config for _, config in _launch.rows(kernel, 90, dtype.itemsize * 8) if config["TMA"] == tma]
            if configs:
                stack.enter_context(_launch.forced(kernel, configs[-1]))
        launches = stack.enter_context(_launch.recording(90))
        for call in calls:
            call()
    for launch in launches:
        launch.kernel.device_caches.clear()  # of what other tests compiled
    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, seen
    try:
        for launch in launches:
            compile_launch(launch, 90)
    finally:
        knobs.runtime.jit_cache_hook = before
    return Counter(name for name, _ in found)


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def once(*names):
    return dict.fromkeys(names, 1)


def attention(q, k, v, bounds=None, longest=None, **options):
    out, lse = attention_fwd.attention_fwd(q, k, v, 0.1, bounds, longest, **options)
    attention_bwd.attention_bwd(out, q, k, v, out, lse, 0.1, bounds, longest, **options)


def layouts(images, tokens, heads, head_dim, dtype):
    """q, k and v [B, N, H, D] as views of all that projections write."""
    yield empty(images, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
    yield empty(images, tokens, heads, 3, head_dim, dtype=dtype).unbind(3)
    yield [empty(images, tokens, heads, head_dim, dtype=dtype)] * 3
    yield [empty(images, heads, tokens, head_dim, dtype=dtype).transpose(1, 2)] * 3
    yield empty(3, images, heads, tokens, head_dim, dtype=dtype).transpose(2, 3).unbind(0)
    yield [empty(tokens, images, heads, head_dim, dtype=dtype).transpose(0, 1)] * 3


@pytest.mark.parametrize("dtype, tma", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_attention(head_dim, dtype, tma):
    calls = [
        lambda qkv=qkv: attention(*qkv)
        for images, heads in ((1, 16), (13, 16), (16, 16), (3, 1), (2, 25))
        for tokens in COUNTS
        for qkv in layouts(images, tokens, heads, head_dim, dtype)
    ]
    assert compilations(calls, dtype, tma) == once(*ATTENTION)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_attention(dtype):
    calls = []
    for segments, longest in ((1, 1), (1, 16), (3, 729), (13, 729), (16, 1024), (37, 41), (400, 64)):
        tokens = segments * longest - segments // 2
        for qkv in layouts(1, tokens, 16, 72, dtype):
            bounds = torch.empty(segments + 1, dtype=torch.int32, device="meta")
            packed = [x[0] for x in qkv]
            calls += [lambda args=(*packed, bounds, longest): attention(*args)]
            calls += [lambda args=(*packed, bounds, None): attention(*args)]
    assert compilations(calls, dtype) == once(*ATTENTION)


@pytest.mark.parametrize("dtype, tma", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_attention_of_other_lengths_windows_and_tables(dtype, tma):
    """Keys have other lengths than queries throughout: where they have the same, kernels are others."""
    calls = []
    for images, queries, keys in ((1, 16, 1024), (13, 729, 64), (3, 37, 4093), (1, 1, 16), (2, 256, 2), (16, 64, 729)):
        q, kv = empty(images, queries, 16, 72, dtype=dtype), empty(images, keys, 2, 4, 72, dtype=dtype)
        for left, right, softcap in ((64, 0, 50.0), (1, 16, 30.0), (4096, 3, 0.5)):
            for rows in ((queries, keys), ((images, queries), (images, keys))):
                n, m = (size if isinstance(size, tuple) else (size,) for size in rows)
                tables = [empty(*size, 36, dtype=torch.float32) for size in (n, n, m, m)]
                options = {"left": left, "right": right, "softcap": softcap}
                options |= dict(zip(("cos", "sin", "cos_k", "sin_k"), tables, strict=True))
                calls.append(lambda q=q, kv=kv, options=options: attention(q, *kv.unbind(2), **options))
    # there, and back from float32
    assert compilations(calls, dtype, tma) == once(*ATTENTION) | {"attention_rotary_kernel": 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_attention_of_other_lengths(dtype):
    calls = []
    for segments, longest, longest_k in ((1, 1, 16), (3, 729, 64), (16, 1024, 1), (37, 41, 256)):
        bounds = torch.empty(segments + 1, dtype=torch.int32, device="meta")
        q = empty(segments * longest, 16, 72, dtype=dtype)
        k, v = empty(segments * longest_k, 2, 16, 72, dtype=dtype).unbind(1)
        options = {"cu_seqlens_k": bounds, "max_seqlen_k": longest_k, "right": 0}
        calls.append(lambda args=(q, k, v, bounds, longest), options=options: attention(*args, **options))
    assert compilations(calls, dtype) == once(*ATTENTION)


@pytest.mark.parametrize("dtype, units", [(torch.bfloat16, 4), (torch.float32, 3)])
def test_attention_compiles_for_the_alignment_of_strides(dtype, units):
    """Of all strides together, which is a power of two up to 16 bytes."""
    calls = []
    for width in range(72, 105):
        x = empty(2, 729, 16, width, dtype=dtype)[..., :72]
        calls.append(lambda x=x: attention(x, x, x))
    # tensors of other strides are not for descriptors
    assert compilations(calls, dtype) == dict.fromkeys(ATTENTION, units)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_pool_of_all_windows(padded, dtype):
    calls = []
    for tiles in COUNTS[:-2]:
        kind = torch.empty(tiles, 729, dtype=torch.uint8, device="meta") if padded else None
        pad_embed = empty(2, 2 * 1152, dtype=dtype) if padded else None
        for features in (
            [empty(tiles, 729, 1152, dtype=dtype) for _ in range(2)],
            empty(tiles, 729, 2, 1152, dtype=dtype).unbind(2),
            empty(tiles, 730, 2, 1152 + 8, dtype=dtype)[:, 1:, :, 8:].unbind(2),
        ):
            calls += _pool_calls(Windows(list(features), [27, 27], [2, 2], None, kind, pad_embed))
    assert compilations(calls, dtype) == _pooled(features=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [72, 1152])
def test_attention_pool_of_kept_windows(channels, dtype):
    calls = []
    for tiles in (1, 13, 16):
        features = [empty(tiles, 729, channels, dtype=dtype)] * 3
        for count in COUNTS:
            keep = torch.empty(count, dtype=torch.int64, device="meta")
            calls += _pool_calls(Windows(features, [27, 27], [2, 2], keep, None, None))
    assert compilations(calls, dtype) == _pooled(features=3)


def _pool_calls(windows, heads=16, head_dim=72):
    dtype = windows.features[0].dtype
    count, columns = windows.count, heads * head_dim
    q, grad = (empty(count, columns, dtype=dtype) for _ in range(2))
    of_slots = empty(count * windows.slots, 2 * columns, dtype=dtype)
    of_patches = empty(windows.features[0].shape[:2].numel(), 2 * columns, dtype=dtype)
    wide, d_slots = empty(count, 1, windows.width, dtype=dtype), empty(count * 4, windows.width, dtype=dtype)
    bias = empty(2 * columns, dtype=dtype)
    pad_kv = None if windows.kind is None else empty(2, 2 * columns, dtype=dtype)
    yield lambda: pool.slots(windows, write=True)
    yield lambda: pool.context(q, of_slots, bias, None, windows, heads, 0.1, gathered=True)
    yield lambda: pool.context(q, of_patches, bias, pad_kv, windows, heads, 0.1, gathered=False)
    yield lambda: attention_pool_absorbed.absorbed(wide, bias[:columns], windows, 0.1)
    yield lambda: attention_pool_bwd.context_bwd(q, of_slots, bias, grad, windows.slots, heads, 0.1)
    kept = attention_pool_bwd.sorted_windows(windows)
    for feature in range(len(windows.features)):
        yield lambda feature=feature: attention_pool_bwd.scatter(d_slots, wide[:, 0], windows, *kept, feature)


def _pooled(features):
    names = ("fwd_slots", "fwd_absorbed", "bwd", "bwd_scatter")
    # slots side by side, and where they are
    return once(*(f"attention_pool_{name}_kernel" for name in names)) | {"attention_pool_fwd_kernel": 2}


@pytest.mark.parametrize("dtype, tma", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_swiglu_mlp(dtype, tma):
    calls = []
    weights, bias = empty(2 * 6144, 1152, dtype=dtype), empty(2 * 6144, dtype=dtype)
    for rows in COUNTS:
        grad = empty(rows, 6144, dtype=dtype)
        for width in (0, 8, 16, 1152):
            x, up = (empty(rows, cols + width, dtype=dtype)[:, :cols] for cols in (1152, 2 * 6144))
            calls += [
                lambda up=up: swiglu_mlp.silu_mul(up),
                lambda *args, g=grad, up=up: swiglu_mlp.silu_mul_bwd(g, up),
            ]
            if swiglu_mlp.takes(x, weights):
                calls.append(lambda x=x: swiglu_mlp.swiglu_mlp_fwd(x, weights, bias))
    product = ["swiglu_mlp_fwd_kernel"] if dtype == torch.bfloat16 else []
    assert compilations(calls, dtype, tma) == once("silu_mul_fwd_kernel", "swiglu_mlp_bwd_kernel", *product)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1152, 4304])
def test_linear(cols, dtype):
    calls = []
    bias = empty(cols, dtype=dtype)
    for rows in COUNTS:
        y = empty(rows, cols, dtype=dtype)
        calls.append(lambda y=y: epilogue.activation_bwd_(y, y, bias, "gelu_tanh"))
        for width in (0, 8, 16, 1152):
            residual = empty(rows, cols + width, dtype=dtype)[:, :cols]
            calls.append(lambda y=y, residual=residual: epilogue.finish_(y, bias, "gelu_tanh", residual))
    assert compilations(calls, dtype) == once("linear_fwd_kernel", "linear_bwd_kernel")


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm(dtype):
    calls = []
    weight = empty(1152, dtype=dtype)
    for rows in COUNTS:
        for width in (0, 8, 16, 1152):
            x = empty(rows, 1152 + width, dtype=dtype)[:, :1152]
            dense = empty(rows, 1152, dtype=dtype)
            calls += [
                lambda x=x, dense=dense: add_layer_norm.add_layer_norm_fwd(x, dense, weight, weight, 1e-6),
                lambda x=x, dense=dense: add_layer_norm.add_layer_norm_bwd(dense, x, x, weight, 1e-6, True),
                # as of a sum
                lambda x=x: add_layer_norm.add_layer_norm_bwd(x[:1].expand_as(x), x, x, weight, 1e-6, True),
            ]
    assert compilations(calls, dtype) == once("add_layer_norm_fwd_kernel", "add_layer_norm_bwd_kernel")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    """Once for rows of one stride, and once for heads of as many sizes as their rows are counted through."""
    calls, weight = [], empty(128, dtype=dtype)
    for rows in COUNTS:
        for heads in (2, 16, 32):
            q, _, _ = empty(2, rows, 3, heads, 128, dtype=dtype).unbind(2)
            for x in (q, q.transpose(1, 2), empty(rows, 136, dtype=dtype)[:, :128]):
                dense = empty(*x.shape, dtype=dtype)
                calls += [
                    lambda x=x: rms_norm.rms_norm_fwd(x, weight, None, 1e-6, 0.0),
                    lambda x=x, dense=dense: rms_norm.rms_norm_bwd(dense, None, x, weight, 1e-6, 1.0, True),
                ]
    found = compilations(calls, dtype)
    assert set(found) == {"rms_norm_fwd_kernel", "rms_norm_bwd_kernel"} and max(found.values()) <= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_turned_heads(dtype):
    """Numbers of tokens and heads, and where tables lie, are no other kernel."""
    calls, weight = [], empty(128, dtype=dtype)
    for tokens in COUNTS:
        for heads in (2, 16):
            q, _, _ = empty(2, tokens, 3, heads, 128, dtype=dtype).unbind(2)
            dense = empty(*q.shape, dtype=dtype)
            for tables in (empty(2, tokens, 64, dtype=torch.float32), empty(2, tokens, 128, dtype=torch.float32)):
                turn = (tables[0][:, :64], tables[1][:, :64])
                calls += [
                    lambda q=q, turn=turn: rms_norm.rms_norm_fwd(q, weight, None, 1e-6, 0.0, *turn),
                    lambda q=q, dense=dense, turn=turn: rms_norm.rms_norm_bwd(
                        dense, None, q, weight, 1e-6, 1.0, True, *turn
                    ),
                ]
    assert compilations(calls, dtype) == once("rms_norm_fwd_kernel", "rms_norm_bwd_kernel")


def test_widths_are_compiled_for():
    """They are a model's, and their alignment decides how wide loads may be."""
    calls = []
    for cols in (1144, 1152, 4304, 4309):
        y = empty(37, cols, dtype=torch.bfloat16)
        calls.append(lambda y=y: epilogue.activation_bwd_(y, y, None, "silu"))
    assert compilations(calls, torch.bfloat16) == {"linear_bwd_kernel": 2}
