"""What the suites share: providers, how one case is run, and what is written beside its time.

Providers are ways to compute the same thing:
    eager     plain torch
    onednn    eager with float32 products sent to oneDNN (set_float32_matmul_precision("medium"); still float32 on CPUs
              without AMX, and the faster route where MKL takes its slow path)
    compile   torch.compile with frozen (prepacked) weights, on that same route
    vlmkern   this package, with copies of fixed weights (`vlmkern.pack`), as the one above has them
plus, in some suites, named ones (sdpa, transformers) and the peers of peers.py. The ratio that counts is to the best of
torch's; peers are told apart.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkern.dispatch import targets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROVIDERS = ("eager", "onednn", "compile", "vlmkern")
MODES = ("fwd", "bwd")

# largest error of a provider that may be timed, relative to the largest value of the float32 result
_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def run_case(
    benchmark: Any,
    provider: str,
    call: Callable[[], Tensor | list[Tensor]],
    exact: Tensor | list[Tensor],
    dtype: torch.dtype,
    *,
    flops: float,
    least_bytes: float = 0,
    rounds: int = 9,
    images: int = 0,
) -> None:
    """Checks what `call` gives against `exact` (float32), then times it on one thread in CPU seconds.

    A provider of others that misses the accuracy is timed and said to be "not comparable": on CPUs with AMX, torch's
    float32 hints mean bfloat16. CPU seconds of the process are not stretched by other load on the machine, as wall time
    is. `images` is how many pictures a call serves, for a rate of its own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _route(provider):
            call()  # compiles; packs weights
            found = _as_list(call())
            error = max(
                ((x.detach().float() - y).abs().max() / y.abs().max()).item()
                for x, y in zip(found, _as_list(exact), strict=True)
            )
            comparable = error <= _LIMIT[dtype]
            assert comparable or provider != "vlmkern", f"relative error {error:.3g} is above {_LIMIT[dtype]:.0e}"
            del found
            peak = peak_mib(call)
            benchmark._timer = time.process_time
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(
        provider=provider,
        relative_error=error,
        comparable=comparable,
        flops=flops,
        least_bytes=least_bytes,
        peak_mib=peak,
    )
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        rate = flops / seconds / 1e9
        benchmark.extra_info.update(gflops_per_s=rate, of_peak=rate / peak_gflops(dtype))
        if images:
            benchmark.extra_info["images_per_s"] = images / seconds


def forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call that gives the result, without gradients."""

    def call() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return function(*inputs)

    return call


def backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()
) -> Callable[[], list[Tensor]]:
    """A call that gives the gradients of the result's sum by inputs and weights; the forward is run once, before."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    state: list[Tensor] = []

    def call() -> list[Tensor]:
        if not state:
            state.append(function(*leaves))
        out = state[0]
        return list(torch.autograd.grad(out, [*leaves, *weights], torch.ones_like(out), retain_graph=True))

    return call


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB by which one call raises the process's resident memory at most; 0 where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return 0.0

    def read(key: str) -> int:
        return int(re.search(rf"^{key}:\s+(\d+)", status.read_text(encoding="utf-8"), re.MULTILINE)[1])

    before = read("VmRSS")
    call()
    return round(max(0, read("VmHWM") - before) / 1024, 1)


def _as_list(found: Tensor | list[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else found


@contextmanager
def _route(provider: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if provider in ("onednn", "compile"):
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(module: nn.Module, mode: str = "fwd") -> Callable[..., Tensor]:
    """torch.compile of one baseline, free of what earlier ones left behind; with frozen weights where no gradients are
    wanted."""
    torch._dynamo.reset()
    if mode == "bwd":
        return torch.compile(module, fullgraph=True)
    return torch.compile(module.eval().requires_grad_(False), fullgraph=True, options={"freezing": True})


_peaks: dict[torch.dtype, float] = {}


def peak_gflops(dtype: torch.dtype) -> float:
    """One-thread matrix-product rate of oneDNN at 1024 x 1024 x 4096 with a packed weight, measured once a run; that of
    float32 where the CPU does not multiply the dtype, which is what converting it can reach."""
    if dtype not in targets.of_device("cpu").onednn:
        dtype = torch.float32
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
