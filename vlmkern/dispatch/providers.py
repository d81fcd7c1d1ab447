"""Who computes an op: modules of its room that say what they support, asked in turn.

Every op has a plain-torch reference for any device. A provider is a module with a function of the op's name, which
takes the op's problem and checks nothing, and with `supports(problem, target)`, which gives None or the reason why the
call is not for it; of an op that computes gradients `supports_bwd`. `kernel(problem)` may say which kernel runs.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
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
_logs = "dispatch" in os.environ.get("VLMKERN_LOG", "").split(",")
# how many want to know of decisions: the log, and every `explain` that is under way in any thread
_observed = int(_logs)
_lock = threading.Lock()


@dataclass(frozen=True)
class Op:
    """What is known of an op here.

    Attributes:
        problem: the NamedTuple of its arguments.
        fake: problem -> results of the right shapes and dtypes.
        providers: backend -> its module, or what gives it, if importing it is left to the first call.
        backward: whether it computes gradients.
        keeps: whether it is another op that also gives what its gradient takes; lists leave it out.
    """

    name: str
    problem: Callable[..., Any]
    fake: Callable[[Any], Any]
    providers: dict[str, ModuleType | Callable[[], ModuleType]]
    backward: bool
    keeps: bool = False
    # by type of device, when first asked
    routes: dict[str, Route] = field(default_factory=dict, compare=False, repr=False)


class Provider(NamedTuple):
    """What a backend has for an op."""

    supports: Callable[[Any, Target], str | None]
    call: Callable[[Any], Any]
    kernel: Callable[[Any], str] | None


class Route(NamedTuple):
    """Whom calls on a device go to, where the user names nobody.

    Attributes:
        providers: of the backends that are there, by name, the reference last.
        refused: backend -> why it is not among them.
    """

    target: Target
    providers: dict[str, Provider]
    refused: dict[str, str]


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
    return sorted(name for name, op in _ops.items() if backend in op.providers and not op.keeps)


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
    if _observed:
        return _run_observed(op, problem, device, chosen)
    if chosen != "auto":
        return _named(op, problem, device, chosen).call(problem)
    target, route, _ = op.routes.get(device.type) or _route(op, device.type)
    for supports, call, _ in route.values():
        if supports(problem, target) is None:
            return call(problem)
    raise AssertionError(f"vlmkern::{op.name}: the reference supports everything")


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
    global _observed
    decisions: list[Decision] = []
    token = _asked.set(decisions)
    with _lock:
        _observed += 1
    try:
        op(*args, **kwargs)
    finally:
        with _lock:
            _observed -= 1
        _asked.reset(token)
    return decisions


def _run_observed(op: Op, problem: Any, device: torch.device, chosen: str) -> Any:
    """`run`, or for `explain` what it would be, and a line in the log."""
    refused: dict[str, str] = {}
    if chosen != "auto":
        backend, found = chosen, _named(op, problem, device, chosen)
    else:
        target, route, missing = op.routes.get(device.type) or _route(op, device.type)
        refused = dict(missing)
        for backend, found in route.items():
            reason = found.supports(problem, target)
            if reason is None:
                break
            refused[backend] = reason
    kernel = found.kernel(problem) if found.kernel is not None else ""
    decision = Decision(op.name, backend, kernel, refused)
    if _logs:
        _note(decision)
    asked = _asked.get()
    if asked is None:
        return found.call(problem)
    asked.append(decision)
    return op.fake(problem)


def _route(op: Op, device: str) -> Route:
    found, refused = {}, {}
    for backend in (*_ORDER.get(device, ()), "reference"):
        if backend not in op.providers:
            continue
        reason = availability.missing(backend)
        if reason is None:
            found[backend] = provider(op.name, backend)
        else:
            availability.warn_once(backend)
            refused[backend] = reason
    op.routes[device] = Route(targets.of_device(device), found, refused)
    return op.routes[device]


def _named(op: Op, problem: Any, device: torch.device, backend: str) -> Provider:
    """The provider that the user named, if it supports the call."""
    reason = _unusable(op, backend, device)
    if reason is None:
        found = provider(op.name, backend)
        reason = found.supports(problem, targets.of_device(device.type))
        if reason is None:
            return found
    raise BackendUnavailable(f"backend {backend!r} cannot run vlmkern::{op.name}: {reason}")


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
    if key not in _logged:
        _logged.add(key)
        _log.info("%s", decision)


def _anything(problem: Any, target: Target) -> None:
    return None


if _logs:
    _log.setLevel(logging.INFO)
    _log.addHandler(logging.StreamHandler())
