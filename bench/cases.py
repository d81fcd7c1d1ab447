"""What the suites share: providers, how one case is run, and what is written beside its time.

Providers are ways to compute the same thing:
    eager     plain torch
    onednn    eager with float32 products sent to oneDNN (set_float32_matmul_precision("medium"); still float32 on CPUs
              without AMX, and the faster route where MKL takes its slow path)
    compile   torch.compile with frozen (prepacked) weights, on that same route
    vlmkern   this package
plus, in some suites, named ones (sdpa, transformers). The ratio that counts is to the best of the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROVIDERS = ("eager", "onednn", "compile", "vlmkern")

# largest error of a provider that may be timed, relative to the largest value of the float32 result
_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def run_case(
    benchmark: Any,
    provider: str,
    call: Callable[[], Tensor],
    exact: Tensor,
    dtype: torch.dtype,
    *,
    flops: int,
    rounds: int = 9,
) -> None:
    """Checks the result of `call` against `exact` (float32), then times it on one thread in CPU seconds.

    CPU seconds of the process are not stretched by other load on the machine, as wall time is.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.no_grad(), _route(provider):
            call()  # compiles; packs weights
            result = call()
            error = ((result.float() - exact).abs().max() / exact.abs().max()).item()
            assert error <= _LIMIT[dtype], f"relative error {error:.3g} is above {_LIMIT[dtype]:.0e}"
            benchmark._timer = time.process_time
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(provider=provider, relative_error=error, flops=flops)
    if benchmark.stats is not None:
        rate = flops / benchmark.stats.stats.median / 1e9
        benchmark.extra_info.update(gflops_per_s=rate, of_peak=rate / peak_gflops(dtype))


@contextmanager
def _route(provider: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if provider in ("onednn", "compile"):
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(module: nn.Module) -> Callable[..., Tensor]:
    """torch.compile of one baseline with frozen weights, free of what earlier ones left behind."""
    torch._dynamo.reset()
    return torch.compile(module.eval().requires_grad_(False), fullgraph=True, options={"freezing": True})


_peaks: dict[torch.dtype, float] = {}


def peak_gflops(dtype: torch.dtype) -> float:
    """One-thread matrix-product rate of oneDNN at 1024 x 1024 x 4096 with a packed weight, measured once a run."""
    if dtype not in _peaks:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        x, weight = torch.randn(1024, 4096).to(dtype), torch.randn(1024, 4096).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        times = []
        for _ in range(12):
            start = time.process_time()
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            times.append(time.process_time() - start)
        torch.set_num_threads(threads)
        _peaks[dtype] = 2 * 1024 * 1024 * 4096 / min(times) / 1e9
    return _peaks[dtype]
