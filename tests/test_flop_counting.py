"""FLOPs counted by running the assembly, against the closed forms, torch's own counts and the derivation's digits."""

from __future__ import annotations

import pytest
import torch
from test_backends import run_python
from torch.utils.flop_counter import FlopCounterMode

from vlmkern import ops
from vlmkern.efficiency import Sizes, efficiency_rows, formulas
from vlmkern.efficiency import counting as c

SIZES = Sizes()


@pytest.fixture(scope="module")
def model():
    return c.meta_model()


@pytest.mark.parametrize("tokens, tera", [(9477, "37.01"), (2366, "7.31"), (1744, "5.26")])
def test_prefill(model, tokens, tera):
    counted = c.prefill_flops(model, tokens)
    assert counted == formulas.decoder_linear_flops(SIZES, tokens) + formulas.decoder_attention_flops(SIZES, tokens)
    assert f"{counted / 1e12:.2f}" == tera


@pytest.mark.parametrize("layers, tera", [(27, "8.66"), (25, "8.02")])
def test_tower(model, layers, tera):
    counted = c.tower_flops(model, 13, layers)
    expected = formulas.tower_linear_flops(SIZES, 13, layers) + formulas.tower_attention_flops(SIZES, 13, layers)
    assert counted == expected + formulas.patch_embedding_flops(SIZES, 13)
    assert f"{counted / 1e12:.2f}" == tera


def test_the_tower_runs_the_blocks_that_are_read(model):
    assert c.tower_flops(model, 3) == c.tower_flops(model, 3, 25)


def test_connectors(model):
    assert c.connector_flops(model, 13) == formulas.connector_flops(SIZES, windows=2548, slots=4 * 2548)
    assert c.unpooled_connector_flops(model, 13) == formulas.projector_flops(SIZES, 9477)


def test_decode_grows_linearly_with_the_cache(model):
    once, twice = (c.decode_flops(model, cached) for cached in (1000, 2000))
    attention = 4 * 28 * 16 * 128
    assert once == 2 * formulas.decoder_linear_weights(SIZES) + attention * 1001
    assert twice - once == attention * 1000


def test_cache_bytes(model):
    assert c.cache_bytes(model.config, 1744) == formulas.kv_cache_bytes(SIZES, 1744)
    # more than a machine would give
    assert c.cache_bytes(model.config, 10**8) == formulas.kv_cache_bytes(SIZES, 10**8)


@pytest.mark.parametrize("tiles", [1, 5, 12])
def test_measured_rows_equal_the_formulas(tiles):
    for measured, formula in zip(efficiency_rows(tiles), efficiency_rows(tiles, measure=False), strict=True):
        assert formula["source"] == "formula"
        assert (measured["unpooled"], measured["pooled"]) == (formula["unpooled"], formula["pooled"])


