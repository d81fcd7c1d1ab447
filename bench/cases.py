"""What the suites share: named shapes, how one case is run, and what is written beside its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# largest error of a provider that may be timed, relative to the largest value of the float32 result
_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def run_case(
    benchmark: Any,
    call: Callable[[], Tensor],
    exact: Tensor,
    dtype: torch.dtype,
    *,
    flops: int,
    rounds: int = 5,
) -> None:
    """Checks the result against `exact` (float32), then times `call` on one thread in CPU seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            result = call()
            error = ((result.float() - exact).abs().max() / exact.abs().max()).item()
            assert error <= _LIMIT[dtype], f"relative error {error:.3g} is above {_LIMIT[dtype]:.0e}"
            benchmark.extra_info["relative_error"] = error
            benchmark.extra_info["flops"] = flops
            # the suites' clock: CPU seconds of the process are not stretched by other load on the machine
            benchmark._timer = time.process_time
            benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    if benchmark.stats is not None:
        benchmark.extra_info["gflops_per_s"] = flops / benchmark.stats.stats.median / 1e9


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of one baseline, free of what earlier ones left behind."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)
