"""By which route a CPU multiplies matrices: what was measured on each family of CPUs, as a table.

A route is one of
- "few_rows": the C++ kernel that reads a weight once, for a few rows of x;
- "oneDNN": through torch's `mkldnn` ops, which have epilogues and packed weights;
- "torch": F.linear, which in float32 on x86 is MKL;
- "panels": 16-bit operands converted to float32 a panel at a time, and the family's route for float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .targets import Target, of_device

_EVERY: frozenset[str] = frozenset({"gelu_tanh", "gelu", "silu"})
_NONE: frozenset[str] = frozenset()


class Family(NamedTuple):
    """CPUs on which the same routes are the fastest.

    Attributes:
        name: for people.
        vendor: CPUID's, "" where it does not matter.
        feature: what the CPU must have, "" for nothing.
        float32: the route of float32 products, "oneDNN" or "torch".
        epilogues: activations that take less time in oneDNN's epilogue than in a pass of their own over the result.
        panels: whether products of 16-bit types that the CPU has no instructions for go in panels; else torch has them.
        few_rows: rows of x up to which the few-rows kernel is the fastest, by dtype that the CPU has instructions for;
            `FEW_ROWS` where it was not measured.
        measured: the figures that decided it, and their CPU. Of one thread, x [729, 1152] and W [4304, 1152] if nothing
            else is said.
    """

    name: str
    vendor: str
    feature: str
    float32: str
    epilogues: frozenset[str]
    panels: bool
    measured: str
    few_rows: dict[torch.dtype, int] = {}  # noqa: RUF012 (never changed)


FAMILIES = (
    Family(
        "Intel, AMX",
        vendor="GenuineIntel",
        feature="amx_bf16",
        float32="torch",
        epilogues=_NONE,
        panels=True,
        measured="Sapphire Rapids: float32 MKL 172 to 185 GFLOP/s, oneDNN 155 to 177; bfloat16 packed 1,620 to 1,700,"
        " with gelu_tanh in the epilogue 1,060 to 1,090",
    ),
    Family(
        "Intel, AVX-512",
        vendor="GenuineIntel",
        feature="avx512f",
        float32="torch",
        epilogues=_EVERY,
        panels=True,
        measured="Sapphire Rapids without its AMX: MKL as above; bfloat16 by torch 199 ms, in panels 49; float16 423"
        " and 48",
    ),
    Family(
        "Intel, AVX2",
        vendor="GenuineIntel",
        feature="avx2",
        float32="torch",
        epilogues=_NONE,
        panels=True,
        measured="Sapphire Rapids held to AVX2: bfloat16 by torch 445 ms, in panels 80; float16 432, 76",
    ),
    Family(
        "AVX-512",
        vendor="",
        feature="avx512f",
        float32="oneDNN",
        epilogues=_EVERY,
        panels=True,
        measured="Zen 4: float32 oneDNN 69 ms, MKL 77 (Zen 5: 223 to 241 GFLOP/s, 100 to 108); with gelu_tanh in the"
        " epilogue 71, in a pass 74; float16 by torch 334, in panels 68; bfloat16, held to AVX512_CORE, 190 and 68."
        " Few rows against oneDNN, weights of 1152 x 4304 to 2048 x 12288: bfloat16 1 row 0.64 to 0.72 of its time,"
        " 2 rows 0.78 to 0.98, 3 rows 0.76 to 1.13, 4 rows 0.85 to 1.24; float32 1 row 0.92 to 1.28, 2 rows 0.72 to"
        " 1.21, 3 rows 0.80 to 1.30",
        few_rows={torch.bfloat16: 3, torch.float32: 2},
    ),
    Family(
        "AVX2",
        vendor="",
        feature="avx2",
        float32="oneDNN",
        epilogues=_NONE,
        panels=True,
        measured="Zen 4 held to AVX2: float32 oneDNN 75 ms, MKL 80; with gelu_tanh in the epilogue 95, in a pass 85;"
        " with silu 88 and 78; bfloat16 by torch 330, in panels 77; float16 334 and 77",
    ),
    Family(
        "other",
        vendor="",
        feature="",
        float32="oneDNN",
        epilogues=_EVERY,
        panels=False,
        measured="nothing: what needs no instructions of its own, and 16-bit types as torch has them",
    ),
)
"""The first that a CPU belongs to is its family."""

FEW_ROWS = 4
"""Rows up to which the few-rows kernel is taken where nothing was measured: as many as it takes at a time."""

PANEL_ROWS = 8
"""Rows of 16-bit types without instructions up to which the few-rows kernel, four at a time, is the fastest. Zen 4, as
it is and held to AVX512_CORE and AVX2, weights 1152 x 4304 to 2048 x 12288: 8 rows in 0.71 to 0.99 of the panels'
time, 12 rows in 0.90 to 1.25."""


@functools.cache
def family(target: Target) -> Family:
    """The family of a CPU."""
    return next(f for f in FAMILIES if f.vendor in ("", target.vendor) and f.feature in ("", *target.features))


def of_product(dtype: torch.dtype, target: Target) -> str:
    """The route of products of many rows."""
    if dtype in target.onednn:
        return family(target).float32 if dtype == torch.float32 else "oneDNN"
    return "panels" if dtype in (torch.bfloat16, torch.float16) and family(target).panels else "torch"


@functools.cache
def few_rows(dtype: torch.dtype) -> int:
    """Rows of x up to which the few-rows kernel is the fastest on this machine."""
    if here(dtype) == "panels":
        return PANEL_ROWS
    return family(of_device("cpu")).few_rows.get(dtype, FEW_ROWS)


@functools.cache
def here(dtype: torch.dtype) -> str:
    """`of_product` on this machine."""
    return of_product(dtype, of_device("cpu"))


def describe() -> dict[str, Any]:
    """The family of this machine's CPU and its routes of many rows by dtype, for `vlmkern.backends()`."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {
        "family": family(of_device("cpu")).name,
        "routes": {str(dtype).removeprefix("torch."): here(dtype) for dtype in dtypes},
    }


@functools.cache
def epilogues() -> frozenset[str]:
    """Activations for oneDNN's epilogue on this machine."""
    return family(of_device("cpu")).epilogues
