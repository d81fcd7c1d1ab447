"""The C++ backend: loading `vlmkern._C` and passing tensors to it as pointers, sizes and strides."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from .._backends import BackendUnavailable

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
    """Loads the extension and what calls it. Left to the first op, a process that is forked meanwhile by another thread
    would wait for an import that nobody ends."""
    from . import attention, attention_pool, linear, swiglu_mlp  # noqa: F401

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
    """The extension's number for one that `require_dtype` lets pass."""
    return _DTYPE_CODES[dtype]


def require_dtype(op: str, dtype: torch.dtype) -> None:
    """Declines a call: raises BackendUnavailable where the native kernels do not have the dtype."""
    if dtype not in _DTYPE_CODES:
        raise BackendUnavailable(f"backend 'native' has no {op} kernel for {dtype}")


def describe() -> dict[str, Any]:
    """Instruction sets and threads, for `vlmkern.backends()`."""
    module, _ = _load()
    if module is None:
        return {"isa": "none", "isas": []}
    return {"isa": module.isa(), "isas": module.usable_isas(), "threads": torch.get_num_threads()}


def describe_cuda() -> dict[str, Any]:
    """What the CUDA half of the extension was compiled for, for `vlmkern.backends()`."""
    module, _ = _load()
    return {"compiled": False} if module is None else module.cuda()
