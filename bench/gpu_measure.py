"""How a case is measured: each provider's result is checked against float32 before it is timed, rounds are interleaved,
and rates are given as shares of what the card gave in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu_cases import DEVICE, Case, Provider
from torch import Tensor

from vlmkern._files import named_line

# relative to the largest value of the float32 result; a provider beyond is reported and not timed
LIMIT = 5e-2

Row = dict[str, Any]


class DeviceLost(RuntimeError):
    """A provider left the device in a state that this process cannot use."""


def measure(
    case: Case,
    mode: str,
    *,
    rounds: int,
    ceilings: dict[str, float],
    names: Iterable[str] | None = None,
    lost: Iterable[str] = (),
    at: Callable[[str | None], None] = lambda name: None,
) -> list[Row]:
    """Rows of a case in "fwd" or "bwd", one a provider.

    Args:
        names: of the providers that are wanted; None for all.
        lost: providers that a process before this one died of.
        at: is told of each provider before it runs, and None before what they share.

    Raises:
        DeviceLost: a provider broke the device for this process; `at` was told which.
    """
    at(None)
    exact = wide_result(case, mode)
    calls: dict[str, Callable[[], Any]] = {}
    rows = []
    for name, provider in case.providers.items():
        if names is not None and name not in names:
            continue
        row: Row = {"provider": name}
        rows.append(row)
        if name in lost:
            row["unavailable"] = "it ended the process, or gave no sign of life"
        elif mode == "bwd" and name in case.forward_only:
            row["unavailable"] = "forward only"
        else:
            at(name)
            row |= checked(case, provider, mode, exact, calls, name)
    at(None)
    del exact
    for name, milliseconds in DEVICE.times(calls, rounds).items():
        row = next(row for row in rows if row["provider"] == name)
        row |= rates(case, mode, milliseconds, ceilings)
    timed = {row["provider"]: row["ms"] for row in rows if "ms" in row}
    others = [value for name, value in timed.items() if name != "vlmkern"]
    if "vlmkern" in timed and others:
        next(row for row in rows if row["provider"] == "vlmkern")["x_best_other"] = min(others) / timed["vlmkern"]
    return rows


def checked(
    case: Case, provider: Provider, mode: str, exact: list[Tensor], calls: dict[str, Callable[[], Any]], name: str
) -> Row:
    """Error and memory of a provider, which goes among `calls` if it is right; or why it does not."""
    row: Row = {}
    try:
        call = forward(case, provider) if mode == "fwd" else backward(case, provider)
        row["relative_error"] = max(
            ((x.float() - y).abs().max() / y.abs().max()).item() for x, y in zip(call(), exact, strict=True)
        )
        row["peak_mib"] = round(DEVICE.peak_memory(call) / 2**20, 1)
    except Exception as error:
        # a backend that this card, build or shape does not have; what it said is kept with the results
        row["unavailable"] = named_line(error)
        if not DEVICE.alive():
            raise DeviceLost(f"{name}: {named_line(error)}") from error
        return row
    if row["relative_error"] <= LIMIT:
        calls[name] = call
    else:
        row["unavailable"] = f"wrong: relative error {row['relative_error']:.2g}"
    return row


def rates(case: Case, mode: str, milliseconds: float, ceilings: dict[str, float]) -> Row:
    """A time, and what it comes to. The floor is what the card needs for the products or for the bytes."""
    times = 1 if mode == "fwd" else case.backward_flops
    flops, least = times * case.flops, times * case.least_bytes
    tflops, gigabytes = flops / milliseconds / 1e9, least / milliseconds / 1e6
    return {
        "ms": milliseconds,
        "tflops": tflops,
        "gb_per_s": gigabytes,
        "of_floor": max(tflops / ceilings["matmul_tflops"], gigabytes / ceilings["copy_gb_per_s"]),
    }


def forward(case: Case, provider: Provider) -> Callable[[], list[Tensor]]:
    """A call that gives the result."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return results(provider(*case.inputs))

    return call


def backward(case: Case, provider: Provider) -> Callable[[], list[Tensor]]:
    """A call that gives the gradients by inputs and weights, of a forward that was run before."""
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    out = results(provider(*leaves))
    # not of ones: in sums of gradients those would hide what is missing or twice there
    generator = torch.Generator(device=out[0].device).manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, device=x.device).to(torch.bfloat16).to(x.dtype) for x in out]
    return lambda: list(torch.autograd.grad(out, [*leaves, *case.weights], grads, retain_graph=True))


def results(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """What a provider gives, as a list."""
    return [out] if isinstance(out, Tensor) else list(out)


def wide_result(case: Case, mode: str) -> list[Tensor]:
    """What the case's reference gives for the same values in float32."""
    kept = [(x, x.data) for module in case.modules for x in module.parameters()] + [(x, x.data) for x in case.weights]
    for x, data in kept:
        x.data = data.float()
    try:
        wide = Case([x.float() for x in case.inputs], case.reference, {}, 0, 0, case.weights)
        return (forward if mode == "fwd" else backward)(wide, case.reference)()
    finally:
        for x, data in kept:
            x.data = data
