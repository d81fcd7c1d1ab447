"""Who computes an op: modules of its room that say what they support, asked in turn.

Every op has a plain-torch reference for any device. A provider is a module with a function of the op's name, which
takes the op's problem and checks nothing, and with `supports(problem, target)`, which gives None or the reason why the
call is not for it; of an op that computes gradients `supports_bwd`. `kernel(problem)` may say which kernel runs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import availability, targets
from .errors import BackendUnavailable
from .targets import Target

# fastest first; the reference always ends the list
_ORDER = {"cpu": ("native",), "cuda": ("triton",)}

_log = logging.getLogger("vlmkern.dispatch")
# decisions that the log has, one of each
_logged: set[tuple[str, str, tuple[str, ...]]] = set()
# where decisions are kept that are only asked for, in place of being carried out
_asked: ContextVar[list[Decision] | None] = ContextVar("vlmkern_asked", default=None)
_watched = "dispatch" in os.environ.get("VLMKERN_LOG", "").split(",")


class Op(NamedTuple):
    """What is known of an op here.

    Attributes:
        problem: the NamedTuple of its arguments.
        fake: problem -> results of the right shapes and dtypes.
        providers: backend -> its module, or what gives it, if importing it is left to the first call.
        backward: whether it computes gradients.
    """

    name: str
    problem: Callable[..., Any]
    fake: Callable[[Any], Any]
    providers: dict[str, ModuleType | Callable[[], ModuleType]]
    backward: bool


class Provider(NamedTuple):
    """What a backend has for an op."""

    supports: Callable[[Any, Target], str | None]
    call: Callable[[Any], Any]
    kernel: Callable[[Any], str] | None


class Decision(NamedTuple):
    """Which backend a call goes to.

    Attributes:
        kernel: which of its kernels, where it says so.
        refused: backend -> why the call did not go there.
    """

    op: str
    backend: str
    kernel: str
    refused: dict[str, str]

    def __str__(self) -> str:
        which = f" ({self.kernel})" if self.kernel else ""
        return "; ".join([f"{self.op}: {self.backend}{which}", *(f"not {b}: {why}" for b, why in self.refused.items())])


_ops: dict[str, Op] = {}


def register(op: Op) -> None:
    """Makes an op known."""
    _ops[op.name] = op


def known(op: torch._ops.OpOverload) -> Op:
    """What is known of an op of torch's."""
    return _ops[op._schema.name.split("::")[1]]


def all_ops() -> list[Op]:
    """Every op, by name."""
    return [_ops[name] for name in sorted(_ops)]


def ops_of(backend: str) -> list[str]:
    """The ops that a backend has kernels for, by name."""
    return sorted(name for name, op in _ops.items() if backend in op.providers)


@functools.cache
def provider(op: str, backend: str) -> Provider:
    """What `backend` has for `op`."""
    found = _ops[op].providers[backend]
    module = found if isinstance(found, ModuleType) else found()
    supports = getattr(module, "supports_bwd" if _ops[op].backward else "supports", _anything)
    kernel = None if _ops[op].backward else getattr(module, "kernel", None)
    return Provider(supports, getattr(module, op), kernel)


def run(op: Op, problem: Any, device: torch.device, chosen: str) -> Any:
    """Computes `op` on the backend `chosen`, or for "auto" on the first that supports the problem.

    Raises:
        BackendUnavailable: a backend was named and does not.
    """
    backend, refused = _decide(op, problem, device, chosen)
    found = provider(op.name, backend)
    if _watched or _asked.get() is not None:
        kernel = found.kernel(problem) if found.kernel is not None else ""
        decision = Decision(op.name, backend, kernel, refused or {})
        _note(decision)
        if _asked.get() is not None:
            _asked.get().append(decision)
            return op.fake(problem)
    return found.call(problem)


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Decision]:
    """Which backend and kernel an op would run on, and why not on others, without running it.

    Args:
        op: a function of `vlmkern.ops`, called with the further arguments; its checks are made.

    Returns:
        A decision for each op that it calls, in this order. `str` of one is a sentence.

    Raises:
        BackendUnavailable: the backend in force does not support the call.

    Example:
        print(*vlmkern.explain(ops.linear, x, weight))
    """
    decisions: list[Decision] = []
    token = _asked.set(decisions)
    try:
        op(*args, **kwargs)
    finally:
        _asked.reset(token)
    return decisions


def _decide(op: Op, problem: Any, device: torch.device, chosen: str) -> tuple[str, dict[str, str] | None]:
    target = targets.of_device(device.type)
    if chosen != "auto":
        reason = _unusable(op, chosen, device) or provider(op.name, chosen).supports(problem, target)
        if reason is not None:
            raise BackendUnavailable(f"backend {chosen!r} cannot run vlmkern::{op.name}: {reason}")
        return chosen, None
    refused: dict[str, str] | None = None
    for backend in _ORDER.get(device.type, ()):
        if backend not in op.providers:
            continue
        reason = availability.missing(backend)
        if reason is not None:
            availability.warn_once(backend)
        else:
            reason = provider(op.name, backend).supports(problem, target)
            if reason is None:
                return backend, refused
        refused = {**(refused or {}), backend: reason}
    return "reference", refused


def _unusable(op: Op, backend: str, device: torch.device) -> str | None:
    """Why a backend that was named is not for any call of an op on a device."""
    if backend == "reference":
        return None
    reason = availability.missing(backend)
    if reason is None and backend not in op.providers:
        reason = f"it has no kernel for {op.name}"
    if reason is None and device.type != availability.device_type(backend):
        reason = f"it takes {availability.device_type(backend)} tensors here, got {device.type}"
        if backend == "triton" and device.type == "cpu":
            reason += " (set TRITON_INTERPRET=1 before the first import of triton to interpret on CPU)"
    return reason


def _note(decision: Decision) -> None:
    key = (decision.op, decision.backend + decision.kernel, tuple(decision.refused.values()))
    if _watched and key not in _logged:
        _logged.add(key)
        _log.info("%s", decision)


def _anything(problem: Any, target: Target) -> None:
    return None


if _watched:
    _log.setLevel(logging.INFO)
    _log.addHandler(logging.StreamHandler())
