"""Times the candidates of every kernel on the GPU of this machine and rewrites its tables with the fastest.

Every candidate runs on the tensors of the kernel's example, and its results must equal those of the table's default
before it is timed. The L2 cache is flushed before each run and the median kept. No setting of the card is changed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .aot import MODULES
from .dispatch import BackendUnavailable
from .kernels import _launch
from .kernels._launch import Config, Kernel, Launch

# how far two configurations of a kernel may differ, relative to the largest value: sums are made in another order
_LIMITS = {16: 2e-2, 32: 1e-4}


class Timed(NamedTuple):
    """One configuration; `milliseconds` is None where it does not run or is wrong, and `reason` says why."""

    config: Config
    milliseconds: float | None
    reason: str = ""


Measure = Callable[[Launch], float]


def kernels(name: str | None = None) -> list[Kernel]:
    """All kernels, or the one of that name.

    Raises:
        ValueError: there is none.
    """
    found = [
        kernel
        for module in MODULES
        for kernel in importlib.import_module(f".kernels.{module}", __package__).KERNELS
        if name in (None, kernel.name)
    ]
    if not found:
        raise ValueError(f"--kernel: got {name!r}, expected one of {', '.join(sorted(k.name for k in kernels()))}")
    return found


def device_arch() -> int:
    """Which tables this machine's GPU reads.

    Raises:
        BackendUnavailable: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable("tuning times kernels and needs a CUDA device; `vlmkern aot` needs none")
    return _launch.table_arch(torch.cuda.current_device())


def tune(
    kernel: Kernel,
    arch: int,
    source: str,
    *,
    device: str = "cuda",
    measure: Measure | None = None,
    done: Callable[[dict[str, int], int, list[Timed]], None] = lambda shape, bits, timed: None,
) -> dict[str, Any]:
    """The kernel's new table: entries for all its shapes, the defaults as they were. `done` is told each shape's
    times, fastest first."""
    table = _launch.table(kernel.name, arch)
    entries = []
    for bits, shape in _problems(kernel, table):
        default = table["default"][str(bits)]
        candidates = _without_repeats([default, *kernel.candidates, *(e["config"] for e in table["entries"])])
        timed = sorted(
            (time_config(kernel, shape, bits, config, default, arch, device, measure) for config in candidates),
            key=lambda entry: (entry.milliseconds is None, entry.milliseconds),
        )
        done(shape, bits, timed)
        entries += [{"bits": bits, "shape": shape, "config": config} for config in choose(timed)]
    return {"kernel": kernel.name, "arch": arch, "source": source, "default": table["default"], "entries": entries}


def choose(timed: list[Timed]) -> list[Config]:
    """Of configurations by time, the fastest, and after one that needs descriptors the fastest that does not."""
    ran = [entry.config for entry in timed if entry.milliseconds is not None]
    if not ran or not ran[0].get("TMA"):
        return ran[:1]
    return [ran[0], *[config for config in ran if not config.get("TMA")][:1]]


def time_config(
    kernel: Kernel,
    shape: dict[str, int],
    bits: int,
    config: Config,
    default: Config,
    arch: int,
    device: str,
    measure: Measure | None = None,
) -> Timed:
    """Checks one configuration against the default's results, and times it."""
    dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
    torch.manual_seed(0)
    call = kernel.example(dtype, device, **shape)
    try:
        if measure is None:
            with _launch.forced(kernel.name, default):
                expected = _tensors(call())
            with _launch.forced(kernel.name, config):
                reason = _difference(_tensors(call()), expected, _LIMITS[bits])
            if reason:
                return Timed(config, None, reason)
        with _launch.forced(kernel.name, config), _launch.recording(arch) as launches:
            call()
        launch = next(launch for launch in launches if launch.kernel is kernel.function)
        return Timed(config, (measure or _do_bench)(launch))
    except Exception as error:
        # too much shared memory, or a shape that the compiler refuses: the candidate is out
        return Timed(config, None, " ".join(f"{type(error).__name__}: {error}".split())[:160])


def write(table: dict[str, Any]) -> None:
    """Puts a table in its place."""
    folder = _launch.TABLES / f"sm_{table['arch']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{table['kernel']}.json").write_text(text(table), encoding="utf-8")


def text(table: dict[str, Any]) -> str:
    """A table as JSON, a configuration a line."""
    defaults = ",\n".join(f'  "{bits}": {json.dumps(config)}' for bits, config in table["default"].items())
    entries = "".join(f"\n  {json.dumps(entry)}," for entry in table["entries"]).removesuffix(",")
    end = "\n ]\n}\n" if entries else "]\n}\n"
    return (
        "{\n"
        + "".join(f' "{key}": {json.dumps(table[key])},\n' for key in ("kernel", "arch", "source"))
        + f' "default": {{\n{defaults}\n }},\n "entries": [{entries}{end}'
    )


def source() -> str:
    """Where this machine's figures come from, for the tables."""
    from importlib import metadata

    name, torch_version = torch.cuda.get_device_name(), torch.__version__
    return f"timed on {name}, torch {torch_version}, triton {metadata.version('triton')}, {date.today()}"


def _problems(kernel: Kernel, table: dict[str, Any]) -> Iterator[tuple[int, dict[str, int]]]:
    for bits in (16, 32):
        if str(bits) in table["default"]:
            yield from ((bits, shape) for shape in (kernel.shape, *kernel.shapes))


def _without_repeats(configs: list[Config]) -> list[Config]:
    return [config for index, config in enumerate(configs) if config not in configs[:index]]


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for item in result for tensor in _tensors(item)] if isinstance(result, (list, tuple)) else []


def _difference(actual: list[Tensor], expected: list[Tensor], limit: float) -> str:
    for a, e in zip(actual, expected, strict=True):
        error = ((a.float() - e.float()).abs().max() / e.float().abs().max().clamp_min(1e-30)).item()
        if not error <= limit:
            return f"wrong: differs by {error:.2g} from the default"
    return ""


def _do_bench(launch: Launch) -> float:
    from triton.testing import do_bench

    return do_bench(launch.run, warmup=5, rep=30, return_mode="median")
