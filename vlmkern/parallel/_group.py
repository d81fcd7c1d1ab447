"""Checks of a mesh, and the two collectives of tensor parallelism with their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of a mesh of one dimension.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: not a mesh.
        ValueError: a mesh of several dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("mesh: torch.distributed is not initialised, expected init_process_group before")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: got {type(mesh).__name__}, expected a torch.distributed.device_mesh.DeviceMesh")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: got {mesh.ndim} dimensions, expected one (take a slice, mesh['name'])")
    return mesh.get_group()


class _Enter(torch.autograd.Function):
    """Where a tensor that all ranks hold goes into work that each does a part of: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Leave(torch.autograd.Function):
    """Where the parts are summed: every rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Rows of all ranks, one after the other; each rank's gradient is that of its own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.first, ctx.count = sum(counts[:rank]), counts[rank]
        # ranks may hold different numbers of rows, which all_gather does not take everywhere
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.first : ctx.first + ctx.count], None, None


def enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, whose gradients are to be summed over the group."""
    return _Enter.apply(x, group)


def leave(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's x."""
    return _Leave.apply(x, group)


def gather(x: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """x [counts[rank], ...] of all ranks -> [sum(counts), ...]."""
    return _Gather.apply(x, counts, group)
