"""What every Triton kernel compiles to, without a GPU: registers, spills, shared memory, occupancy, instructions.

The arguments are those of a real launch, on the meta device, so that the compiler sees the same alignments and
constants; a stand-in driver says for which target. Nothing here is a timing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .kernels._interpreter import interpreting

ARCHS = (80, 90, 100)
MODULES = (
    "attention.forward",
    "attention.backward",
    "attention.rotary",
    "attention_pool.forward",
    "attention_pool.absorbed",
    "attention_pool.backward",
    "swiglu_mlp.gate",
    "linear.epilogue",
    "add_layer_norm.norm",
    "rms_norm.norm",
)

# a streaming multiprocessor's shared memory in KiB, of which 1 goes to the system for every block
SHARED_KIB = {80: 164, 90: 228, 100: 228}
REGISTERS, _THREADS, _BLOCKS = 65536, 2048, 32


class Job(NamedTuple):
    """One kernel, for one target, in one configuration."""

    kernel: str
    arch: int
    bits: int
    shape: dict[str, int]
    variant: dict[str, Any]
    config: dict[str, Any]
    shipped: bool


def kernels() -> Iterator[Any]:
    """Every kernel, a `kernels._launch.Kernel`, module by module."""
    for module in MODULES:
        yield from importlib.import_module(f".kernels.{module}", __package__).KERNELS


def jobs(archs: Sequence[int] = ARCHS, kernel: str | None = None) -> list[Job]:
    """Every configuration of the tables, and the baselines that some kernels are compared with.

    Raises:
        ValueError: no kernel has that name.
    """
    found = [
        Job(entry.name, arch, bits, shape, variant, config, shipped)
        for entry in kernels()
        if kernel in (None, entry.name)
        for arch in archs
        for bits in (16, 32)
        for shape, config, shipped in _configurations(entry, arch, bits)
        for variant in entry.variants
        if shipped or not variant
    ]
    if not found:
        names = sorted(entry.name for entry in kernels())
        raise ValueError(f"--kernel: got {kernel!r}, expected one of {', '.join(names)}")
    return found


def report(tasks: Sequence[Job], done: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Compiles all of `tasks`, several at a time; `done` is called with each row as it comes.

    Raises:
        BackendUnavailable: Triton or the disassembler that it carries is missing, or kernels are interpreted here.
    """
    check_compiler()
    rows = []
    # each with a driver of its own; a fork would copy locks of torch's threads
    workers = min(len(tasks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(compile_job, tasks):
            # a configuration that this variant cannot take is compiled where it can
            if row is not None:
                rows.append(row)
                done(row)
    return rows


def check_compiler() -> None:
    """Does nothing where kernels can be compiled.

    Raises:
        BackendUnavailable: Triton or the disassembler that it carries is missing, or kernels are interpreted here.
    """
    from . import BackendUnavailable

    if interpreting():
        raise BackendUnavailable("kernels cannot be compiled while TRITON_INTERPRET is set: unset it")
    _cuobjdump()


def compile_job(job: Job) -> dict[str, Any] | None:
    """The report of one configuration; None where the variant does not take it."""
    import torch

    (kernel,) = (entry for entry in kernels() if entry.name == job.kernel)
    dtype = {16: torch.bfloat16, 32: torch.float32}[job.bits]
    launch = record_launch(kernel, kernel.example(dtype, "meta", **job.shape, **job.variant), job.config, job.arch)
    if launch is None:
        return None
    compiled = compile_launch(launch, job.arch)
    return {
        "kernel": job.kernel,
        "config": job.config,
        "shape": job.shape | job.variant,
        "arch": job.arch,
        "dtype": str(dtype).removeprefix("torch."),
        **_resources(compiled.asm["cubin"], job.arch, compiled.metadata.num_warps, compiled.metadata.shared),
        "serialized": _serialized(compiled.asm["ptx"]),
        "shipped": job.shipped,
    }


def record_launch(kernel: Any, call: Callable[[], Any], config: dict[str, Any], arch: int) -> Any:
    """The launch of a kernel that a call of its example makes in a configuration, with the tables of an architecture;
    None where it takes another configuration in its place."""
    from .kernels import _launch

    with _launch.forced(kernel.name, config), _launch.recording(arch) as launches:
        call()
    launch = next(launch for launch in launches if launch.kernel is kernel.function)
    given = launch.constants | launch.options
    return launch if all(given.get(key, value) == value for key, value in config.items()) else None


def compile_launch(launch: Any, arch: int) -> Any:
    """What Triton makes of a recorded launch for an architecture."""
    with _target(arch):
        return launch.kernel.warmup(
            *launch.args, grid=(1,), **launch.constants, **launch.options, enable_fp_fusion=True
        )


@contextmanager
def _target(arch: int) -> Iterator[None]:
    """Inside, Triton compiles for an architecture; after it, launches find the driver that they found before."""
    from triton.runtime import driver

    # `active` would look for a device, which need not be there
    before = driver._active
    driver.set_active(_NoDevice(arch))
    try:
        yield
    finally:
        driver.set_active(before)


class _NoDevice:
    """All that a Triton kernel asks of a driver in order to be compiled."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # binaries are kept by device number: one number for all targets would mix them up
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def _configurations(kernel: Any, arch: int, bits: int) -> Iterator[tuple[dict[str, int], dict[str, Any], bool]]:
    from .kernels import _launch

    for shape, config in _launch.rows(kernel.name, arch, bits):
        yield kernel.shape | (shape or {}), config, True
    if kernel.baseline is not None and bits == 16:
        yield kernel.shape, kernel.baseline, False


def register_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory on its stack, which is where registers are spilled to."""
    (usage,) = _dumps(cubin, "--dump-resource-usage")
    ((registers, stack),) = re.findall(r"\bREG:(\d+) STACK:(\d+)", usage)
    return int(registers), int(stack)


def block_registers(registers: int, warps: int) -> int:
    """Of a block, which a multiprocessor has 65,536 for: they are given to warps in steps of 256."""
    return -(-registers * 32 // 256) * 256 * warps


def _dumps(cubin: bytes, *flags: str) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return [
            subprocess.run([_cuobjdump(), flag, file.name], check=True, text=True, capture_output=True).stdout
            for flag in flags
        ]


def _resources(cubin: bytes, arch: int, warps: int, shared: int) -> dict[str, Any]:
    registers, _ = register_usage(cubin)
    (sass,) = _dumps(cubin, "-sass")
    # a line is an address in a comment, at times a predicate, and the instruction
    code = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE))

    def count(pattern: str) -> int:
        return sum(n for name, n in code.items() if re.match(pattern, name))

    return {
        "registers": registers,
        "spill_bytes": sum(n * _width(name) for name, n in code.items() if re.match(r"(STL|LDL)\b", name)),
        "shared_bytes": shared,
        "ctas_per_sm": min(
            _BLOCKS,
            REGISTERS // block_registers(registers, warps),
            _THREADS // (32 * warps),
            SHARED_KIB[arch] * 1024 // (shared + 1024),
        ),
        "instructions": sum(code.values()),
        "mma": {name: n for name, n in sorted(code.items()) if re.match(r"(HGMMA|HMMA|QGMMA|UTC\w*MMA)\b", name)},
        "tma": count(r"UTMALDG"),
        "cp_async": count(r"LDGSTS"),
    }


def _serialized(ptx: str) -> bool:
    """Whether the assembler has each warpgroup product wait for the one before it (its note C7515). It is asked again,
    as Triton throws its notes away, and keeps none of a binary from its cache."""
    from triton.backends.nvidia.compiler import get_ptxas

    if "wgmma.mma_async" not in ptx:
        return False
    ((target, arch),) = re.findall(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(int(arch)).path, "-v", f"--gpu-name={target}", file.name, "--output-file", os.devnull]
        notes = subprocess.run(command, check=True, text=True, capture_output=True)
    return "serialized" in notes.stdout + notes.stderr


def _width(instruction: str) -> int:
    """Bytes that a thread moves by a local load or store."""
    return {"64": 8, "128": 16}.get(instruction.rsplit(".", 1)[-1], 4)


def _cuobjdump() -> str:
    from . import BackendUnavailable

    try:
        from triton.backends import nvidia
    except ImportError as error:
        raise BackendUnavailable(f"triton with its NVIDIA backend is needed to compile kernels: {error}") from error
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        raise BackendUnavailable(f"triton's disassembler is missing: {tool}")
    return str(tool)
