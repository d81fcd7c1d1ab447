"""Argument checks shared by the ops. Each raises an error that names the argument, what it was, and what
was expected. They work on fake tensors with symbolic sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CONCRETE = (torch.Tensor, torch.nn.Parameter)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def float_tensor(name: str, tensor: torch.Tensor) -> None:
    """TypeError unless the dtype is one that the ops compute in."""
    _required(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")


def tensor(name: str, value: Any) -> None:
    """TypeError unless the value is a tensor: for what is looked at before torch checks an op's types."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


def _required(name: str, value: torch.Tensor | None) -> None:
    # torch lets None pass for a tensor
    if value is None:
        raise TypeError(f"{name}: got None, expected a torch.Tensor")


def wanted(flags: Sequence[bool], count: int) -> None:
    """ValueError unless there is one flag for each gradient of a backward."""
    if len(flags) != count:
        raise ValueError(f"wanted: got {len(flags)} flags, expected {count}, one for each gradient")


def like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """TypeError on another dtype, ValueError on another device."""
    if tensor.dtype is not other.dtype:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {other.dtype} like {other_name}")
    same_device(name, tensor, other_name, other)
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: got layout {tensor.layout}, expected torch.strided (vlmkern.unpack gives it back)")


def linear_weight(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`like` for a weight that may be there in its packed form only, see `vlmkern.pack`."""
    if not tensor.is_mkldnn:
        return like(name, tensor, other_name, other)
    if tensor.dtype is not other.dtype or other.device.type != "cpu":
        raise TypeError(
            f"{name}: got a packed weight of {tensor.dtype} on cpu, expected {other.dtype} on {other.device} like"
            f" {other_name}"
        )


def same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {other.device} like {other_name}")


def same_as(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor, layout: str) -> None:
    """`shape` and `like` in one: the shape, dtype and device of `other`."""
    if (
        type(tensor) in _CONCRETE
        and tensor.dtype is other.dtype
        and tensor.layout is torch.strided
        and tensor.shape == other.shape
        and tensor.device == other.device
    ):
        return
    shape(name, tensor, other.shape, f"{layout} like {other_name}")
    like(name, tensor, other_name, other)


def rank(name: str, tensor: torch.Tensor, *layouts: str) -> None:
    """ValueError unless the tensor has as many dimensions as one of the layouts, e.g. "[B, N, H, D]"."""
    _required(name, tensor)
    if tensor.dim() not in _ranks(layouts):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {' or '.join(layouts)}")


@functools.cache
def _ranks(layouts: tuple[str, ...]) -> frozenset[int]:
    return frozenset(layout.count(",") + 1 for layout in layouts)


def shape(name: str, tensor: torch.Tensor, expected: Sequence[Any], layout: str) -> None:
    """ValueError unless the shape is `expected`; the layout, e.g. "[2F, C]", says what the sizes mean."""
    # tensors that are being traced have sizes that may only be compared one by one, as torch is to be told of each
    if type(tensor) in _CONCRETE and tensor.shape == tuple(expected):
        return
    _required(name, tensor)
    if tensor.dim() != len(expected):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {list(expected)} = {layout}")
    for got, want in zip(tensor.shape, expected, strict=True):
        if got is not want:
            value(got == want, lambda: f"{name}: got shape {list(tensor.shape)}, expected {list(expected)} = {layout}")


def unit_last_stride(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless neighbouring elements of the last dimension are neighbours in memory."""
    if type(tensor) in _CONCRETE and tensor.stride(-1) == 1:
        return
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
