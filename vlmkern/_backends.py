"""Which implementation of an op runs: the choice made by the user, what is there, and the lookup.

Every op has a plain-torch reference for any device. Faster implementations are tried before it in the
order of `_AUTO_ORDER`; an implementation declines a call that it has no kernel for by raising
`BackendUnavailable` before it does any work.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .kernels._interpreter import interpreting

BACKENDS = ("auto", "reference", "native", "triton", "cuda")

# fastest first; the reference always ends the list
_AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}

_chosen: ContextVar[str | None] = ContextVar("vlmkern_backend", default=None)
# the blocks of `use_backend` that are open in any thread, oldest first
_open: list[tuple[str]] = []
# backends that were there once: asking torch for devices and the environment takes microseconds of every call
_found: set[str] = set()
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}


class _Traced:
    """What code that is being compiled sees of the choice: torch.compile guards attributes, not context variables."""

    name: str | None = None


_traced = _Traced()


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run here, or has no kernel for this call."""


class BackendFallbackWarning(RuntimeWarning):
    """A faster backend should have been there and was not; results are right, but slower."""


def current() -> str:
    """The backend in force: the innermost `use_backend`, else `VLMKERN_BACKEND`, else "auto"."""
    return _chosen.get() or _checked_name(os.environ.get("VLMKERN_BACKEND") or "auto", "VLMKERN_BACKEND")


def requested() -> str:
    """The `backend` argument of an op that is called now: in compiled code the choice in force, which becomes a part of
    the graph and is compiled anew when it changes; elsewhere "", for what is in force when the op runs."""
    if not torch.compiler.is_compiling():
        return ""
    return _traced.name or os.environ.get("VLMKERN_BACKEND") or "auto"


def settled(asked: str) -> str:
    """The backend of a forward that was called with `backend=asked`.

    Raises:
        BackendUnavailable: compiled code carries one backend and is called under another.
    """
    if asked in ("", "auto"):
        return current()
    chosen = _chosen.get()
    if chosen not in (None, asked):
        raise BackendUnavailable(
            f"backend {chosen!r} is in force, but the code that runs was compiled for {asked!r}: compile it again"
        )
    return _checked_name(asked, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every vlmkern op inside the block on one backend.

    Args:
        name: "auto" (the fastest that is there, falling back silently to the reference for calls that
            have no faster kernel), "reference" (plain torch), "native" (C++ on CPU), "triton", or "cuda".

    A named backend works or raises: nothing falls back. The choice belongs to the calling thread (or
    async task); a backward pass uses the backend that its forward ran under, whichever thread it runs on.
    `torch.compile` makes the choice a part of the graph and compiles again when it changes; it sees the blocks
    that are open in the process, not those of its thread alone.

    Raises:
        ValueError: the name is not one of the above.
        BackendUnavailable: the backend cannot run on this machine.
    """
    _checked_name(name, "use_backend")
    if name not in ("auto", "reference"):
        reason = _missing(name)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} is not available: {reason}")
    token, block = _chosen.set(name), (name,)
    _open.append(block)
    _traced.name = name
    try:
        yield
    finally:
        _chosen.reset(token)
        # by identity: blocks of other threads may carry the same name
        del _open[next(i for i in reversed(range(len(_open))) if _open[i] is block)]
        _traced.name = _open[-1][0] if _open else None


def backends() -> dict[str, dict[str, Any]]:
    """What can run here: one dict per backend with `available` and, where it is not, `reason`.

    "native" adds `isa` (in use), `isas` (usable) and `threads`; "triton" adds `version` and `interpreter`;
    "cuda" says what the extension was compiled for; each lists the `ops` it has kernels for.
    """
    report: dict[str, dict[str, Any]] = {}
    for name in BACKENDS[1:]:
        reason = _missing(name)
        entry: dict[str, Any] = {"available": reason is None}
        if reason is not None:
            entry["reason"] = reason
        entry["ops"] = sorted(op for op, table in _implementations.items() if name in table)
        report[name] = entry
    from . import native

    report["native"] |= native.describe()
    report["cuda"] |= native.describe_cuda()
    report["triton"] |= {
        "version": _triton_version(),
        "interpreter": interpreting(),
    }
    return report


def register(op: str, implementations: dict[str, Callable[..., Any]]) -> None:
    """Records the function that each backend has for an op."""
    _implementations[op] = implementations


def run(op: str, device: torch.device, args: tuple[Any, ...], chosen: str) -> Any:
    """Calls the implementation of `op` that the backend `chosen` has, or the fastest for "auto".

    Raises:
        BackendUnavailable: a backend was named and has no kernel for this call.
    """
    table = _implementations[op]
    if chosen != "auto":
        _require(op, chosen, device, table)
        return table[chosen](*args)
    for name in _AUTO_ORDER.get(device.type, ("reference",))[:-1]:
        if name not in table:
            continue
        if _missing(name) is not None:
            _warn_once(name)
            continue
        try:
            return table[name](*args)
        except BackendUnavailable:
            continue
    return table["reference"](*args)


def _require(op: str, name: str, device: torch.device, table: dict[str, Callable[..., Any]]) -> None:
    if name == "reference":
        return
    reason = _missing(name)
    if reason is None and name not in table:
        reason = f"it has no kernel for {op}"
    if reason is None and device.type != _device_type(name):
        reason = f"it takes {_device_type(name)} tensors here, got {device.type}"
        if name == "triton" and device.type == "cpu":
            reason += " (set TRITON_INTERPRET=1 before the first import of triton to interpret on CPU)"
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run vlmkern::{op}: {reason}")


@functools.cache
def _device_type(name: str) -> str:
    """The devices that an available backend takes tensors of."""
    return "cpu" if name == "native" or (name == "triton" and interpreting()) else "cuda"


def _missing(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None when it can."""
    if name in _found:
        return None
    reason = _look_for(name)
    if reason is None:
        _found.add(name)
    return reason


def _look_for(name: str) -> str | None:
    if name == "native":
        from . import native

        return native.reason_unavailable()
    if name == "triton":
        if _triton_version() is None:
            return "triton is not installed"
        if interpreting() or torch.cuda.is_available():
            return None
        return "no CUDA device (set TRITON_INTERPRET=1 to interpret the kernels on CPU)"
    if name == "cuda":
        return "no CUDA C++ kernels ship in this version; use 'triton' on GPUs"
    return None


@functools.cache
def _triton_version() -> str | None:
    # metadata, not an import: importing triton takes a second and belongs to the first kernel
    from importlib import metadata

    for distribution in ("triton", "triton-windows", "pytorch-triton"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"vlmkern: backend {name!r} is not available, ops run on the plain-torch reference: {_missing(name)}",
        BackendFallbackWarning,
        stacklevel=2,
    )


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name
