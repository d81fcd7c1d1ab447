"""Swapping the forward of modules that vlmkern has an op for, in place, and back.

Only `forward` of the module's instance changes. Parameters, their names, hooks of the module, devices, dtypes and
gradient checkpointing are the module's own, and every call that the ops do not cover goes to the original forward
(see `swapped`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .kinds import KINDS
from .swap import Refused, Swap
from .swapped import Swapped, has_own_forward, install, is_swapped, remove, resume, see

_PACKAGE = __name__.split(".integrations.")[0]


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

    Found by structure, whatever their class is called (`kinds` lists all): self-attention of towers, packed and turned
    by places where Qwen2-VL and its successors have it so; MLPs and gated MLPs, by themselves or behind a norm;
    pre-norm blocks of the two, with LayerScale or without; RMSNorm; torch's own `nn.MultiheadAttention` where no
    weights are asked for; encoders of images that differ in size, whose padding is then left out (its rows of the
    result are 0); and the connectors of Idefics2 and of jina-vlm. Each candidate is run once on a small random input,
    before and after: if the two differ it is left as it was, and so it is where a projection is anything but a plain
    linear layer (LoRA, quantised), or an inner module has hooks or a forward of its own.

    What changes later is found by the calls, which then run the original code: hooks, adapters, other layers,
    activations and settings in place of those that were there, other dtypes, function transforms. Under autocast the
    residual stream keeps the dtype that it has without the ops.

    Parameters are shared, none is copied or renamed; `vlmkern.pack(model)` afterwards trades memory for time on CPUs.
    `unpatch` undoes it; patching again does nothing. Copies, pickled ones too, are patched as their model is, so that
    loading one needs this package.

    Args:
        model: on CPU or CUDA, in float32, bfloat16 or float16.

    Returns:
        What was swapped, and what was passed over and why.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_module(model)
    report = PatchReport()
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent.children():
            parents.setdefault(child, []).append(parent)
    # a block is swapped with what its attention and MLP have become
    for name, module in _inner_first(model, "", set()):
        label = name or type(module).__name__
        if is_swapped(module):
            report.passed_over[label] = "swapped already"
            continue
        if type(module).__module__.startswith(_PACKAGE):
            continue
        kinds = (swap for swap in KINDS if swap.recognises(module) and swap.serves(module, parents.get(module, ())))
        swap = next(kinds, None)
        if swap is None:
            continue
        try:
            _swap(module, swap)
            report.swapped[label] = swap.name
        except Refused as refused:
            report.passed_over[label] = str(refused)
    outer_first = {name or type(module).__name__: None for name, module in model.named_modules()}
    return PatchReport(
        *(
            {name: found[name] for name in outer_first if name in found}
            for found in (report.swapped, report.passed_over)
        )
    )


def unpatch(model: nn.Module) -> int:
    """Gives every module its original forward back.

    Returns:
        How many modules `patch` had swapped.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_module(model)
    swapped = [module for module in model.modules() if is_swapped(module)]
    for module in swapped:
        remove(module)
    return len(swapped)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def _inner_first(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules like `named_modules`, each after what it holds, also where modules are shared."""
    seen.add(module)
    for child_name, child in module.named_children():
        if child not in seen:
            yield from _inner_first(child, f"{name}.{child_name}" if name else child_name, seen)
    yield name, module


def _swap(module: nn.Module, swap: Swap) -> None:
    """Swaps one module, or raises `Refused` and leaves it as it was."""
    if resume(module):
        return
    if has_own_forward(module):
        raise Refused("it has a forward of its own, which would not run")
    swap.check(module)
    inputs, options = swap.example(module), swap.example_options(module)
    was_training = [inner for inner in module.modules() if inner.training]
    module.eval()
    try:
        with torch.no_grad():
            parameters = _parameters(module)
            # masks and the like, where they have no default
            rest = {p.name: None for p in parameters[len(inputs) :] if p.default is p.empty} | options
            result = type(module).forward(module, *inputs, **rest)
            output = type(result) if hasattr(result, "last_hidden_state") else None
            values = tuple(result.values()) if output else result if isinstance(result, tuple) else (result,)
            expected, *more = values
            state = Swapped(
                swap,
                returns=output or (len(result) if isinstance(result, tuple) else None),
                returns_more=any(value is not None for value in more),
                parameters=tuple(parameter.name for parameter in parameters),
                kernel=swap.kernel(module),
                facts=swap.facts(module),
                seen=tuple(see(each, swap.called) for each in swap.stands_for(module)),
                class_forward=type(module).forward,
            )
            install(module, state)
            found = swap.compute(module, *inputs, **options)
            if not _equal(swap.judged(found, options), swap.judged(expected, options)):
                remove(module)
                raise Refused("its result differs from that of the ops")
    except Refused:
        raise
    except Exception as error:
        if is_swapped(module):
            remove(module)
        raise Refused(f"it does not take what such modules take ({type(error).__name__}: {error})") from error
    finally:
        for inner in was_training:
            inner.training = True


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """What a module's forward takes by position."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _equal(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    # rounding between two orders of the same sums; another formula differs by parts of the whole
    share = 1e-3 if expected.dtype == torch.float32 else 5e-2
    return bool((actual - expected).abs().max() <= share * expected.abs().max())
