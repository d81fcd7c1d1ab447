"""Which backends are on this machine."""

from __future__ import annotations

import functools
import warnings

import torch

from ..kernels._interpreter import interpreting
from . import extension
from .errors import BackendFallbackWarning

BACKENDS = ("auto", "reference", "native", "triton")

# backends that were there once: asking torch for devices and the environment takes microseconds of every call
_found: set[str] = set()


def missing(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None when it can."""
    if name in _found:
        return None
    reason = _look_for(name)
    if reason is None:
        _found.add(name)
    return reason


@functools.cache
def device_type(name: str) -> str:
    """The devices that an available backend takes tensors of."""
    return "cpu" if name == "native" or (name == "triton" and interpreting()) else "cuda"


@functools.cache
def triton_version() -> str | None:
    """None without it."""
    # metadata, not an import: importing triton takes a second and belongs to the first kernel
    from importlib import metadata

    for distribution in ("triton", "triton-windows", "pytorch-triton"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def warn_once(name: str) -> None:
    """Says that ops run on the reference for want of a backend."""
    warnings.warn(
        f"vlmkern: backend {name!r} is not available, ops run on the plain-torch reference: {missing(name)}",
        BackendFallbackWarning,
        stacklevel=2,
    )


def checked_name(name: str, source: str) -> str:
    """The name, if a backend has it.

    Raises:
        ValueError: none has; `source` says where the name came from.
    """
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


def _look_for(name: str) -> str | None:
    if name == "native":
        return extension.reason_unavailable()
    if name == "triton":
        if triton_version() is None:
            return "triton is not installed"
        if interpreting() or torch.cuda.is_available():
            return None
        return "no CUDA device (set TRITON_INTERPRET=1 to interpret the kernels on CPU)"
    return None
