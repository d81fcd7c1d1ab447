"""What a swapped module runs, and which of its calls the ops may take.

The ops read the parameters of inner modules and never call these. What such a call would do beside the formula (hooks,
a forward or a class put in place of its own, another kind of weight) would be left out without a word, so each call
looks for it and goes to the module's original forward, which calls them all, where there is any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

if TYPE_CHECKING:
    from .swap import Swap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_STATE = "_vlmkern_swapped"
# arguments that change what is returned beside the result, or nothing
_NEUTRAL = ("return_dict", "output_hidden_states", "use_cache", "attn_implementation")
# of those, values that make more or less of an output of transformers
_MORE_OR_LESS = {"output_hidden_states": True, "return_dict": False}
# tensors that are what they look like, the last two while a graph is traced; other subclasses bring an arithmetic
_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout)}
# attributes that change in use; what they mean is looked at in each call
_LIVE = ("training", "gradient_checkpointing", "dropout")


class Seen(NamedTuple):
    """A module as it was when it was swapped.

    Attributes:
        children: name -> class; None for those that are called as before.
        settings: name -> value, of its attributes that are plain values: sizes, scales, flags.
    """

    children: dict[str, type | None]
    settings: dict[str, Any]


@dataclass(eq=False)
class Swapped:
    """What a swapped module keeps.

    Attributes:
        swap: its kind.
        returns: length of the tuple that the original returns, None for a bare tensor, the class of an output of
            transformers.
        returns_more: whether the original returns more than the result and Nones, such as attention weights.
        parameters: names of the original's parameters, as far as they can be given by position.
        kernel: what the op is told beside tensors, see `Swap.kernel`.
        facts: what else the ops' result rests on, see `Swap.facts`.
        seen: the modules whose children and settings the ops stand for, see `Swap.stands_for`.
        class_forward: the forward of the module's class; None in a copy that was unpickled, as it may not pickle.
        active: whether the ops run; not after `unpatch`, where somebody keeps the swapped forward in one of theirs.
    """

    swap: Swap
    returns: int | type | None
    returns_more: bool
    parameters: tuple[str, ...]
    kernel: Any
    facts: tuple[Any, ...]
    seen: tuple[Seen, ...]
    class_forward: Any
    active: bool = True

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"class_forward": None}


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a swapped module runs: the ops, or its original forward for calls that they do not cover."""
    state: Swapped = module.__dict__[_STATE]
    given = _given(state, args, kwargs) if state.active else None
    if (
        given is None
        or not on_ops(given[0][0])
        or not state.swap.covers(module, *given[0], **given[1])
        or (state.returns_more and observed(module))
    ):
        return type(module).forward(module, *args, **kwargs)
    inputs, options = given
    result = state.swap.compute(module, *inputs, **options)
    if state.returns is None:
        return result
    if isinstance(state.returns, type):
        return state.returns(last_hidden_state=result)
    return result, *([None] * (state.returns - 1))


def install(module: nn.Module, state: Swapped) -> None:
    """Swaps a module's forward."""
    module.__dict__[_STATE] = state
    # a partial function pickles and copies with its module; a bound method would come back as the class's own
    module.__dict__["forward"] = partial(forward, module)


def remove(module: nn.Module) -> None:
    """Gives a module its original forward back."""
    if _is_ours(module):
        del module.__dict__["forward"], module.__dict__[_STATE]
    else:
        # what was put around the swapped forward keeps it
        module.__dict__[_STATE].active = False


def resume(module: nn.Module) -> bool:
    """Takes back what `remove` did to a module whose swapped forward somebody keeps; False where nobody does."""
    state = module.__dict__.get(_STATE)
    if state is None or not has_own_forward(module):
        return False
    state.active = True
    return True


def is_swapped(module: nn.Module) -> bool:
    """Whether `patch` swapped a module, though others may have put a forward around it since."""
    state = module.__dict__.get(_STATE)
    return state is not None and state.active and (_is_ours(module) or has_own_forward(module))


def state_of(module: nn.Module) -> Swapped:
    return module.__dict__[_STATE]


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance has a forward that is neither its class's nor a swapped one."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward and not _is_ours(module)


def hooked(module: nn.Module) -> bool:
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and (torch.compiler.is_compiling() or not all(map(_waits, hooks.values())))


def observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward, or a swapped one."""
    return hooked(module) or has_own_forward(module)


def see(module: nn.Module, called: Iterable[str]) -> Seen:
    """A module as it is, but for the children that stay called."""
    children = {name: None if name in called else type(child) for name, child in module._modules.items()}
    settings = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name not in _LIVE and not name.startswith("_")
    }
    return Seen(children, settings)


def unchanged(module: nn.Module, seen: Seen) -> bool:
    """Whether a module's children and settings are those seen, and a call of the children would do nothing else."""
    children, attributes = module._modules, module.__dict__
    if len(children) != len(seen.children):
        return False
    for name, kind in seen.children.items():
        if kind is None:
            continue
        child = children.get(name)
        if type(child) is not kind or (child is not None and observed(child)):
            return False
        if kind in _FORWARDS and kind.forward is not _FORWARDS[kind]:
            return False
    for name, value in seen.settings.items():
        now = attributes.get(name)
        if now is not value and (type(now) is not type(value) or now != value):
            return False
    return True


def drops(module: nn.Module) -> bool:
    """Whether a module would drop out values if it were called now."""
    rate = module.__dict__.get("dropout")
    if module.training and isinstance(rate, float) and rate > 0:
        return True
    return any(child is not None and child.training and _rate(child) > 0 for child in module._modules.values())


def passes_on(module: nn.Module) -> bool:
    """Whether a module passes its input on, at least in evaluation (`drops` sees to training)."""
    return type(module) in (nn.Identity, nn.Dropout) or (_rate(module) > 0 and not list(module.parameters()))


def _rate(module: nn.Module) -> float:
    """Of values, or of whole samples, that a module drops out in training; 0 where that is not what it is for."""
    if isinstance(module, nn.Dropout):
        return module.p
    rate = module.__dict__.get("drop_prob")
    return rate if isinstance(rate, float) else 0.0


def on_ops(x: Tensor) -> bool:
    """Whether the ops take a tensor as the original would, and nothing watches or transforms the whole program."""
    if type(x) not in _TENSORS or x.dtype not in DTYPES or x.device.type not in ("cpu", "cuda") or x.is_nested:
        return False
    if (
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    ):
        return False
    # the ops have first-order gradients in reverse mode, and no rule for function transforms
    return forward_ad._current_level < 0 and (
        torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None
    )


def weight_fits(module: nn.Module, x: Tensor) -> bool:
    """Whether the ops take the weight of a linear layer or norm together with x."""
    # sharded and pruned parameters are attributes
    weight = module._parameters.get("weight")
    if weight is None:
        weight = getattr(module, "weight", None)
    if weight is None:
        return True
    if type(weight) not in _TENSORS:
        return False
    return weight.dtype == x.dtype or (torch.is_autocast_enabled(x.device.type) and weight.dtype in DTYPES)


def _waits(hook: Any) -> bool:
    """Whether a hook is one of those that transformers leaves on a model which was once asked for hidden states or
    attention weights, as LLaVA asks its tower, and nobody asks for what it collects now."""
    output_capturing = sys.modules.get("transformers.utils.output_capturing")
    if output_capturing is None or getattr(hook, "__module__", None) != output_capturing.__name__:
        return False
    collected = output_capturing._active_collector.get()
    names = hook.__code__.co_freevars
    return collected is None or ("key" in names and hook.__closure__[names.index("key")].cell_contents not in collected)


def _is_ours(module: nn.Module) -> bool:
    own = module.__dict__.get("forward")
    # a shallow copy has the forward of the module that it was copied from
    return isinstance(own, partial) and own.func is forward and own.args[0] is module


def _given(state: Swapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]] | None:
    """The tensors and options that the swap takes, or None if the call asks for something else too."""
    named = dict(zip(state.parameters, args, strict=False)) | kwargs
    if len(args) > len(state.parameters):
        return None
    wanted, options = state.parameters[: state.swap.inputs], {}
    for name, value in named.items():
        if name in state.swap.options and value is not None:
            options[name] = value
        elif (isinstance(state.returns, type) and value is _MORE_OR_LESS.get(name, ...)) or (
            name not in wanted and name not in _NEUTRAL and value is not None and value is not False
        ):
            return None
    inputs = [named.get(name) for name in wanted]
    return (inputs, options) if all(isinstance(value, Tensor) for value in inputs) else None
