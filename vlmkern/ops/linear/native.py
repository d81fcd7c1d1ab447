"""Linear layers on CPU, by the routes of ops/_cpu_products.py."""

from __future__ import annotations

from torch import Tensor

from ...dispatch.extension import lacks
from ...dispatch.targets import Target
from .. import _algebra, _cpu_products
from .._algebra import activate, as_rows
from .problem import Linear, LinearGradient

_KERNELS = {"few_rows": "linear_few_rows", "panels": "panels in float32"}


def supports(p: Linear, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.x.dtype)


def supports_bwd(p: LinearGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.grad.dtype)


def kernel(p: Linear) -> str:
    """By which route the product goes."""
    route = _cpu_products.route(p.x.shape[:-1].numel(), p.weight)
    return _KERNELS.get(route, route)


def linear(p: Linear) -> Tensor:
    """See reference.py."""
    x, weight, bias, activation, residual = p
    residual = None if residual is None else as_rows(residual)
    return _cpu_products.linear(as_rows(x), weight, bias, activation, residual).view(*x.shape[:-1], len(weight))


def linear_keep(p: Linear) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    before = linear(p._replace(activation="none", residual=None))
    y = before.clone() if p.activation == "none" else activate(before, p.activation)
    return y if p.residual is None else y.add_(p.residual), before


def linear_bwd(p: LinearGradient) -> list[Tensor]:
    """See reference.py."""
    return _algebra.linear_bwd(*p, product=_cpu_products.product)
