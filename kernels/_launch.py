"""How kernels are launched, and the tables that say with which block sizes, warps and stages.

Host functions call `select` for a configuration and `launch` to run a kernel. Nothing here touches a driver on import:
the architecture is asked of the tensor's device at the first launch. Under `recording`, launches are noted in place of
being run, for a target that need not be there; under `forced`, a kernel takes the configuration that it is given.

A table is configs/sm_<arch>/<kernel>.json:

    {"kernel": "...", "arch": 90, "source": "where the choice comes from",
     "default": {"16": {...}, "32": {...}},
     "entries": [{"bits": 16, "shape": {"tokens": 729, "head_dim": 72}, "config": {...}}, ...]}

with configurations by the element size in bits. The nearest entry serves shapes within a factor of two of its own in
every dimension, the default all others; entries whose configuration has "TMA" serve tensors that descriptors can take.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Config = dict[str, Any]

TABLES = Path(__file__).parent / "configs"
ARCHS = (80, 90, 100)

# what the compiler takes beside a kernel's own constants
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Starts the kernel on the current device and stream."""
        self.kernel[self.grid](*self.args, **self.constants, **self.options)


class Kernel(NamedTuple):
    """What tools that compile, tune and report kernels need to know of one.

    Attributes:
        function: the `triton.jit` function.
        example: (dtype, device, **shape) -> a call without arguments that launches this kernel once.
        shape: the keys of a shape and their values in jina-vlm at 13 crops.
        shapes: further shapes worth an entry in the tables.
        candidates: configurations that `vlmkern tune` tries.
        wide_candidates: those for float32, where they are others: with products that take no tensor cores, blocks are
            smaller.
        variants: arguments of `example` beside the shape that give other code, to be compiled too.
        cost: (bytes of an element, **shape) -> FLOPs and least bytes moved by the example.
        baseline: a configuration that is compiled for comparison only.
    """

    function: Any
    example: Callable[..., Callable[[], Any]]
    shape: dict[str, int]
    cost: Callable[..., tuple[float, float]]
    candidates: tuple[Config, ...]
    shapes: tuple[dict[str, int], ...] = ()
    variants: tuple[dict[str, Any], ...] = ({},)
    baseline: Config | None = None
    wide_candidates: tuple[Config, ...] | None = None

    @property
    def name(self) -> str:
        """The Triton function's name, which is also its tables'."""
        return self.function.__name__

    def candidates_for(self, bits: int) -> tuple[Config, ...]:
        """What `vlmkern tune` tries for elements of a size in bits, 16 or 32."""
        return self.candidates if bits == 16 or self.wide_candidates is None else self.wide_candidates


class _Overrides(NamedTuple):
    """What differs from how kernels are launched for users, in one thread.

    Attributes:
        recorded: where launches are noted in place of being run.
        target: the architecture whose tables are read for tensors that are on no GPU.
        forced: configurations by kernel, in place of what tables say.
    """

    recorded: list[Launch] | None = None
    target: int | None = None
    forced: dict[str, Config] = {}  # noqa: RUF012 (never changed, only replaced)


_overrides: ContextVar[_Overrides | None] = ContextVar("vlmkern_launch_overrides", default=None)


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], config: Config, **constants: Any) -> None:
    """Runs `kernel` over `grid` with the block sizes and compiler options of `config`; the first tensor of `args` says
    on which device. Programs are counted along the first axis, which alone may exceed 65,535."""
    start(Launch(kernel, grid, args, *split(config, constants)))


