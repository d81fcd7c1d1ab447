"""The shared registration helper: everything an op tells torch, said in one call.

An op is defined with a schema without defaults, so that every layer below the public function sees all
arguments. Its checks run inside the fake implementation and inside the real one, hence once per eager
call, once per trace, and also for callers of `torch.ops.vlmkern.*`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _backends
from .._ops import add_op_namespace_prefix, library
from .._ops import ops as registered

_AUTOCAST = (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"))
_autocast_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)

Check = Callable[..., None]


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    implementations: dict[str, Callable[..., Any]],
    check: Check | None = None,
    check_values: Check | None = None,
) -> torch._ops.OpOverload:
    """Defines `vlmkern::<name>` for all devices and returns its overload.

    Args:
        schema: argument list and returns, e.g. "(Tensor x) -> Tensor".
        fake: shapes and dtypes of the results, for meta tensors and tracing; called after `check`.
        implementations: backend name -> function; "reference" is required. They import kernels on first use.
        check: raises on shapes, dtypes, devices and strides that the op does not take.
        check_values: raises on wrong values inside index tensors. Runs on CPU tensors, and on others
            when VLMKERN_CHECK=1, because reading values stalls a GPU.
    """
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _backends.register(name, implementations)

    def fake_impl(*args: Any) -> Any:
        if check is not None:
            check(*args)
        return fake(*args)

    def real_impl(*args: Any) -> Any:
        if check is not None:
            check(*args)
        device = _device(args)
        if check_values is not None and (device.type == "cpu" or os.environ.get("VLMKERN_CHECK") == "1"):
            check_values(*args)
        return _backends.run(name, device, args)

    library.impl(name, real_impl, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake_impl, lib=library)
    return getattr(registered, name).default


def lazy(module: str, name: str) -> Callable[..., Any]:
    """A function of this package that is imported when it is first called, as kernels should be."""

    @functools.cache
    def target() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"..{module}", __package__), name)

    return lambda *args: target()(*args)


def autocast(op: torch._ops.OpOverload, *, keep: Sequence[str] = ()) -> None:
    """Under torch.autocast, cast the op's floating-point tensors to the autocast dtype, but for `keep`."""
    names = [argument.name for argument in op._schema.arguments]

    def register(device_type: str, key: str) -> None:
        def cast(value: Any, dtype: torch.dtype) -> Any:
            if isinstance(value, (list, tuple)):
                return [cast(item, dtype) for item in value]
            eligible = (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.dtype is not torch.float64
                and value.device.type == device_type
            )
            return value.to(dtype) if eligible else value

        def impl(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            cast_args = [a if n in keep else cast(a, dtype) for n, a in zip(names, args, strict=True)]
            with torch._C._ExcludeDispatchKeyGuard(_autocast_keys):
                return op(*cast_args)

        library.impl(op._schema.name.split("::")[1], impl, key)

    for device_type, key in _AUTOCAST:
        register(device_type, key)


def differentiable(
    op: torch._ops.OpOverload, *, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Registers the op's gradient. `backward(ctx, *grads)` runs under the backend that its forward ran under."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.vlmkern_backend = _backends.current()
        setup_context(ctx, inputs, output)

    def run_backward(ctx: Any, *grads: Any) -> Any:
        # CUDA gradients are computed on another thread, which the forward's context does not reach
        with _backends.use_backend(ctx.vlmkern_backend):
            return backward(ctx, *grads)

    torch.library.register_autograd(op, run_backward, setup_context=setup, lib=library)


def not_differentiable(op: torch._ops.OpOverload) -> None:
    """Makes differentiating the op raise; without it, a second backward would return wrong gradients."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{op._schema.name} is not differentiable: vlmkern ops support first-order gradients only"
        )

    torch.library.register_autograd(op, backward, lib=library)


def _device(args: Sequence[Any]) -> torch.device:
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    raise AssertionError("an op has at least one tensor argument")
