"""The backend in force: what the user chose, in this thread or for the process, and what compiled code knows of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .availability import checked_name, missing
from .errors import BackendUnavailable

_chosen: ContextVar[str | None] = ContextVar("vlmkern_backend", default=None)
# the blocks of `use_backend` that are open in any thread, oldest first
_open: list[tuple[str]] = []


class _Traced:
    """What code that is being compiled sees of the choice: torch.compile guards attributes, not context variables."""

    name: str | None = None


_traced = _Traced()


def current() -> str:
    """The backend in force: the innermost `use_backend`, else `VLMKERN_BACKEND`, else "auto"."""
    return _chosen.get() or _of_environment()


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
    return checked_name(asked, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every vlmkern op inside the block on one backend.

    Args:
        name: "auto" (the fastest that is there, falling back silently to the reference for calls that
            have no faster kernel), "reference" (plain torch), "native" (C++ on CPU) or "triton".

    A named backend works or raises: nothing falls back. The choice belongs to the calling thread (or
    async task); a backward pass uses the backend that its forward ran under, whichever thread it runs on.
    `torch.compile` makes the choice a part of the graph and compiles again when it changes; it sees the blocks
    that are open in the process, not those of its thread alone.

    Raises:
        ValueError: the name is not one of the above.
        BackendUnavailable: the backend cannot run on this machine.
    """
    checked_name(name, "use_backend")
    if name not in ("auto", "reference"):
        reason = missing(name)
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


@functools.cache
def _of_environment() -> str:
    # read once, at the first call: to look there takes as long as a check of all arguments
    return checked_name(os.environ.get("VLMKERN_BACKEND") or "auto", "VLMKERN_BACKEND")
