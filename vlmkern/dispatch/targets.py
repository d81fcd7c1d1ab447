"""What a call runs on: the device, and what it can do, as far as kernels depend on it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import extension


class Target(NamedTuple):
    """A device, as those who say what they support see it.

    Attributes:
        device: torch's name of its type, "cpu" or "cuda".
        isa: of the native kernels on a CPU, "none" without them.
        onednn: dtypes whose matrix products oneDNN has on a CPU.
    """

    device: str
    isa: str = "none"
    onednn: frozenset[torch.dtype] = frozenset()


# of the instruction sets that native kernels are compiled for, what oneDNN multiplies on a CPU that has them
_ONEDNN = {
    "portable": {torch.float32},
    "avx2": {torch.float32},
    "avx512": {torch.float32, torch.bfloat16},
    "avx512_bf16": {torch.float32, torch.bfloat16},
}


ISAS = tuple(_ONEDNN)
"""What native kernels are compiled for, each a part of the next."""


def of_isa(isa: str) -> Target:
    """A CPU with these instructions, which need not be this machine's."""
    return Target("cpu", isa, frozenset(_ONEDNN.get(isa, ())))


@functools.cache
def of_device(device: str) -> Target:
    """This machine's device of that type."""
    if device != "cpu":
        return Target(device)
    dtypes = (torch.float32, torch.bfloat16)
    return Target(device, extension.describe()["isa"], frozenset(dtype for dtype in dtypes if onednn_has(dtype)))


@functools.cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of the dtype on this CPU, as far as it may use it (ONEDNN_MAX_CPU_ISA)."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
