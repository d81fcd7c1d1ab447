"""The device of GPU tests and benchmarks: a CUDA card or, in a rehearsal, the CPU of a machine that has none.

In a rehearsal tests and benchmarks are gone through at small sizes, so that what they call, write and print is right
before a card is at hand. Its figures mean nothing. It is one where kernels are interpreted (TRITON_INTERPRET=1), and
where the variable REHEARSAL says so, for what compiles them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from gpu_steps import REHEARSAL

import vlmkern
from vlmkern.kernels._interpreter import interpreting

Call = Callable[[], Any]


class Cuda:
    """The current CUDA device. No setting of the card is changed."""

    name = "cuda"
    rehearsal = False
    # without CUDA graphs of its own: all that is timed is timed in graphs
    compile_options: ClassVar = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}

    def size(self, real: int, small: int) -> int:
        """One of a problem's sizes."""
        return real

    def prepare(self) -> None:
        """To be called once before anything is measured."""
        # gradients are computed on the stream of their forward, and the default stream cannot be captured
        torch.cuda.set_stream(torch.cuda.Stream())

    def backend(self) -> Any:
        """The block in which our ops run as users find them."""
        return nullcontext()

    def describe(self) -> dict[str, Any]:
        """The card."""
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "gpu": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "l2_mib": round(found.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
        }

    def ceilings(self) -> dict[str, float]:
        """The rates of a large matrix product and of a large copy, which those of kernels are compared with."""
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
        times = self.times({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 20)
        return {
            "matmul_tflops": round(2 * 8192**3 / times["matmul"] / 1e9, 1),
            "copy_gb_per_s": round(2 * 2**30 / times["copy"] / 1e6, 1),
        }

    def alive(self) -> bool:
        """Whether the process can still use the device, which it cannot after an illegal access."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def peak_memory(self, call: Call) -> int:
        """Bytes that a call allocates beyond what was there."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def times(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        """Median milliseconds of each, in turn, each time after the L2 cache was overwritten."""
        from vlmkern.tune.timing import times_in_turn

        found = times_in_turn([self.captured(call) for call in calls.values()], rounds)
        return {name: statistics.median(times) for name, times in zip(calls, found, strict=True)}

    def captured(self, call: Call) -> Call:
        """The call's CUDA graph, or the call itself where it cannot be captured."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        try:
            return self.graph(call)
        except RuntimeError:
            torch.cuda.synchronize()
            return call

    def graph(self, call: Call) -> Call:
        """The call's CUDA graph.

        Raises:
            RuntimeError: the call does what a graph cannot.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
        return graph.replay

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """Inside, calls run on a stream that can be captured."""
        before = torch.cuda.current_stream()
        torch.cuda.set_stream(torch.cuda.Stream())
        try:
            yield
            torch.cuda.synchronize()
        finally:
            torch.cuda.set_stream(before)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Inside, a call that waits for the device is an error."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    # what `vlmkern.tune` times with: None for the device
    measure = None


class Rehearsal:
    """The CPU in place of a card; see `Cuda` for what each does."""

    name = "cpu"
    rehearsal = True
    compile_options: ClassVar = {"backend": "eager", "dynamic": False}

    def size(self, real: int, small: int) -> int:
        return small

    def prepare(self) -> None:
        torch.set_num_threads(1)

    def backend(self) -> Any:
        return vlmkern.use_backend("triton")

    def describe(self) -> dict[str, Any]:
        # the rates are those of an H100, so that what is computed of them is of a likely size
        return {"gpu": "rehearsal", "capability": [9, 0], "multiprocessors": 132, "memory_gib": 0.0, "l2_mib": 0.0}

    def ceilings(self) -> dict[str, float]:
        return {"matmul_tflops": 790.0, "copy_gb_per_s": 3000.0}

    def alive(self) -> bool:
        return True

    def peak_memory(self, call: Call) -> int:
        return 0

    def times(self, calls: dict[str, Call], rounds: int) -> dict[str, float]:
        found = {}
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            found[name] = 1e3 * (time.perf_counter() - begin)
        return found

    def graph(self, call: Call) -> Call:
        call()
        return call

    def capturable(self) -> Any:
        return nullcontext()

    def no_waiting(self) -> Any:
        return nullcontext()

    def measure(self, launch: Any) -> float:
        # any number that differs from launch to launch
        return 0.1 + 0.01 * sum(value for value in launch.constants.values() if isinstance(value, int)) % 1


def current() -> Cuda | Rehearsal:
    """The device of this process."""
    return Rehearsal() if interpreting() or os.environ.get(REHEARSAL) == "1" else Cuda()
