"""What every op goes through: registration, the choice of a backend, and the errors that tell of it.

`errors`, `extension`, `targets` and `availability` say what there is, `choice` what the user wants, `providers` who
computes a call, `library` tells torch of an op, `checks` are what ops check their arguments with.
"""

from __future__ import annotations

from typing import Any

from . import availability, extension, routes
from .choice import use_backend
from .errors import BackendFallbackWarning, BackendUnavailable
from .providers import explain, ops_of

__all__ = ["BackendFallbackWarning", "BackendUnavailable", "backends", "explain", "use_backend"]


def backends() -> dict[str, dict[str, Any]]:
    """What can run here: one dict per backend with `available` and, where it is not, `reason`.

    "native" adds `isa` (in use), `isas` (usable), `emulated_isas` (of builds for tests), the CPU's `vendor` and
    `features`, its `family` and that one's `routes` of matrix products, and `threads`; "triton" adds `version` and
    `interpreter`; each lists the `ops` it has kernels for.
    """
    report: dict[str, dict[str, Any]] = {}
    for name in availability.BACKENDS[1:]:
        reason = availability.missing(name)
        report[name] = {"available": reason is None, **({} if reason is None else {"reason": reason})}
        report[name]["ops"] = ops_of(name)
    report["native"] |= extension.describe()
    if report["native"]["available"]:
        report["native"] |= routes.describe()
    report["triton"] |= {"version": availability.triton_version(), "interpreter": availability.interpreting()}
    return report
