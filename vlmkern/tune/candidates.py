"""What is tuned: a kernel, an element size and a shape at a time, and the configurations that are tried for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from .. import aot
from ..kernels import _launch
from ..kernels._launch import Config, Kernel

# float16 and bfloat16 share tables, as they have the same instructions
DTYPES = {16: torch.bfloat16, 32: torch.float32}


class Problem(NamedTuple):
    """A kernel, by name, at an element size in bits and a shape: what a table has an entry for."""

    kernel: str
    bits: int
    shape: dict[str, int]


def kernels(name: str | None = None) -> list[Kernel]:
    """All kernels, or the one of that name.

    Raises:
        ValueError: there is none.
    """
    found = [kernel for kernel in aot.kernels() if name in (None, kernel.name)]
    if not found:
        raise ValueError(f"--kernel: got {name!r}, expected one of {', '.join(sorted(k.name for k in aot.kernels()))}")
    return found


def problems(
    arch: int,
    names: Iterable[str] | None = None,
    bits: Iterable[int] | None = None,
    shape: Mapping[str, int] | None = None,
) -> list[Problem]:
    """The problems of all kernels, or of those named, at all element sizes, or those given; of 16 bits first.

    Args:
        arch: of the tables, e.g. 90.
        shape: takes the problems alone that agree in all of its keys.

    Raises:
        ValueError: no kernel has a name, no shape of these kernels a key, or nothing is left.
    """
    chosen = kernels() if names is None else [kernel for name in dict.fromkeys(names) for kernel in kernels(name)]
    bits, shape = set(DTYPES if bits is None else bits), dict(shape or {})
    if not bits <= set(DTYPES):
        raise ValueError(f"--bits: got {', '.join(map(str, sorted(bits - set(DTYPES))))}, expected 16 or 32")
    keys = {key for kernel in chosen for key in kernel.shape}
    for key in shape:
        if key not in keys:
            raise ValueError(f"--shape: got the key {key!r}, expected one of {', '.join(sorted(keys))}")
    found = [problem for kernel in chosen for problem in _of(kernel, arch)]
    taken = [p for p in found if p.bits in bits and shape.items() <= p.shape.items()]
    if not taken:
        wanted = sorted({", ".join(f"{key}={value}" for key, value in p.shape.items()) for p in found})
        raise ValueError(f"--bits and --shape: no problem agrees, expected one of {'; '.join(wanted)}")
    # a run that is cut short should have come to what models are run in
    return sorted(taken, key=lambda problem: problem.bits)


def candidates(problem: Problem, table: dict[str, Any]) -> list[Config]:
    """The configurations to try: the table's default first, those that the kernel names, those of the table."""
    entries = [entry["config"] for entry in table["entries"]]
    configs = [table["default"][str(problem.bits)], *kernel_of(problem).candidates_for(problem.bits), *entries]
    found: dict[Any, Config] = {}
    for config in configs:
        found.setdefault(config_key(config), config)
    return list(found.values())


def kernel_of(problem: Problem) -> Kernel:
    """The kernel that a problem names."""
    return kernels(problem.kernel)[0]


def code_of(kernel: Kernel) -> str:
    """A fingerprint of a kernel's code, and the compiler: times of other code say nothing about this one."""
    import triton

    return f"{kernel.function.cache_key[:16]}, triton {triton.__version__}"


def config_key(config: Config) -> tuple[tuple[str, int], ...]:
    """A configuration as a key of dictionaries."""
    return tuple(sorted(config.items()))


def problem_key(problem: Problem) -> tuple[Any, ...]:
    """A problem as a key of dictionaries."""
    return problem.kernel, problem.bits, *sorted(problem.shape.items())


def _of(kernel: Kernel, arch: int) -> Iterator[Problem]:
    default = _launch.table(kernel.name, arch)["default"]
    for bits in DTYPES:
        if str(bits) in default:
            yield from (Problem(kernel.name, bits, shape) for shape in (kernel.shape, *kernel.shapes))
