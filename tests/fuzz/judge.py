"""Whether a result is right: its error against float64, next to that of plain torch in the same dtype.

    |y - exact| <= 2 |plain - exact| + two roundings of the largest exact value + 6 |what roundings move|

Nothing here is absolute: the limit scales with the result. The last term is for results that cancel, where plain torch
may be right by chance. It is how far the exact result moves when every step of the formula is rounded at random (see
`Shaken`), the largest of up to a dozen draws. The largest values are those of the whole tensor, or of a row where rows
differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .rounding import SMALLEST


class Failure(Exception):
    """A case is not as it should be."""


def close(
    name: str,
    actual: Tensor,
    exact: Tensor,
    *,
    plain: Callable[[], Tensor],
    moved: Callable[[], Iterable[Tensor]],
    precision: torch.dtype,
    per_row: bool,
    nan_is_strict: bool = True,
    chaotic: bool = False,
) -> None:
    """Raises Failure unless `actual` is as near to `exact` as can be asked of `precision`.

    Args:
        plain: the formula in plain torch in that precision. `moved`: exact results with roundings at random. Both are
            computed only where they are needed.
        nan_is_strict: where the exact result is not finite the actual one must not be either. It is not strict for
            infinities, as what is left of them depends on the order of the steps.
        chaotic: roundings decide what is chosen, and a dozen draws may not show all that can be.
    """
    if actual.shape != exact.shape:
        raise Failure(f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    if actual.numel() == 0:
        return
    # under autocast a gradient has been in that dtype on its way to its own
    narrowest = min(precision, actual.dtype, key=lambda dtype: torch.finfo(dtype).max)
    # a gradient may be stored in a coarser dtype than it was computed in, or one of a smaller range
    precision = max(precision, actual.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    y, exact = actual.detach().to(torch.float64), exact.detach()
    comparable = y.isfinite() & exact.isfinite()
    if not comparable.all():
        comparable = _finite_where_it_should_be(name, y, exact, plain, narrowest, precision, nan_is_strict)
    error = _largest((y - exact).where(comparable, 0), per_row)
    size = _largest(exact.where(comparable, 0), per_row)
    # products that take subnormals for zeros do so in each of the terms of a sum
    limit = torch.finfo(precision).eps * size + 64 * max(_subnormal(precision), _subnormal(actual.dtype))
    if bool((error <= limit).all()):
        return
    theirs = plain().detach().to(torch.float64)
    both = comparable & theirs.isfinite()
    limit = limit + 2 * _largest((theirs - exact).where(both, 0), per_row)
    if bool((error <= limit).all()):
        return
    # for float64 the exact result itself is no better than the judged one
    factor = 64 if precision == torch.float64 else 16 if chaotic else 6
    noise = torch.zeros_like(limit)
    for other in moved():
        noise = torch.maximum(noise, _largest((other.detach() - exact).nan_to_num(0, 0, 0).where(both, 0), per_row))
        if bool((error <= limit + factor * noise).all()):
            return
    limit = limit + factor * noise
    error = _largest((y - exact).where(both, 0), per_row)
    if not bool((error <= limit).all()):
        row = int((error / limit).argmax())
        where = f" in row {row}" if per_row else ""
        raise Failure(
            f"{name}{where}: error {error.flatten()[row]:.3g}, limit {limit.flatten()[row]:.3g},"
            f" largest value {size.flatten()[row]:.3g}"
        )


def between(name: str, actual: Tensor, low: Tensor, high: Tensor, precision: torch.dtype) -> None:
    """Raises Failure unless every element lies between its bounds, but for roundings."""
    if actual.numel() == 0:
        return
    # weights add up to one but for the roundings of as many terms as there are tokens: plain torch is outside too
    terms = 8 + actual.shape[-3]
    y, slack = actual.detach().double(), terms * torch.finfo(precision).eps * torch.maximum(low.abs(), high.abs())
    outside = ~((y >= low - slack - SMALLEST) & (y <= high + slack + SMALLEST))
    if bool(outside.any()):
        raise Failure(f"{name}: {int(outside.sum())} elements outside the range of what they are means of")


def nan_like_plain(results: Iterable[Tensor], plain: Iterable[Tensor]) -> None:
    """Raises Failure for NaN in a gradient that is finite in plain torch."""
    for actual, theirs in zip(results, plain, strict=True):
        if bool(actual.isnan().any()) and bool(theirs.isfinite().all()):
            raise Failure("NaN in a gradient")


def same_bits(name: str, first: Tensor, second: Tensor) -> None:
    """Raises Failure unless two results of one call are the same to the bit."""
    # a copy: one element alone may have any stride, which its bytes cannot
    copies = (t.detach().flatten().clone(memory_format=torch.contiguous_format) for t in (first, second))
    a, b = (t.view(torch.uint8) for t in copies)
    if not torch.equal(a, b):
        change = (first.double() - second.double()).abs().nan_to_num(0).max().item()
        raise Failure(f"{name}: another result when called again, by up to {change:.3g}")


def _finite_where_it_should_be(
    name: str,
    y: Tensor,
    exact: Tensor,
    plain: Callable[[], Tensor],
    narrowest: torch.dtype,
    coarsest: torch.dtype,
    strict: bool,
) -> Tensor:
    """Raises Failure for NaN or infinity in the wrong places; returns where both results are finite."""
    bad, should = ~y.isfinite(), ~exact.isfinite()
    if bool((should & ~bad).any()):
        missing = should & ~bad if strict else torch.zeros_like(bad)
        if bool(missing.any()):
            raise Failure(f"{name}: finite in {int(missing.sum())} elements that NaN or infinity should have reached")
    if bool((bad & ~should).any()):
        # what overflows in plain torch, here or on the way, may do so in a kernel
        overflows = exact.abs() >= torch.finfo(narrowest).max * (1 - torch.finfo(coarsest).eps)
        wrong = bad & ~should & ~overflows
        if bool(wrong.any()):
            wrong &= plain().isfinite()
        if bool(wrong.any()):
            raise Failure(f"{name}: NaN or infinity in {int(wrong.sum())} elements that should be finite")
    return ~bad & ~should


def _largest(x: Tensor, per_row: bool) -> Tensor:
    x = x.abs()
    return x.amax(-1).reshape(-1) if per_row and x.dim() > 0 else x.amax().reshape(1)


def _subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, 0.0 if dtype == torch.float64 else SMALLEST)
