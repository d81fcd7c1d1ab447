"""What a call costs the host before a Triton kernel starts: dispatch, checks, the plan, outputs; the launch is noted in
place of being made, and tensors are small, so that the library's products around it weigh little.

Microseconds of wall time; a call should take less than the shortest kernels that it starts.
"""

from __future__ import annotations

import time

import pytest
import torch

import vlmkern
from vlmkern import ops

# a Zen 4 core takes 26 for attention and 35 for add_layer_norm, most of it in torch's dispatcher; slower cores exist
LIMIT_US = 60


def _qkv():
    return torch.empty(1, 8, 3, 2, 72, dtype=torch.bfloat16).unbind(2)


def _x(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


def _attention():
    q, k, v = _qkv()
    return lambda: ops.attention(q, k, v)


def _add_layer_norm():
    x, residual, weight, bias = _x(4, 16), _x(4, 16), _x(16), _x(16)
    return lambda: ops.add_layer_norm(x, residual, weight, bias)


CALLS = {"attention": _attention, "add_layer_norm": _add_layer_norm}


@pytest.mark.parametrize("op", CALLS)
def bench_launch_overhead(benchmark, op, monkeypatch):
    pytest.importorskip("triton")
    from vlmkern import tune
    from vlmkern.kernels import _launch

    benchmark.group = f"launch overhead|{op}|bfloat16"
    # the kernels are loaded as compiled ones; the variable then satisfies the backend, which looks for a device
    tune.kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    call = CALLS[op]()
    launches = []
    # not `_launch.recording`, under which nothing is planned for the next call
    monkeypatch.setattr(_launch.Launch, "run", lambda launch: launches.append(launch.kernel))
    with torch.no_grad(), vlmkern.use_backend("triton"):
        call()
        assert len(launches) == 1

        def noted() -> None:
            call()
            launches.clear()

        benchmark._timer = time.perf_counter
        benchmark.pedantic(noted, rounds=50, iterations=200, warmup_rounds=2)
    benchmark.extra_info.update(provider="vlmkern", flops=0)
    if benchmark.stats is not None:
        assert benchmark.stats.stats.median * 1e6 < LIMIT_US
