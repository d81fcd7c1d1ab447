"""The shared registration helper: everything an op tells torch, said in one call.

An op's arguments are the fields of its problem, a NamedTuple, and one more, `backend`, which says what it is to run
on. Fields that have defaults may be left out by callers of `torch.ops.vlmkern.*`, as torch itself leaves out what
equals its default; every layer below sees all of them. The checks run inside the fake implementation and inside the
real one, hence once per eager call, once per trace, and also for those callers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function

from .._ops import add_op_namespace_prefix, library
from .._ops import ops as registered
from . import choice
from . import providers as dispatch

_AUTOCAST = (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"))
_autocast_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)
# below this key torch takes what is made by a view for a view, and then forbids `result += 1` in training
_view_tracking = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
# of a problem's fields, as annotated, in torch's schemas
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "list[int]": "int[]",
    "list[bool]": "bool[]",
    "int": "int",
    "bool": "bool",
    # the one integer that changes from call to call, as the longest of packed segments does
    "int | None": "SymInt?",
    "float": "float",
    "str": "str",
}

Check = Callable[[Any], None]


def define(
    name: str,
    problem: type,
    returns: str,
    *,
    check: Check,
    fake: Callable[[Any], Any],
    providers: dict[str, ModuleType | Callable[[], ModuleType]],
    check_values: Check | None = None,
    backward: bool = False,
    keeps: bool = False,
) -> torch._ops.OpOverload:
    """Defines `vlmkern::<name>` for all devices and returns its overload.

    Args:
        problem: a NamedTuple class whose fields are the op's arguments.
        returns: in torch's schema language, e.g. "Tensor".
        check: problem -> None; raises on shapes, dtypes, devices and strides that the op does not take.
        fake: problem -> results with shapes and dtypes, for meta tensors and tracing; called after `check`.
        providers: backend -> module, or what gives it on the first call; "reference" is required. See
            `vlmkern.dispatch.providers`.
        check_values: problem -> None; raises on wrong values inside index tensors. Runs on CPU tensors, and on others
            when VLMKERN_CHECK=1, because reading values stalls a GPU.
        backward: the op computes gradients, on the backend that it is told whatever is in force.
        keeps: the op is another one that also gives what its gradient takes.
    """
    # NamedTuple has annotations that are strings wrapped
    kinds = {field: getattr(kind, "__forward_arg__", kind) for field, kind in problem.__annotations__.items()}
    defaults = problem._field_defaults
    arguments = ", ".join(
        f"{_TYPES[kind]} {field}" + (f"={defaults[field]}" if field in defaults else "")
        for field, kind in kinds.items()
    )
    library.define(f'{name}({arguments}, str backend="") -> {returns}', tags=(torch.Tag.pt2_compliant_tag,))
    known = dispatch.Op(name, problem, fake, providers, backward, keeps)
    dispatch.register(known)
    op = getattr(registered, name).default
    count = len(problem._fields)
    # what `problem._make` does, in half the time
    make = functools.partial(tuple.__new__, problem)

    complete = _completed(problem)

    def fake_impl(*args: Any) -> Any:
        asked = make(complete(args)[:count])
        check(asked)
        return fake(asked)

    def real_impl(*args: Any) -> Any:
        args = complete(args)
        asked, backend = make(args[:count]), args[count]
        check(asked)
        device = _device(asked)
        if check_values is not None and (device.type == "cpu" or os.environ.get("VLMKERN_CHECK") == "1"):
            check_values(asked)
        chosen = (backend or choice.current()) if backward else choice.settled(backend)
        with torch._C._ExcludeDispatchKeyGuard(_view_tracking):
            return dispatch.run(known, asked, device, chosen)

    library.impl(name, real_impl, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake_impl, lib=library)
    return op


def _completed(problem: type) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Puts back what torch left out of an op's arguments: the last ones, where they equal their defaults."""
    defaults = (*problem._field_defaults.values(), "")
    count = len(problem._fields) + 1

    def complete(args: tuple[Any, ...]) -> tuple[Any, ...]:
        missing = count - len(args)
        return args if missing == 0 else (*args, *defaults[len(defaults) - missing :])

    return complete


class Form(NamedTuple):
    """An op or its gradient: the problem that it takes, what it returns, its check and its fake, as of `define`."""

    problem: type
    returns: str
    check: Check
    fake: Callable[[Any], Any]


