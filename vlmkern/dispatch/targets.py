"""What a call runs on: the device, and what it can do, as far as kernels depend on it."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

from . import extension


class Target(NamedTuple):
    """A device, as those who say what they support see it.

    Attributes:
        device: torch's name of its type, "cpu" or "cuda".
        isa: of the native kernels on a CPU, "none" without them.
        onednn: dtypes that oneDNN multiplies on a CPU with instructions for them.
        vendor: CPUID's name of a CPU's maker, as "GenuineIntel", "" where it is not known.
        features: of a CPU, as Linux calls them, as far as they matter here.
    """

    device: str
    isa: str = "none"
    onednn: frozenset[torch.dtype] = frozenset()
    vendor: str = ""
    features: frozenset[str] = frozenset()


# the instruction sets that native kernels are compiled for, by what a CPU needs to have
_FEATURES = {
    "portable": (),
    "avx2": ("avx2",),
    "avx512": ("avx2", "avx512f"),
    "avx512_bf16": ("avx2", "avx512f", "avx512_bf16"),
    "amx": ("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
}

ISAS = tuple(_FEATURES)
"""What native kernels are compiled for, each a part of the next."""

# instructions that multiply a dtype
_MULTIPLIED_BY = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16"},
}

# what ONEDNN_MAX_CPU_ISA may hold oneDNN to that has none of them
_WITHOUT_16_BITS = ("sse41", "avx", "avx2", "avx2_vnni", "avx512_core", "avx512_core_vnni")


def of_isa(isa: str, vendor: str = "", features: frozenset[str] = frozenset()) -> Target:
    """A CPU, which need not be this machine's, and what oneDNN multiplies there."""
    features = features.union(_FEATURES.get(isa, ()))
    multiplied = [dtype for dtype, instructions in _MULTIPLIED_BY.items() if features & instructions]
    return Target("cpu", isa, frozenset({torch.float32, *multiplied}), vendor, features)


@functools.cache
def of_device(device: str) -> Target:
    """This machine's device of that type."""
    if device != "cpu":
        return Target(device)
    cpu = extension.describe()
    # a set of instructions that the user chose stands for a CPU that has no more
    chosen = os.environ.get("VLMKERN_CPU_ISA", "") != ""
    target = of_isa(cpu["isa"], cpu.get("vendor", ""), frozenset(() if chosen else cpu.get("features", ())))
    return target._replace(onednn=frozenset(dtype for dtype in target.onednn if _onednn_has(dtype)))


def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN may use a CPU's instructions for a dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    if os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).lower() in _WITHOUT_16_BITS:
        return False
    onednn = torch.ops.mkldnn
    return onednn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported()