def split(config: Config, constants: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants of a launch, block sizes among them, and its compiler options."""
    options = {key: config[key] for key in _OPTIONS if key in config}
    return constants | {key: value for key, value in config.items() if key not in _OPTIONS}, options


def start(call: Launch) -> None:
    """Runs a launch on the device of its first argument that is a tensor, or notes it under `recording`."""
    overrides = _overrides.get()
    if overrides is not None and overrides.recorded is not None:
        overrides.recorded.append(call)
        return
    device = next(arg.device for arg in call.args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            call.run()
    else:
        call.run()


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what a function of shapes and strides returns, but where configurations are not the tables' own."""
    kept = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def plan(*args: Any) -> Any:
        return kept(*args) if _overrides.get() is None else function(*args)

    return plan


def select(name: str, like: Tensor, tma: bool = False, **shape: int) -> Config:
    """The configuration of kernel `name` for elements of `like`'s dtype on its device and a problem's shape.

    Args:
        tma: whether descriptors can take the operands; without, configurations that have "TMA" are left out.
    """
    return select_for(name, like.dtype, like.device, tma, **shape)


def select_for(name: str, dtype: torch.dtype, device: torch.device, tma: bool = False, **shape: int) -> Config:
    """`select` without a tensor."""
    overrides = _overrides.get()
    forced = None if overrides is None else overrides.forced.get(name)
    if forced is not None and (tma or not forced.get("TMA")):
        return forced
    return _select(name, _arch(device), dtype.itemsize * 8, tma, **shape)


@contextmanager
def recording(arch: int | None = None) -> Iterator[list[Launch]]:
    """Inside, launches of this thread are appended to the list that this gives, in place of being run. `arch` is the
    compute capability, e.g. 90, that configurations are selected for where tensors are on no GPU."""
    recorded: list[Launch] = []
    with _overriding(recorded=recorded, target=arch):
        yield recorded


@contextmanager
def forced(name: str, config: Config) -> Iterator[None]:
    """Inside, kernel `name` takes `config` in this thread in place of what its tables say, unless that needs
    descriptors that the operands do not allow."""
    now = _overrides.get() or _Overrides()
    with _overriding(forced={**now.forced, name: config}):
        yield


@contextmanager
def _overriding(**changes: Any) -> Iterator[None]:
    token = _overrides.set((_overrides.get() or _Overrides())._replace(**changes))
    try:
        yield
    finally:
        _overrides.reset(token)


def table(name: str, arch: int, folder: str | Path | None = None) -> dict[str, Any]:
    """The table of a kernel for an architecture that has one: of a folder if it has it, else of that which
    VLMKERN_TABLES names, else the shipped one.

    Raises:
        ValueError: VLMKERN_TABLES names no directory, or a table that is not shipped is not one.
    """
    shipped = json.loads((TABLES / f"sm_{arch}" / f"{name}.json").read_text(encoding="utf-8"))
    for other in (folder, _overlay()):
        path = None if other is None else Path(other) / f"sm_{arch}" / f"{name}.json"
        if path is not None and path.exists():
            return _checked(path, shipped)
    return shipped


def fits(config: Any, default: Config) -> bool:
    """Whether something is a configuration with all that a kernel's default has but for the compiler's options."""
    if not isinstance(config, dict) or not all(isinstance(value, int) for value in config.values()):
        return False
    return bool(default) and default.keys() - set(_OPTIONS) <= config.keys()


def rows(name: str, arch: int, bits: int) -> Iterator[tuple[dict[str, int] | None, Config]]:
    """All shapes and configurations of a table for one element size; the shape of the default is None."""
    content = table(name, arch)
    for entry in content["entries"]:
        if entry["bits"] == bits:
            yield entry["shape"], entry["config"]
    if str(bits) in content["default"]:
        yield None, content["default"][str(bits)]


def descriptor_like(dtype: torch.dtype, shape: Iterable[int], strides: Iterable[int], block: Iterable[int]) -> Any:
    """A TMA descriptor, checked, of tensors that start at multiples of 16 bytes, but of none yet."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(_Aligned(dtype), list(shape), list(strides), list(block))


def descriptor(like: Any, tensor: Tensor) -> Any:
    """The descriptor of a tensor that is as another's say.

    A copy, as the constructor would make its checks again: 0.4 us in place of 1.5 us on an AMD EPYC (Zen 4), and
    attention takes four, its gradient eight, in 10 us of host time in place of 15 us, and 20 us in place of 31 us.
    """
    made = object.__new__(type(like))
    made.__dict__.update(like.__dict__)
    made.base = tensor
    return made


class _Aligned(NamedTuple):
    """In place of a tensor whose address has been seen to."""

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return 0


@functools.cache
def _overlay() -> Path | None:
    # once: configurations are kept, and would not follow it
    named = os.environ.get("VLMKERN_TABLES")
    if not named:
        return None
    if not Path(named).is_dir():
        raise ValueError(f"VLMKERN_TABLES: got {named!r}, expected a directory of tables, sm_<arch>/<kernel>.json")
    return Path(named)


def _checked(path: Path, shipped: dict[str, Any]) -> dict[str, Any]:
    """A table that others wrote, which must serve whatever the shipped one serves."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lacking = _lacking(content, shipped)
    except (ValueError, RecursionError) as error:
        lacking = f"is not JSON: {error}"
    if lacking:
        raise ValueError(f"{path}: {lacking}")
    return content


def _lacking(content: Any, shipped: dict[str, Any]) -> str:
    if not isinstance(content, dict) or any(content.get(key) != shipped[key] for key in ("kernel", "arch")):
        return f"expected the table of {shipped['kernel']} for sm_{shipped['arch']}"
    defaults, entries = content.get("default"), content.get("entries")
    if not isinstance(content.get("source"), str) or not isinstance(defaults, dict) or not isinstance(entries, list):
        return 'expected "source", a text, "default", an object, and "entries", a list'
    for bits, default in shipped["default"].items():
        if not fits(defaults.get(bits), default):
            return f'"default": got {json.dumps(defaults.get(bits))} for {bits} bits, expected one like {default}'
    for entry in entries:
        given = entry if isinstance(entry, dict) else {}
        bits, shape, config = (given.get(key) for key in ("bits", "shape", "config"))
        if not fits(config, shipped["default"].get(str(bits), {})) or not isinstance(shape, dict) or not shape:
            return f'"entries": got {json.dumps(entry)}, expected bits, a shape and a configuration as in the default'
        if not all(isinstance(size, int) and size > 0 for size in shape.values()):
            return f'"entries": got the shape {json.dumps(shape)}, expected positive integers'
    return ""


@functools.lru_cache(maxsize=4096)
def _select(name: str, arch: int, bits: int, tma: bool, **shape: int) -> Config:
    nearest, distance = None, math.inf
    for entry, config in rows(name, arch, bits):
        if config.get("TMA") and not tma:
            continue
        if entry is not None and not entry.keys() <= shape.keys():
            raise ValueError(
                f"the table of {name} for sm_{arch}: got an entry for {entry}, expected {', '.join(shape)}"
            )
        # the default is farther than any entry within reach, and nearer than any other
        away = 1.0 if entry is None else _distance(entry, shape)
        if away < distance:
            nearest, distance = config, away
    assert nearest is not None, f"{name}: no configuration for sm_{arch}, {bits} bits"
    return nearest


def _distance(entry: dict[str, int], shape: dict[str, int]) -> float:
    steps = [abs(math.log2(max(1, shape[key]) / value)) for key, value in entry.items()]
    return sum(steps) / len(steps) if max(steps) < 1 else math.inf


def _arch(device: torch.device) -> int:
    if device.type == "cuda":
        return table_arch(device.index)
    # the interpreter runs the tables of the architecture with the most variants
    overrides = _overrides.get()
    return (overrides and overrides.target) or 90


@functools.cache
def table_arch(index: int) -> int:
    """The architecture whose tables CUDA device `index` reads."""
    major, _ = torch.cuda.get_device_capability(index)
    # consumer Blackwell (12.x) has the shared memory and the matrix instructions of 8.x
    return {9: 90, 10: 100}.get(major, 80)
