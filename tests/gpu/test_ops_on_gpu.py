"""The Triton kernels on a GPU, at the sizes of the models: numbers, gradients, capture in graphs, and what must not
happen. The odd shapes are tests/interpreted's."""

from __future__ import annotations

import gpu
import gpu_cases
import pytest
import torch
from support import low_precision_close

import vlmkern
from vlmkern import ops

pytestmark = pytest.mark.gpu

CASES = {
    "attention": lambda dtype: gpu_cases.attention(13, 729, 72, dtype, "cuda"),
    "attention_1025x64": lambda dtype: gpu_cases.attention(2, 1025, 64, dtype, "cuda"),
    "attention_3996x80": lambda dtype: gpu_cases.attention(1, 3996, 80, dtype, "cuda"),
    "attention_96": lambda dtype: gpu_cases.attention(1, 799, 96, dtype, "cuda"),
    "attention_128": lambda dtype: gpu_cases.attention(1, 1023, 128, dtype, "cuda"),
    "attention_pool": lambda dtype: gpu_cases.attention_pool(16, 72, 72, dtype, "cuda"),
    "attention_pool_one_head": lambda dtype: gpu_cases.attention_pool(1, 1152, 2304, dtype, "cuda"),
    "swiglu_mlp": lambda dtype: gpu_cases.swiglu_mlp(2548, dtype, "cuda"),
    "linear_gelu": lambda dtype: gpu_cases.linear("gelu_tanh", False, dtype, "cuda"),
    "linear_residual": lambda dtype: gpu_cases.linear("none", True, dtype, "cuda"),
    "add_layer_norm": lambda dtype: gpu_cases.add_layer_norm(dtype, "cuda"),
    "swiglu_mlp_few_rows": lambda dtype: gpu_cases.swiglu_mlp(5, dtype, "cuda"),
}
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
        out = gpu.results(case.providers[provider](*inputs))
        weight = torch.linspace(-1, 1, out[0].shape[-1], dtype=dtype, device=out[0].device)
        loss = sum((x * weight).sum() for x in out)
        return [*(x.detach() for x in out), *torch.autograd.grad(loss, [*inputs, *case.weights])]
    finally:
        for weight, data in zip(case.weights, kept, strict=True):
            weight.data = data


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_numbers_and_gradients(make, dtype):
    case = make(dtype)
    exact, eager, actual = run(case, "eager", torch.float64), run(case, "eager", dtype), run(case, "vlmkern", dtype)
    by_dtype = {torch.float64: exact, dtype: eager}
    for index, tensor in enumerate(actual):
        low_precision_close(tensor, lambda t, index=index: by_dtype[t][index])


def test_bitwise_repeatable(make):
    case = make(torch.bfloat16)
    for a, b in zip(run(case, "vlmkern", torch.bfloat16), run(case, "vlmkern", torch.bfloat16), strict=True):
        assert torch.equal(a, b)


def test_no_synchronisation(make):
    case = make(torch.bfloat16)
    run(case, "vlmkern", torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, "vlmkern", torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture(make):
    case = make(torch.bfloat16)
    torch.cuda.set_stream(torch.cuda.Stream())
    call = case.providers["vlmkern"]
    with torch.no_grad():
        call(*case.inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = gpu.results(call(*case.inputs))
        for x in case.inputs:
            x.copy_(torch.randn_like(x))
        graph.replay()
        for replayed, fresh in zip(captured, gpu.results(call(*case.inputs)), strict=True):
            assert torch.equal(replayed, fresh)
    torch.cuda.set_stream(torch.cuda.default_stream())


def test_everything_is_written(make):
    """Memory that torch.empty gives is full of NaN."""
    case = make(torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert all(tensor.isfinite().all() for tensor in run(case, "vlmkern", torch.bfloat16))
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_tower_block_fuses_the_sum_into_the_norm():
    """Its CUDA branch, against transformers' layer."""
    case = gpu_cases.block(torch.float32, "cuda")
    with torch.no_grad():
        expected, actual = (case.providers[name](*case.inputs) for name in ("transformers", "vlmkern"))
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_packed_images_do_not_see_each_other(dtype):
    lengths = [729, 1, 0, 256, 1025, 64]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    q, k, v = torch.randn(sum(lengths), 3, 16, 72, device="cuda").to(dtype).unbind(1)
    out = ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=max(lengths))
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        if length:
            part = slice(start, start + length)
            alone = ops.attention(*(x[part].unsqueeze(0) for x in (q, k, v)))[0]
            torch.testing.assert_close(out[part], alone, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)
    first = slice(0, 729)
    k[729:], v[729:] = torch.nan, torch.inf
    assert torch.equal(ops.attention(q, k, v, cu_seqlens=bounds, max_seqlen=1025)[first], out[first])


def test_kept_windows_equal_those_of_all():
    case = gpu_cases.attention_pool(16, 72, 72, torch.bfloat16, "cuda")
    q, kv, out = (weight.detach() for weight in case.weights)
    keep = torch.randperm(13 * 196, device="cuda")[:1700]

    def pool(**kwargs):
        return ops.attention_pool(case.inputs, q, None, kv, None, out, None, grid=(27, 27), num_heads=16, **kwargs)

    torch.testing.assert_close(pool(keep=keep), pool().flatten(0, 1)[keep], rtol=2e-2, atol=1e-2)


def test_values_that_were_not_checked_touch_no_memory_outside():
    case = gpu_cases.attention_pool(16, 72, 72, torch.bfloat16, "cuda")
    q, kv, out = (weight.detach() for weight in case.weights)
    keep = torch.tensor([0, -5, 2**40, 2548], device="cuda")
    ops.attention_pool(case.inputs, q, None, kv, None, out, None, grid=(27, 27), num_heads=16, keep=keep)
    x = torch.randn(100, 2, 72, device="cuda", dtype=torch.bfloat16)
    for bounds in ([0, 50, 2**30], [-(2**30), 50, 100], [90, 10, 100]):
        ops.attention(x, x, x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device="cuda"), max_seqlen=100)
    torch.cuda.synchronize()


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


def test_attention_allocates_its_results_alone():
    """No copy of the views, no scores."""
    q, k, v = torch.randn(13, 729, 3, 16, 72, device="cuda", dtype=torch.bfloat16).unbind(2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.attention(q, k, v)
    results = q.numel() * 2 + 13 * 16 * 729 * 4
    assert torch.cuda.max_memory_allocated() - before <= results + 2**20


def test_other_than_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q = torch.randn(1, 40, 2, 72, device="cuda:1")
    torch.testing.assert_close(ops.attention(q, q, q).cpu(), ops.attention(*(q.to("cuda:0"),) * 3).cpu())
