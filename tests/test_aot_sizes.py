"""Kernels compile for sizes of one too: Triton makes constants of arguments that are 1, which some code cannot take."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

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


@pytest.fixture
def compiled():
    with _launch.recording(90) as launches:
        yield
    assert launches
    for launch in launches:
        compile_launch(launch, 90)


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 72), (1, 17, 1, 8), (2, 1, 3, 24), (1, 729, 16, 200)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention(compiled, shape, dtype, packed):
    images, tokens, heads, head_dim = shape
    q, k, v = empty(images, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
    bounds = longest = None
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        bounds, longest = torch.empty(images + 1, dtype=torch.int32, device="meta"), tokens
    out, lse = attention_fwd.attention_fwd(q, k, v, -0.1, bounds, longest)
    attention_bwd.attention_bwd(out, q, k, v, out, lse, -0.1, bounds, longest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid, window, channels, count, heads, key_dim, value_dim, kept",
    [
        ([1, 1], [1, 1], 1, 1, 1, 1, 1, None),
        ([2, 2], [2, 2], 8, 2, 1, 8, 8, 1),
        ([3, 3], [2, 2], 16, 4, 2, 8, 4, 3),
        ([27, 27], [9, 9], 64, 2, 16, 72, 72, None),
    ],
)
def test_attention_pool(compiled, grid, window, channels, count, heads, key_dim, value_dim, kept, dtype):
    features = [empty(1, grid[0] * grid[1], channels, dtype=dtype) for _ in range(count)]
    keep = None if kept is None else torch.empty(kept, dtype=torch.int64, device="meta")
    kind = torch.empty(1, grid[0] * grid[1], dtype=torch.uint8, device="meta")
    width, columns = count * channels, heads * (key_dim + value_dim)
    windows = Windows(features, grid, window, keep, kind, empty(2, width, dtype=dtype))
    rows = windows.count
    q, bias = empty(rows, heads * key_dim, dtype=dtype), empty(columns, dtype=dtype)
    of_slots = empty(rows * windows.slots, columns, dtype=dtype)
    of_patches, pad_kv = empty(grid[0] * grid[1], columns, dtype=dtype), empty(2, columns, dtype=dtype)
    for write in (False, True):
        pool.slots(windows, write=write)
    pool.context(q, of_patches, bias, pad_kv, windows, heads, 0.5, gathered=False)
    pool.context(q, of_slots, None, None, windows, heads, 0.5, gathered=True)
    attention_pool_absorbed.absorbed(empty(rows, heads, width, dtype=dtype), bias[: heads * key_dim], windows, 0.5)
    grad = empty(rows, heads * value_dim, dtype=dtype)
    attention_pool_bwd.context_bwd(q, of_slots, bias, grad, windows.slots, heads, 0.5)
    d_slots, d_mean = (empty(n, width, dtype=dtype) for n in (rows * windows.slots, rows))
    attention_pool_bwd.scatter(d_slots, d_mean, windows, *attention_pool_bwd.sorted_windows(windows), count - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 7), (65, 17)])
def test_rows(compiled, rows, cols, dtype):
    x, wide, one = empty(rows, cols, dtype=dtype), empty(rows, 2 * cols, dtype=dtype), empty(cols, dtype=dtype)
    swiglu_mlp.silu_mul(wide)
    swiglu_mlp.silu_mul_bwd(x, wide)
    epilogue.finish_(x, one, "gelu", x)
    epilogue.activation_bwd_(x, x, one, "silu")
    add_layer_norm.add_layer_norm_fwd(x, x, one, None, 1e-6)
    add_layer_norm.add_layer_norm_bwd(x, None, x, one, 1e-6, True)
    for strided in (x, empty(2, rows, 3, 5, cols, dtype=dtype)[:, :, 1].transpose(1, 2)):
        rms_norm.rms_norm_fwd(strided, one, strided, 1e-6, 1.0)
        rms_norm.rms_norm_bwd(strided, None, strided, one, 1e-6, 1.0, True)


@pytest.mark.parametrize("rows, channels, features", [(64, 8, 1), (65, 16, 9), (64, 1, 8), (100, 24, 16)])
def test_swiglu_product(compiled, rows, channels, features):
    x, w_up, b_up = (
        empty(*s, dtype=torch.bfloat16) for s in ((rows, channels), (2 * features, channels), (2 * features,))
    )
    swiglu_mlp.swiglu_mlp_fwd(x, w_up, b_up)