def counted_by_torch(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_ops_count_as_their_plain_forms():
    q = torch.randn(2, 9, 3, 8)
    heads_first = q.transpose(1, 2)
    assert c.count(lambda: ops.attention(q, q, q)) == counted_by_torch(
        lambda: (heads_first @ heads_first.mT).softmax(-1) @ heads_first
    )
    x, up, down = torch.randn(5, 6), torch.randn(14, 6), torch.randn(4, 7)
    assert c.count(lambda: ops.swiglu_mlp(x, up, down)) == counted_by_torch(lambda: ((x @ up.T)[:, :7]) @ down.T)
    assert c.count(lambda: ops.linear(x, up)) == counted_by_torch(lambda: x @ up.T)


def test_packed_attention_counts_its_segments():
    q = torch.randn(10, 3, 8)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    assert c.count(lambda: ops.attention(q, q, q, cu_seqlens=bounds, max_seqlen=6)) == 4 * (16 + 36) * 3 * 8


def test_kept_windows_count_alone():
    features = [torch.randn(1, 4, 6)]
    w_q, w_kv, w_o = torch.randn(4, 6), torch.randn(8, 6), torch.randn(5, 4)

    def pool(keep):
        return ops.attention_pool(
            features, w_q, None, w_kv, None, w_o, None, grid=(2, 2), num_heads=2, window=(1, 1), keep=keep
        )

    whole, half = c.count(lambda: pool(None)), c.count(lambda: pool(torch.tensor([1, 3])))
    assert whole == 2 * half == 2 * 4 * (24 + 48 + 20)


def test_gradients_count():
    """Two products of each of the forward's, and what is made again: scores, keys and queries."""
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((5, 6), (14, 6), (4, 7)))
    for again in (False, True):
        y = ops.swiglu_mlp(x, up, down, recompute=again)
        assert c.count(y.sum().backward) == 2 * 5 * ((2 + again) * up.numel() + 2 * down.numel())
        y = ops.linear(x, up, activation="silu", recompute=again)
        assert c.count(y.sum().backward) == 2 * 5 * (2 + again) * up.numel()
    assert c.count(lambda: ops.linear(x, up, activation="silu")) == 2 * 5 * up.numel()
    assert c.count(lambda: ops.swiglu_mlp(x, up, down)) == 2 * 5 * (up.numel() + down.numel())
    q = torch.randn(1, 9, 2, 8, requires_grad=True)
    out = ops.attention(q, q, q)
    assert c.count(lambda: out.sum().backward()) == 5 * 2 * 81 * 2 * 8
    feature = torch.randn(1, 4, 6, requires_grad=True)
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((4, 6), (8, 6), (5, 4))]
    w_q, w_kv, w_o = weights
    pooled = ops.attention_pool([feature], w_q, None, w_kv, None, w_o, None, grid=(2, 2), num_heads=2)
    assert c.count(lambda: pooled.sum().backward()) == 2 * (3 * (4 * 48 + 24) + 2 * 20)


def test_causal_attention_counts_half_the_square():
    q, k = torch.randn(1, 10, 4, 8), torch.randn(1, 10, 2, 8)
    assert c.count(lambda: ops.attention(q, k, k, causal=True)) == 2 * 10 * 10 * 4 * 8
    # one query sees all keys, and more than keys stand before them
    assert c.count(lambda: ops.attention(q[:, :1], k, k, causal=True)) == 4 * 10 * 4 * 8
    assert c.count(lambda: ops.attention(q, k[:, :2], k[:, :2], causal=True)) == 4 * 3 * 4 * 8


def test_attention_counts_the_keys_that_are_seen():
    c.register_formulas()
    q, k = torch.randn(2, 10, 4, 8), torch.randn(2, 15, 2, 8)
    place = torch.arange(5, 15)[:, None]
    key = torch.arange(15)
    cases = {
        (-1, -1): key >= 0,
        (-1, 0): key <= place,
        (3, 0): (key <= place) & (key >= place - 3),
        (2, 1): (key <= place + 1) & (key >= place - 2),
    }
    for window, seen in cases.items():
        with FlopCounterMode(display=False) as counter:
            ops.attention(q, k, k, window=window)
        assert counter.get_total_flops() == 2 * 4 * 4 * 8 * int(seen.expand(10, 15).sum())
    bounds, bounds_k = torch.tensor([0, 4, 10]).int(), torch.tensor([0, 6, 15]).int()
    packed = {"cu_seqlens": bounds, "max_seqlen": 6, "cu_seqlens_k": bounds_k, "max_seqlen_k": 9}
    with FlopCounterMode(display=False) as counter:
        ops.attention(q[0], k[0], k[0], causal=True, **packed)
    assert counter.get_total_flops() == 4 * 4 * 8 * (3 + 4 + 5 + 6 + 4 + 5 + 6 + 7 + 8 + 9)


def test_importing_vlmkern_registers_nothing():
    """torch's module of formulas imports triton."""
    code = "import sys, vlmkern.efficiency; print([m in sys.modules for m in ('torch.utils.flop_counter', 'triton')])"
    assert run_python(code).stdout.strip() == "[False, False]"
