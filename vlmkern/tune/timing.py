"""Checks and times candidates on a device. The L2 cache is overwritten before each run, medians are kept, and no
setting of the card is changed."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..aot import record_launch
from ..dispatch import BackendUnavailable
from ..kernels import _launch
from ..kernels._launch import Config, Launch
from .candidates import DTYPES, Problem, kernel_of
from .pool import tensors

Measure = Callable[[Launch], float]

# how far two configurations of a kernel may differ, relative to the largest value: sums are made in another order
_LIMITS = {16: 2e-2, 32: 1e-4}

# in milliseconds: what a candidate may take of the first round, and the fastest together of the second
_FIRST, _SECOND = 12.0, 60.0
# an overwriting of the cache
_FLUSH = 0.1

# what CUDA says of errors after which nothing runs any more in the same process
_LASTING = (
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "launch failure",
    "illegal instruction",
)


class DeviceLost(RuntimeError):
    """A candidate left the device's context unusable: only another process can go on."""


class Wrong(ValueError):
    """A candidate's results are not those of the default."""


def device_arch() -> int:
    """Which tables this machine's GPU reads.

    Raises:
        BackendUnavailable: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable("tuning times kernels and needs a CUDA device; --dry-run and `vlmkern aot` need none")
    return _launch.table_arch(torch.cuda.current_device())


class Bench:
    """A problem on a device: the tensors of its example, what the default makes of them, and candidates' times.

    Args:
        arch: whose tables serve other kernels of the example.
        measure: milliseconds of a launch, in place of those on the device; nothing is then run or compared.
    """

    def __init__(self, problem: Problem, arch: int, default: Config, device: str, measure: Measure | None) -> None:
        self._kernel, self._limit = kernel_of(problem), _LIMITS[problem.bits]
        self._arch, self._default, self._device, self._measure = arch, default, device, measure
        torch.manual_seed(0)
        self._call = self._kernel.example(DTYPES[problem.bits], device, **problem.shape)

    def first(self, config: Config) -> float:
        """Milliseconds of a candidate, of few runs, after its results are compared with the default's.

        Raises:
            Wrong: they differ.
            DeviceLost: nothing runs on the device any more.
            Exception: it does not run.
        """
        with self._watched():
            launch = self._launch(config)
            if self._measure is not None:
                return self._measure(launch)
            reason = difference(self._run(config), self._expected, self._limit)
            if reason:
                raise Wrong(reason)
            (once,) = times_in_turn([launch.run], 1)[0]
            return statistics.median(times_in_turn([launch.run], max(1, min(20, int(_FIRST / (once + _FLUSH)))))[0])

    def second(self, configs: Sequence[Config]) -> list[float]:
        """Milliseconds of the fastest candidates, run in turn, so that a clock that wanders is the same for all.

        Raises:
            DeviceLost: nothing runs on the device any more.
        """
        with self._watched():
            launches = [self._launch(config) for config in configs]
            if self._measure is not None:
                return [self._measure(launch) for launch in launches]
            runs = [launch.run for launch in launches]
            once = sum(statistics.median(times) + _FLUSH for times in times_in_turn(runs, 2))
            return [statistics.median(times) for times in times_in_turn(runs, max(5, min(100, int(_SECOND / once))))]

    @functools.cached_property
    def _expected(self) -> list[Tensor]:
        return self._run(self._default)

    def _run(self, config: Config) -> list[Tensor]:
        with _launch.forced(self._kernel.name, config):
            return tensors(self._call())

    def _launch(self, config: Config) -> Launch:
        launch = record_launch(self._kernel, self._call, config, self._arch)
        assert launch is not None, "what the kernel does not take is not compiled, and what is not compiled not timed"
        return launch

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Turns errors that outlive a launch into `DeviceLost`."""
        try:
            yield
        except Wrong:
            raise
        except Exception as error:
            text = str(error)
            if not any(words in text for words in _LASTING):
                if not self._device.startswith("cuda"):
                    raise
                try:
                    torch.cuda.synchronize()
                except Exception as lasting:
                    text = str(lasting)
                else:
                    raise
            raise DeviceLost(text.splitlines()[0]) from error


def difference(actual: list[Tensor], expected: list[Tensor], limit: float) -> str:
    """How results differ by more than a limit, relative to the largest value expected; empty if they do not."""
    for a, e in zip(actual, expected, strict=True):
        error = ((a.float() - e.float()).abs().max() / e.float().abs().max().clamp_min(1e-30)).item()
        if not error <= limit:
            return f"differs by {error:.2g} from the default"
    return ""


def times_in_turn(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of each on the current CUDA device, round by round, each time after the L2 cache was overwritten."""
    cache = _cache()
    pairs = []
    for _ in range(rounds):
        for run in runs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in pairs]
    return [times[i :: len(runs)] for i in range(len(runs))]


@functools.cache
def _cache() -> Tensor:
    # twice the L2 cache of any card with these tables; each overwriting also hides the time a launch takes to start
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
