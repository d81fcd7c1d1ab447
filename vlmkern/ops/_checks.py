"""Argument checks shared by the ops. Each raises an error that names the argument, what it was, and what
was expected. They work on fake tensors with symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def float_tensor(name: str, tensor: torch.Tensor) -> None:
    """TypeError unless the dtype is one that the ops compute in."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")


def like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """TypeError on another dtype, ValueError on another device."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {other.dtype} like {other_name}")
    same_device(name, tensor, other_name, other)


def same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {other.device} like {other_name}")


def rank(name: str, tensor: torch.Tensor, *layouts: str) -> None:
    """ValueError unless the tensor has as many dimensions as one of the layouts, e.g. "[B, N, H, D]"."""
    if tensor.dim() not in [layout.count(",") + 1 for layout in layouts]:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {' or '.join(layouts)}")


def shape(name: str, tensor: torch.Tensor, expected: Sequence[Any], layout: str) -> None:
    """ValueError unless the shape is `expected`; the layout, e.g. "[2F, C]", says what the sizes mean."""
    if tensor.dim() != len(expected):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {list(expected)} = {layout}")
    for got, want in zip(tensor.shape, expected, strict=True):
        if got is not want:
            value(got == want, lambda: f"{name}: got shape {list(tensor.shape)}, expected {list(expected)} = {layout}")


def unit_last_stride(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless neighbouring elements of the last dimension are neighbours in memory."""
    if tensor.numel() > 0 and tensor.shape[-1] > 1:
        value(
            tensor.stride(-1) == 1,
            lambda: f"{name}: got strides {tensor.stride()}, expected a last stride of 1 (call .contiguous())",
        )


def value(condition: Any, message: Callable[[], str]) -> None:
    """ValueError with the message unless the condition, which may be symbolic, holds."""
    # torch's own check takes most of a microsecond, and an op makes a dozen of them
    if condition is not True:
        torch._check_value(condition, message)
