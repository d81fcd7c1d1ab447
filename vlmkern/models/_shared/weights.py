"""Weights in and out of a model: safetensors with checks that name every tensor, and seeded random weights."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._files import open_regular, read_json_object, reason
from .section import shown

Model = TypeVar("Model", bound=nn.Module)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LISTED = 20
# the released model's 705 tensors take 100 KB
_MOST_HEADER_BYTES = 16 << 20
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
# values drawn at a time: bounds the float32 scratch of a thread to 16 MiB
_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint's files or tensors are not those of the model."""


def uninitialised(build: Callable[[], Model], dtype: torch.dtype | str, device: torch.device | str) -> Model:
    """What `build` gives, with weights that are allocated and not yet set."""
    dtype = dtype_of(dtype)
    with torch.device("meta"):
        model = build()
    model = model.to(dtype).to_empty(device=device)
    _advise_huge_pages(model)
    return model


def _advise_huge_pages(model: nn.Module) -> None:
    """Asks Linux for 2 MiB pages under large weights that are not written yet: with small ones, page faults take half
    of the time in which 5 GB of weights are set. Advice only; nothing depends on it."""
    if not sys.platform.startswith("linux"):
        return
    page, advice = 1 << 21, 14  # MADV_HUGEPAGE
    madvise = ctypes.CDLL(None).madvise
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            start = -(-parameter.data_ptr() // page) * page
            length = (parameter.data_ptr() + parameter.nbytes - start) // page * page
            if length > 0:
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def randomise(model: nn.Module, seed: int, distribution: Callable[[str, Tensor], tuple[float, float]]) -> None:
    """Sets every weight from a generator of its own, so that a weight depends on the seed, its name and its size only:
    normal, with the mean and standard deviation that `distribution` gives for a name and a parameter."""

    def fill(job: tuple[str, Tensor, int]) -> None:
        name, parameter, chunk = job
        part = parameter.detach().view(-1)[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{chunk}".encode()))
        mean, std = distribution(name, parameter)
        part.copy_(torch.empty(part.numel()).normal_(mean, std, generator=generator))

    jobs = [
        (name, parameter, chunk)
        for name, parameter in model.named_parameters()
        for chunk in range(math.ceil(parameter.numel() / _CHUNK))
    ]
    threads = torch.get_num_threads()
    # the generators run on one thread each; their threads must not start OpenMP teams of their own
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, jobs))
    finally:
        torch.set_num_threads(threads)


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype that weights can have, given as such or by name, with or without "torch.".

    Raises:
        TypeError: neither a dtype nor a name.
        ValueError: another dtype.
    """
    if not isinstance(dtype, (torch.dtype, str)):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected a torch.dtype or one of {', '.join(_DTYPES)}")
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype: got {name[:80]!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory.

    Raises:
        CheckpointError: there are none, or an index names files that are missing or outside.
    """
    index = directory / _INDEX
    if os.path.exists(index):
        names = _indexed_names(index)
        files = [directory / name for name in names]
        absent = [file.name for file in files if not os.path.exists(file)]
        if absent:
            raise CheckpointError(f"{directory}: files named by {_INDEX} are missing: {_listed(absent)}")
        return files
    if os.path.exists(directory / _SINGLE):
        return [directory / _SINGLE]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory}: found {_listed(pickles)} and no safetensors; pickled weights can run code and are not loaded"
        )
    raise CheckpointError(f"{directory}: no *.safetensors there, expected {_SINGLE} or {_INDEX}")


def _indexed_names(index: Path) -> list[str]:
    """The files that an index names, each a plain name."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({reason(error)})") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: not a safetensors index (weight_map: got {shown(weight_map)}, expected files by tensor name)"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{index}: not a safetensors index (weight_map[{shown(tensor)}]: got {shown(name)}, "
                "expected a file name)"
            )
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: got files outside the directory, or not *.safetensors: {_listed(outside)}")
    return names


def inventory(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
    """Each tensor's shape, from the headers alone; and the dtype that most tensors have."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    dtypes: dict[str, int] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if name in places:
                    raise CheckpointError(
                        f"{shown(name)}: stored twice, in {places[name].name} and {file.name} of {file.parent}"
                    )
                part = handle.get_slice(name)
                places[name], shapes[name] = file, tuple(part.get_shape())
                dtypes[part.get_dtype()] = dtypes.get(part.get_dtype(), 0) + 1
    names = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    unknown = sorted(set(dtypes) - set(names))
    if unknown:
        raise CheckpointError(
            f"{files[0].parent}: got tensors of dtype {_listed(unknown)}, expected {_listed(list(names))}"
        )
    return shapes, names[max(dtypes, key=dtypes.__getitem__)] if dtypes else torch.float32


def compare(directory: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """`CheckpointError` unless the files hold the tensors that a model has, of their shapes."""
    problems = []
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    unknown = [name for name in found if name not in expected]
    if unknown:
        problems.append(f"{len(unknown)} not of this model: {_listed(unknown)}")
    misshapen = [
        f"{name} {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape: {_listed(misshapen)}")
    if problems:
        raise CheckpointError(f"{directory}: tensors do not match the config: " + "; ".join(problems))


def fill(model: nn.Module, directory: Path, files: list[Path]) -> None:
    """Copies the files' tensors into the model; warns of NaN and infinite values."""
    state, not_finite = model.state_dict(), []
    with torch.no_grad():
        for name, tensor in _tensors(files):
            if not torch.isfinite(tensor.sum(dtype=torch.float64)):
                not_finite.append(name)
            state[name].copy_(tensor)
    if not_finite:
        warnings.warn(f"{directory}: NaN or infinite values in {_listed(not_finite)}", RuntimeWarning, stacklevel=4)


def save(model: nn.Module, directory: Path) -> None:
    """Writes all tensors as one file."""
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, directory / _SINGLE, {"format": "pt"})


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                yield name, handle.get_tensor(name)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """The file's header and tensors; `CheckpointError` where it is no safetensors file, also if a tensor shows it."""
    try:
        with open_regular(file) as stream:
            # the library itself would wait for a pipe, and read any header that fits into 100 MB
            header = int.from_bytes(stream.read(8), "little")
        if header > _MOST_HEADER_BYTES:
            raise ValueError(f"header of {header} bytes, expected at most {_MOST_HEADER_BYTES}")
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not a readable safetensors file ({reason(error)})") from None


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(name if len(name) <= 200 else f"{name[:200]}..." for name in names[:_LISTED]) + (
        f" and {rest} more" if rest > 0 else ""
    )
