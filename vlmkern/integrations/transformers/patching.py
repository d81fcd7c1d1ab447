"""Swapping the forward of modules that vlmkern has an op for, in place, and back.

Only `forward` of the module's instance changes. Parameters, their names, hooks of the module, devices, dtypes and
gradient checkpointing are the module's own, and every call that the ops do not cover goes to the original forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .swaps import STATE, SWAPS, Refused, Swap, Swapped

_PACKAGE = __name__.split(".integrations.")[0]
# arguments that change what is returned beside the result, or nothing
_NEUTRAL = ("return_dict", "output_hidden_states", "use_cache", "attn_implementation")


@dataclass(frozen=True, eq=False)
class PatchReport(Mapping[str, str]):
    """What `patch` did: a mapping from the names of swapped modules to what runs in their place.

    Attributes:
        swapped: name -> what it is now.
        passed_over: name -> why a module that looked like a candidate was left alone.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.swapped[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.swapped)

    def __len__(self) -> int:
        return len(self.swapped)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.passed_over)} passed over"]
        for title, found in (("swapped", self.swapped), ("passed over", self.passed_over)):
            width = max(map(len, found), default=0)
            lines += [f"  {title}: {name:<{width}}  {what}" for name, what in found.items()]
        return "\n".join(lines)


def patch(model: nn.Module) -> PatchReport:
    """Swaps, in place, the modules of a model that vlmkern has an op for.

    Found by structure, whatever their class is called: self-attention with q_proj, k_proj, v_proj and out_proj and
    MLPs with fc1 and fc2 (the towers of SigLIP, SigLIP2, Idefics, PaliGemma, LLaVA), pre-norm blocks of the two,
    SwiGLU MLPs with gate_proj, up_proj and down_proj (Qwen, Llama, Mistral, Idefics2's projection), and attention,
    MLPs, blocks and connector of jina-vlm as its own code has them. Each candidate is run once on a small random
    input, before and after: if the two differ it is left as it was, and so it is where a projection is anything but a
    plain linear layer (LoRA, quantised).

    Parameters are shared, none is copied or renamed. `unpatch` undoes it; patching again does nothing.

    Args:
        model: on CPU or CUDA, in float32, bfloat16 or float16.

    Returns:
        What was swapped, and what was passed over and why.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    report = PatchReport()
    # inner modules first: a block is swapped with what its attention and MLP have become
    for name, module in reversed(list(model.named_modules())):
        label = name or type(module).__name__
        if _is_swapped(module):
            report.passed_over[label] = "swapped already"
            continue
        if type(module).__module__.startswith(_PACKAGE):
            continue
        swap = next((swap for swap in SWAPS if swap.recognises(module)), None)
        if swap is None:
            continue
        try:
            _swap(module, swap)
            report.swapped[label] = swap.name
        except Refused as refused:
            report.passed_over[label] = str(refused)
    return PatchReport(*(dict(reversed(found.items())) for found in (report.swapped, report.passed_over)))


def unpatch(model: nn.Module) -> int:
    """Gives every module its original forward back.

    Returns:
        How many modules `patch` had swapped.
    """
    count = 0
    for module in model.modules():
        if _is_swapped(module):
            _restore(module)
            count += 1
    return count


def _is_swapped(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is forward


def _swap(module: nn.Module, swap: Swap) -> None:
    """Swaps one module, or raises `Refused` and leaves it as it was."""
    swap.check(module)
    inputs = swap.example(module)
    was_training = [inner for inner in module.modules() if inner.training]
    module.eval()
    try:
        with torch.no_grad():
            parameters = _parameters(module)
            # masks and the like, where they have no default
            rest = {p.name: None for p in parameters[len(inputs) :] if p.default is p.empty}
            result = _call_original(module, module.__dict__.get("forward"), *inputs, **rest)
            expected = result[0] if isinstance(result, tuple) else result
            returns = len(result) if isinstance(result, tuple) else None
            before = module.__dict__.get("forward")
            names = tuple(parameter.name for parameter in parameters)
            module.__dict__[STATE] = Swapped(swap, returns, names, before, swap.activation(module))
            module.__dict__["forward"] = MethodType(forward, module)
            if not _equal(swap.compute(module, *inputs), expected):
                _restore(module)
                raise Refused("its result differs from that of the ops")
    except Refused:
        raise
    except Exception as error:
        if _is_swapped(module):
            _restore(module)
        raise Refused(f"it does not take what such modules take ({type(error).__name__}: {error})") from error
    finally:
        for inner in was_training:
            inner.training = True


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """What a module's forward takes by position."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _restore(module: nn.Module) -> None:
    before = module.__dict__.pop(STATE).before
    del module.__dict__["forward"]
    if before is not None:
        module.__dict__["forward"] = before


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a swapped module runs: the ops, or its original forward for calls that they do not cover."""
    state: Swapped = self.__dict__[STATE]
    inputs = _inputs(state, args, kwargs)
    if inputs is None or not state.swap.covers(self, *inputs):
        return _call_original(self, state.before, *args, **kwargs)
    result = state.swap.compute(self, *inputs)
    return result if state.returns is None else (result, *([None] * (state.returns - 1)))


def _inputs(state: Swapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """The tensors that the swap takes, or None if the call asks for something else too."""
    named = dict(zip(state.parameters, args, strict=False)) | kwargs
    if len(args) > len(state.parameters):
        return None
    wanted = state.parameters[: state.swap.inputs]
    for name, value in named.items():
        if name not in wanted and name not in _NEUTRAL and value is not None and value is not False:
            return None
    inputs = [named.get(name) for name in wanted]
    return inputs if all(isinstance(value, Tensor) for value in inputs) else None


def _call_original(module: nn.Module, before: Any | None, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    # rounding between two orders of the same sums; another formula differs by parts of the whole
    share = 1e-3 if expected.dtype == torch.float32 else 5e-2
    return bool((actual - expected).abs().max() <= share * expected.abs().max())