def define_with_gradient(
    name: str,
    forward: Form,
    gradient: Form,
    *,
    providers: dict[str, ModuleType | Callable[[], ModuleType]],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    check_values: Check | None = None,
    keep: Sequence[str] = (),
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Defines `vlmkern::<name>`, which is differentiable once and casts under autocast, and `vlmkern::<name>_bwd`.

    Args:
        gradient: of a problem whose `forward` is that of the op, if the op has `check_values`.
        providers: have both.
        setup_context, backward: as of `differentiable`.
        check_values: as of `define`, of the op and of what its gradient is the gradient of.
        keep: as of `autocast`.
    """

    def check_values_bwd(problem: Any) -> None:
        check_values(problem.forward)

    op = define_differentiable(
        name,
        forward,
        providers=providers,
        setup_context=setup_context,
        backward=backward,
        check_values=check_values,
        keep=keep,
    )
    op_bwd = define(
        f"{name}_bwd",
        **gradient._asdict(),
        providers=providers,
        check_values=None if check_values is None else check_values_bwd,
        backward=True,
    )
    not_differentiable(op_bwd)
    return op, op_bwd


def define_differentiable(
    name: str,
    form: Form,
    *,
    providers: dict[str, ModuleType | Callable[[], ModuleType]],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    check_values: Check | None = None,
    keep: Sequence[str] = (),
    keeps: bool = False,
) -> torch._ops.OpOverload:
    """Defines `vlmkern::<name>`, which is differentiable once and casts under autocast; arguments as above."""
    op = define(name, **form._asdict(), providers=providers, check_values=check_values, keeps=keeps)
    differentiable(op, setup_context=setup_context, backward=backward)
    autocast(op, keep=keep)
    return op


def kept(ctx: Any, output: Any) -> Tensor | None:
    """In a `setup_context` of an op and its form that keeps: what that gives beside its result; None of the op."""
    if isinstance(output, Tensor):
        return None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    return output[1]


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether autograd follows a call with these arguments: what its gradient can use is worth keeping."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def autocast(op: torch._ops.OpOverload, *, keep: Sequence[str] = ()) -> None:
    """Under torch.autocast, cast the op's floating-point tensors to the autocast dtype, but for `keep`."""
    names = [argument.name for argument in op._schema.arguments]

    def register(device_type: str, key: str) -> None:
        def cast(value: Any, dtype: torch.dtype) -> Any:
            if isinstance(value, (list, tuple)):
                return [cast(item, dtype) for item in value]
            eligible = (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.dtype is not torch.float64
                and value.device.type == device_type
            )
            if not eligible:
                return value
            result = value.to(dtype)
            # torch gives a copy of rows that overlap any strides it likes
            lost = result.dim() > 0 and result.stride(-1) != 1 and value.stride(-1) == 1
            return result.contiguous() if lost else result

        def impl(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            cast_args = [a if n in keep else cast(a, dtype) for n, a in zip(names, args, strict=False)]
            with torch._C._ExcludeDispatchKeyGuard(_autocast_keys):
                return op(*cast_args)

        library.impl(op._schema.name.split("::")[1], impl, key)

    for device_type, key in _AUTOCAST:
        register(device_type, key)


def differentiable(
    op: torch._ops.OpOverload, *, setup_context: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    """Registers the op's gradient.

    Args:
        setup_context: `(ctx, problem, output)`, keeps what the backward needs; but the backend, which is kept
            as `ctx.backend` for the backward to hand on: it may run on a thread that the choice does not reach.
        backward: `(ctx, needed, *grads)` -> the gradients of all inputs but the backend, a list of tensors among them
            spread out; `needed` says the same way which of them are asked for.
    """
    problem = dispatch.known(op).problem
    make, complete = problem._make, _completed(problem)
    # where a list of tensors stands, as autograd sees only tensors that are arguments themselves
    listed = next((i for i, a in enumerate(op._schema.arguments) if str(a.type) == "List[Tensor]"), None)
    returns_list = str(op._schema.returns[0].type) == "List[Tensor]"

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, length: int, asked: str, *flat: Any) -> Any:
            args = flat
            if listed is not None:
                end = listed + length
                args = (*flat[:listed], list(flat[listed:end]), *flat[end:])
            with _derivatives_of_lower_levels():
                result = _below_autograd(op, keyset, (*args, asked))
            ctx.backend = asked
            setup_context(ctx, make(args), result)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return (None, None, None, *backward(ctx, ctx.needs_input_grad[3:], *grads))

        @classmethod
        def apply(cls, *args: Any) -> Any:
            # this is an autograd kernel, as torch's own ops have them: torch.func calls it once for each level
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, cls).apply(*args)

    def kernel(keyset: Any, *args: Any) -> Any:
        *args, asked = complete(args)
        _refuse_forward_mode(op, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(op, keyset, (*args, asked))
        asked = asked or choice.current()
        flat, length = args, 0
        if listed is not None:
            length = len(args[listed])
            flat = (*args[:listed], *args[listed], *args[listed + 1 :])
        result = Gradient.apply(keyset, length, asked, *flat)
        return list(result) if returns_list else result

    library.impl(op._schema.name.split("::")[1], kernel, "Autograd", with_keyset=True)


def not_differentiable(op: torch._ops.OpOverload) -> None:
    """Makes differentiating the op raise; without it, a second backward would return wrong gradients."""

    def backward(ctx: Any, needed: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{op._schema.name} is not differentiable: vlmkern ops support first-order gradients only"
        )

    differentiable(op, setup_context=lambda ctx, problem, output: None, backward=backward)


def _below_autograd(op: torch._ops.OpOverload, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


@contextmanager
def _derivatives_of_lower_levels() -> Iterator[None]:
    """Inside of autograd's Function, which switches derivatives off: on again where a lower level of torch.func comes
    next, whose own they are."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield


def _refuse_forward_mode(op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
    """Raises where an input carries a tangent, which would be dropped."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for value in args:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor) and torch._VF._unpack_dual(tensor, level=0)[1] is not None:
                raise NotImplementedError(
                    f"{op._schema.name} has no forward-mode derivative: use reverse mode (backward, torch.func.vjp)"
                )


def _device(args: Sequence[Any]) -> torch.device:
    for value in args:
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return value[0].device
    raise AssertionError("an op has at least one tensor argument")
