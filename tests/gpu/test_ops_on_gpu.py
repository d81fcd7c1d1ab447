"""The Triton kernels on a GPU, at the sizes of the models: numbers, gradients, capture in graphs, and what must not
happen. The odd shapes are tests/interpreted's. In a rehearsal (TRITON_INTERPRET=1) the sizes are small."""

from __future__ import annotations

from functools import partial

import gpu_cases
import pytest
import torch
from gpu_cases import CROPS, DEVICE, GRID, HEADS, TOKENS, WIDTH, WINDOWS
from gpu_measure import results
from support import low_precision_close

import vlmkern
from vlmkern import ops

pytestmark = pytest.mark.gpu

_size = DEVICE.size
CASES = {
    "attention": partial(gpu_cases.attention, CROPS, TOKENS, 72),
    "attention_1025x64": partial(gpu_cases.attention, 2, _size(1025, 33), 64),
    "attention_3996x80": partial(gpu_cases.attention, 1, _size(3996, 40), 80),
    "attention_96": partial(gpu_cases.attention, 1, _size(799, 31), 96),
    "attention_128": partial(gpu_cases.attention, 1, _size(1023, 17), 128),
    "attention_causal": partial(gpu_cases.causal_attention, _size(1744, 40), 16, 8, 128, 0.0),
    "attention_capped": partial(gpu_cases.causal_attention, _size(1023, 17), 8, 4, 256, 50.0),
    "attention_rotary": partial(gpu_cases.rotary_attention, 3, _size(999, 20), 80),
    "attention_pool": partial(gpu_cases.attention_pool, HEADS, 72, 72),
    "attention_pool_one_head": partial(gpu_cases.attention_pool, 1, WIDTH, 2 * WIDTH),
    "swiglu_mlp": partial(gpu_cases.swiglu_mlp, WINDOWS),
    "linear_gelu": partial(gpu_cases.linear, WIDTH, _size(4304, 40), "gelu_tanh"),
    "linear_residual": partial(gpu_cases.linear, _size(4304, 40), WIDTH, "none"),
    "add_layer_norm": gpu_cases.add_layer_norm,
    "rms_norm": gpu_cases.rms_norm,
    "rms_norm_of_heads": partial(gpu_cases.rms_norm_of_heads, 128),
    "rms_norm_and_rotary": partial(gpu_cases.rms_norm_and_rotary, 128),
    "swiglu_mlp_few_rows": partial(gpu_cases.swiglu_mlp, 5),
}
unchecked = pytest.mark.skipif(DEVICE.rehearsal, reason="on CPUs values are checked")
needs_cuda = pytest.mark.skipif(DEVICE.rehearsal, reason="what it asks is asked of the CUDA allocator")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(params=CASES)
def make(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def triton_backend():
    with vlmkern.use_backend("triton"):
        yield


def run(case, provider, dtype):
    """Result and gradients of a provider for the case's values in `dtype`; the products are true float32."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in case.inputs]
    kept = [weight.data for weight in case.weights]
    for weight in case.weights:
        weight.data = weight.data.to(dtype)
    try:
        out = results(case.providers[provider](*inputs))
        weight = torch.linspace(-1, 1, out[0].shape[-1], dtype=dtype, device=out[0].device)
        loss = sum((x * weight).sum() for x in out)
        return [*(x.detach() for x in out), *torch.autograd.grad(loss, [*inputs, *case.weights])]
    finally:
        for weight, data in zip(case.weights, kept, strict=True):
            weight.data = data


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_numbers_and_gradients(make, dtype, record_property):
    case = make(dtype)
    exact, eager, actual = run(case, "eager", torch.float64), run(case, "eager", dtype), run(case, "vlmkern", dtype)
    by_dtype = {torch.float64: exact, dtype: eager}
    shares = [
        low_precision_close(tensor, lambda t, index=index: by_dtype[t][index]) for index, tensor in enumerate(actual)
    ]
    record_property("of_allowed", max(shares))


def test_bitwise_repeatable(make):
    case = make(torch.bfloat16)
    for a, b in zip(run(case, "vlmkern", torch.bfloat16), run(case, "vlmkern", torch.bfloat16), strict=True):
        assert torch.equal(a, b)


def test_no_synchronisation(make):
    case = make(torch.bfloat16)
    run(case, "vlmkern", torch.bfloat16)
    with DEVICE.no_waiting():
        run(case, "vlmkern", torch.bfloat16)


def test_graph_capture(make):
    case = make(torch.bfloat16)
    call, captured = case.providers["vlmkern"], []
    with torch.no_grad(), DEVICE.capturable():
        call(*case.inputs)
        replay = DEVICE.graph(lambda: captured.append(results(call(*case.inputs))))
        for x in case.inputs:
            x.copy_(torch.randn_like(x))
        replay()
        for replayed, fresh in zip(captured[-1], results(call(*case.inputs)), strict=True):
            assert torch.equal(replayed, fresh)


def test_everything_is_written(make):
    """Memory that torch.empty gives is full of NaN."""
    case = make(torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert all(tensor.isfinite().all() for tensor in run(case, "vlmkern", torch.bfloat16))
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_tower_block_fuses_the_sum_into_the_norm():
    """Its CUDA branch, against plain torch."""
    for module in gpu_cases.MODELS_NEED:
        pytest.importorskip(module)
    case = gpu_cases.block(torch.float32)
    with torch.no_grad():
        expected, actual = case.reference(*case.inputs), case.providers["vlmkern"](*case.inputs)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_packed_images_do_not_see_each_other(dtype):
    lengths = [TOKENS, 1, 0, _size(256, 32), _size(1025, 33), _size(64, 16)]
    longest = max(lengths)
    bounds = torch.tensor([0, *lengths], device=DEVICE.name).cumsum(0).to(torch.int32)
    q, k, v = torch.randn(sum(lengths), 3, HEADS, 72, device=DEVICE.name).to(dtype).unbind(1)
    out = ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=longest)
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        if length:
            part = slice(start, start + length)
            alone = ops.attention(*(x[part].unsqueeze(0) for x in (q, k, v)))[0]
            torch.testing.assert_close(out[part], alone, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)
    first = slice(0, TOKENS)
    k[TOKENS:], v[TOKENS:] = torch.nan, torch.inf
    assert torch.equal(ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=longest)[first], out[first])


def pool_of(case, **kwargs):
    q, kv, out = (weight.detach() for weight in case.weights)
    return ops.attention_pool(case.inputs, q, None, kv, None, out, None, grid=GRID, num_heads=HEADS, **kwargs)


def test_kept_windows_equal_those_of_all():
    case = gpu_cases.attention_pool(HEADS, 72, 72, torch.bfloat16)
    keep = torch.randperm(WINDOWS, device=DEVICE.name)[: WINDOWS * 2 // 3]
    expected = pool_of(case).flatten(0, 1)[keep]
    torch.testing.assert_close(pool_of(case, keep=keep), expected, rtol=2e-2, atol=1e-2)


@unchecked
def test_values_that_were_not_checked_touch_no_memory_outside():
    pool_of(
        gpu_cases.attention_pool(HEADS, 72, 72, torch.bfloat16),
        keep=torch.tensor([0, -5, 2**40, WINDOWS], device=DEVICE.name),
    )
    x = torch.randn(100, 2, 72, device=DEVICE.name, dtype=torch.bfloat16)
    for bounds in ([0, 50, 2**30], [-(2**30), 50, 100], [90, 10, 100]):
        bounds = torch.tensor(bounds, dtype=torch.int32, device=DEVICE.name)
        ops.attention(x, x, x, cu_seqlens=bounds, max_seqlen=100)
    assert DEVICE.alive()


@unchecked
def test_tokens_of_no_segment_are_zeros():
    """In memory that torch.empty fills with NaN; the gradients too."""
    q, k, v = (torch.randn(3000, 16, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([100, 829, 2500], dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out = ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=729)
        found = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    finally:
        torch.use_deterministic_algorithms(False)
    for x in found:
        assert not x[:100].any() and not x[829 + 729 :].any() and x[100 : 829 + 729].isfinite().all()


@needs_cuda
def test_attention_allocates_its_results_alone():
    """No copy of the views, no scores."""
    q, k, v = torch.randn(13, 729, 3, 16, 72, device="cuda", dtype=torch.bfloat16).unbind(2)
    used = DEVICE.peak_memory(lambda: ops.attention(q, k, v))
    assert used <= q.numel() * 2 + 13 * 16 * 729 * 4 + 2**20


@needs_cuda
def test_other_than_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q = torch.randn(1, 40, 2, 72, device="cuda:1")
    torch.testing.assert_close(ops.attention(q, q, q).cpu(), ops.attention(*(q.to("cuda:0"),) * 3).cpu())
