"""What all kinds of module that have an op share: how it is recognised, left alone, computed.

Modules are told by their children's names and by what these are, not by their class or where it was imported from.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import functional
from .swapped import DTYPES, drops, hooked, observed, passes_on, state_of, unchanged, weight_fits

TOKENS = 5
"""Of examples."""


class Refused(Exception):
    """Why a module that looks like a candidate is left alone."""


class Swap:
    """One kind of module.

    Attributes:
        name: what a swapped module becomes, for the report.
        linears: children that must be plain linear layers; all of them make a candidate.
        called: children that are called as before, whatever they are.
        inputs: how many tensors it takes.
        options: what else it takes, by name, where a call has it.
        rank: how many dimensions the tensors have, where the original says.
    """

    name: str
    linears: tuple[str, ...]
    called: tuple[str, ...] = ()
    inputs = 1
    options: tuple[str, ...] = ()
    rank: int | None = None

    def recognises(self, module: nn.Module) -> bool:
        """Whether a module looks like one of this kind."""
        children = module._modules
        return all(children.get(name) is not None for name in self.linears)

    def serves(self, module: nn.Module, parents: Sequence[nn.Module]) -> bool:
        """Whether there is any use in it, where the module is a child of these."""
        return True

    def check(self, module: nn.Module) -> None:
        """Raises `Refused` unless the module can be swapped."""
        for name in self.linears:
            child = module._modules[name]
            if type(child) is not nn.Linear:
                kind = type(child)
                raise Refused(f"{name} is a {kind.__module__}.{kind.__qualname__}, not a plain linear layer")
        for name, child in module.named_children():
            if name not in self.linears and name not in self.others(module) and not passes_on(child):
                raise Refused(f"{name} ({type(child).__name__}) is no part of such a module")
        for each in self.stands_for(module):
            for name, child in each.named_children():
                if name not in self.called and observed(child):
                    what = "hooks" if hooked(child) else "a forward of its own"
                    raise Refused(f"{name} has {what}, which would not run")
        weight = self.weight(module)
        if weight.dtype not in DTYPES:
            raise Refused(f"{weight.dtype} has no kernels")
        if weight.device.type not in ("cpu", "cuda"):
            raise Refused(f"there are no kernels for {weight.device.type}")

    def others(self, module: nn.Module) -> tuple[str, ...]:
        """Children beside the linear layers that the kind accounts for."""
        return ()

    def weight(self, module: nn.Module) -> Tensor:
        """The parameter that tells device, dtype and (last size) input width."""
        return getattr(module, self.linears[0]).weight

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Small random input."""
        weight = self.weight(module)
        return (example((2, TOKENS, weight.shape[-1]), weight),)

    def example_options(self, module: nn.Module) -> dict[str, Any]:
        """What else the module is given with that."""
        return {}

    def judged(self, result: Tensor, options: dict[str, Any]) -> Tensor:
        """What of the example's result must be the original's."""
        return result

    def stands_for(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The modules that the ops run in place of, whose children they do not call."""
        return (module,)

    def kernel(self, module: nn.Module) -> Any:
        """What the op is told beside tensors and is found out by trying: which activation, which offset."""
        return None

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        """What the result rests on beside parameters, children and settings."""
        return ()

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        """Whether a call that is `on_ops` can run on them: the module may have changed since it was swapped."""
        if self.rank is not None and x.dim() != self.rank:
            return False
        state = state_of(module)
        if state.class_forward is not None and type(module).forward is not state.class_forward:
            return False
        # plain loops: these are most of what a call costs beside its ops
        for now, then in zip(self.facts(module), state.facts, strict=True):
            if now is not then and now != then:
                return False
        for each, seen in zip(self.stands_for(module), state.seen, strict=True):
            if not unchanged(each, seen):
                return False
        for child in self.weighted(module):
            if not weight_fits(child, x):
                return False
        # the original forward is where some models checkpoint a block, with its swapped parts inside
        checkpoints = module.training and module.__dict__.get("gradient_checkpointing", False)
        return not checkpoints and not drops(module)

    def covers_as_part(self, module: nn.Module, x: Tensor, **options: Any) -> bool:
        """The same of a call that a swapped block would make."""
        return self.covers(module, x, **options)

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        """The children whose weights the ops read."""
        return [module._modules[name] for name in self.linears]

    def compute(self, module: nn.Module, *inputs: Tensor, **options: Any) -> Tensor:
        """The module's result, by the ops."""
        raise NotImplementedError


def example(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random values, the same in every process and whatever the caller's generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def projection(linear: nn.Linear) -> functional.Projection:
    return linear.weight, linear.bias


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has a parameter of that name."""
    return name in inspect.signature(type(module).forward).parameters
