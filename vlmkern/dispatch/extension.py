"""The C++ extension `vlmkern._C`: loading it, and passing tensors to it as pointers, sizes and strides."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .errors import BackendUnavailable

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from .. import _C

        _C.isa()
    except ImportError as error:
        return (
            None,
            f"the extension is not built or does not load ({error}); reinstall vlmkern with a C++ compiler",
        )
    except RuntimeError as error:  # VLMKERN_CPU_ISA asks for what this CPU does not have
        return None, str(error)
    return _C, None


def load() -> None:
    """Loads the extension, if it is there. Left to the first op, a process that is forked meanwhile by another thread
    would wait for an import that nobody ends."""
    _load()


def reason_unavailable() -> str | None:
    """Why the extension cannot be used, or None when it can."""
    return _load()[1]


def extension() -> ModuleType:
    """The extension module.

    Raises:
        BackendUnavailable: it is not built, does not load, or VLMKERN_CPU_ISA names what this CPU lacks.
    """
    module, reason = _load()
    if module is None:
        raise BackendUnavailable(f"backend 'native' is not available: {reason}")
    return module


def dtype_code(dtype: torch.dtype) -> int:
    """The extension's number for one that it does not lack."""
    return _DTYPE_CODES[dtype]


def lacks(dtype: torch.dtype) -> str | None:
    """Why the native kernels do not take a dtype, or None when they do."""
    return None if dtype in _DTYPE_CODES else f"it has no kernel for {dtype}"


def extents(*tensors: Tensor | None) -> list[int]:
    """For each tensor the elements from its address to the end of its storage, by which the extension checks what it is
    told of them; 0 for None."""
    # a tensor without elements may begin behind the end of its storage
    return [
        0 if t is None else max(0, t.untyped_storage().nbytes() // t.element_size() - t.storage_offset())
        for t in tensors
    ]


def describe() -> dict[str, Any]:
    """Instruction sets, the CPU and threads, for `vlmkern.backends()`."""
    module, _ = _load()
    if module is None:
        return {"isa": "none", "isas": []}
    return {
        "isa": module.isa(),
        "isas": module.usable_isas(),
        **({"emulated_isas": module.emulated_isas()} if module.emulated_isas() else {}),
        "vendor": module.cpu_vendor(),
        "features": module.cpu_features(),
        "threads": torch.get_num_threads(),
    }
