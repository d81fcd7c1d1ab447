"""What several test files share: fixtures on disk, the tolerance rule, and which backends an op can be tested on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vlmkern

DATA = Path(__file__).parent / "data"
LOW_PRECISION = (torch.bfloat16, torch.float16)


def op_backends(op: str) -> list:
    """pytest parameters: every backend with a kernel of `op` for CPU tensors; skipped where it cannot run here."""
    params = []
    for name, report in vlmkern.backends().items():
        if name in ("reference", "native") and op in report["ops"]:
            marks = [] if report["available"] else [pytest.mark.skip(reason=report["reason"])]
            params.append(pytest.param(name, marks=marks))
    return params


def low_precision_close(actual: Tensor, run: Callable[[torch.dtype], Tensor]) -> float:
    """The kernel's error against float64 is at most twice that of plain torch in the same dtype, plus two roundings of
    the result's largest value; `run(dtype)` computes the reference in that dtype from the same rounded inputs. Returns
    the error as a share of that."""
    exact = run(torch.float64)
    torch_error = (run(actual.dtype).double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert torch.isfinite(actual).all()
    assert error <= 2 * torch_error + 2 * rounding, (
        f"error {error:.3g}, torch {torch_error:.3g}, rounding {rounding:.3g}"
    )
    return (error / (2 * torch_error + 2 * rounding).clamp_min(1e-300)).item()


def load_arrays(name: str) -> dict[str, Tensor]:
    """Arrays of tests/data/<name>.npz as tensors, crops restored from pixels."""
    with np.load(DATA / f"{name}.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive}
    if "crops_uint8" in arrays:
        arrays["crops"] = arrays.pop("crops_uint8").float() / 255 * 2 - 1
    return arrays


def assert_matches(arrays: dict[str, Tensor], name: str, actual: Tensor, rows: Tensor | None = None) -> None:
    """`actual` equals the stored array, which may hold every n-th row only (key "name@n"), within 2e-4 of its
    largest value. `rows` selects rows of [B, S, C] arrays by a mask."""
    if name in arrays:
        expected = arrays[name]
        actual = actual.reshape(expected.shape)
        if rows is not None:
            actual, expected = actual[rows], expected[rows]
    else:
        (key,) = (key for key in arrays if key.startswith(f"{name}@"))
        expected, actual = arrays[key], actual.reshape(-1, actual.shape[-1])[:: int(key.split("@")[1])]
    assert actual.shape == expected.shape
    error, limit = (actual - expected).abs().max(), 2e-4 * expected.abs().max()
    assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


def make_no_file(path: Path, kind: str) -> bool:
    """Puts a "pipe", an endless "device", a "directory" or a "huge" file in the place of a file; False for other kinds,
    of which there is nothing left then."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    else:
        return False
    return True
