"""Weights in and out of a model: safetensors with checks that name every tensor, and seeded random weights."""

from __future__ import annotations

import ctypes
import json
import math
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import JinaVLMConfig

if TYPE_CHECKING:
    from .model import JinaVLM

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LISTED = 20
# values drawn at a time: bounds the float32 scratch of a thread to 16 MiB
_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint's files or tensors are not those of the model."""


def uninitialised(
    cls: type[JinaVLM], config: JinaVLMConfig | None, dtype: torch.dtype, device: torch.device | str
) -> JinaVLM:
    """A model whose weights are allocated and not yet set."""
    with torch.device("meta"):
        model = cls(config)
    model = model.to(dtype).to_empty(device=device)
    _advise_huge_pages(model)
    return model


def _advise_huge_pages(model: JinaVLM) -> None:
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


def randomise(model: JinaVLM, seed: int) -> None:
    """Sets every weight from a generator of its own, so that a weight depends on the seed, its name and its size only:
    matrices normal with standard deviation fan_in ** -0.5, norm weights about 1, vision biases about 0, and the
    decoder's q, k and v biases 0, as released."""

    def fill(job: tuple[str, Tensor, int]) -> None:
        name, parameter, chunk = job
        part = parameter.detach().view(-1)[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{chunk}".encode()))
        mean, std = _distribution(name, parameter)
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


def _distribution(name: str, parameter: Tensor) -> tuple[float, float]:
    leaf = name.rsplit(".", 1)[-1]
    if "language_model" in name and leaf in ("q_b", "k_b", "v_b"):
        return 0.0, 0.0
    if "lnorm.weight" in name or "ln_f" in name:
        return 1.0, 0.1
    if "embed" in name and "proj" not in name:
        return 0.0, 1.0 if "language_model" in name else 0.1
    if parameter.dim() == 1:
        return 0.0, 0.1
    return 0.0, parameter.shape[1] ** -0.5


def load(cls: type[JinaVLM], directory: Path, dtype: torch.dtype | None, device: torch.device | str) -> JinaVLM:
    """See `JinaVLM.from_pretrained`."""
    config = JinaVLMConfig.from_pretrained(directory)
    files = _weight_files(directory)
    shapes, stored_dtype = _inventory(files)
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in cls(config).state_dict().items()}
    _compare(directory, expected, {name: shape for name, (_, shape) in shapes.items()})
    model = uninitialised(cls, config, dtype or stored_dtype, device)
    state, not_finite = model.state_dict(), []
    with torch.no_grad():
        for name, tensor in _tensors(files):
            if not torch.isfinite(tensor.sum(dtype=torch.float64)):
                not_finite.append(name)
            state[name].copy_(tensor)
    if not_finite:
        warnings.warn(f"{directory}: NaN or infinite values in {_listed(not_finite)}", RuntimeWarning, stacklevel=3)
    return model.eval()


def save(model: JinaVLM, directory: Path) -> None:
    """See `JinaVLM.save_pretrained`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n", encoding="utf-8")
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()},
        directory / _SINGLE,
        {"format": "pt"},
    )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index}: got files outside the directory: {_listed(outside)}")
        files = [directory / name for name in names]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise CheckpointError(f"{directory}: files named by {_INDEX} are missing: {_listed(absent)}")
        return files
    if (directory / _SINGLE).exists():
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


def _inventory(files: list[Path]) -> tuple[dict[str, tuple[Path, tuple[int, ...]]], torch.dtype]:
    """Where each tensor is and its shape, from the headers alone; and the dtype that most tensors have."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    dtypes: dict[str, int] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if name in found:
                    raise CheckpointError(f"{name}: stored twice, in {found[name][0].name} and {file.name}")
                part = handle.get_slice(name)
                found[name] = (file, tuple(part.get_shape()))
                dtypes[part.get_dtype()] = dtypes.get(part.get_dtype(), 0) + 1
    names = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    unknown = sorted(set(dtypes) - set(names))
    if unknown:
        raise CheckpointError(
            f"{files[0].parent}: got tensors of dtype {_listed(unknown)}, expected {_listed(list(names))}"
        )
    return found, names[max(dtypes, key=dtypes.__getitem__)] if dtypes else torch.float32


def _compare(directory: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
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


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                yield name, handle.get_tensor(name)


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
