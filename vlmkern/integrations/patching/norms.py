"""RMSNorm: which modules are that, of decoders, towers and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .swap import TOKENS, Refused, Swap, example
from .swapped import state_of


class RMSNorm(Swap):
    """x / rms(x) times a weight, or one more than a weight as Gemma has it: told by their values."""

    name = "RMSNorm on vlmkern.ops.rms_norm"
    linears = ()

    def recognises(self, module: nn.Module) -> bool:
        parameters = module._parameters
        return (
            "RMSNorm" in type(module).__name__
            and not module._modules
            and list(parameters) == ["weight"]
            and parameters["weight"] is not None
            and parameters["weight"].dim() == 1
        )

    def weight(self, module: nn.Module) -> Tensor:
        return module.weight

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return [module]

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return (self.eps(module),)

    def kernel(self, module: nn.Module) -> float:
        x = example((TOKENS, module.weight.shape[0]), module.weight)
        expected = type(module).forward(module, x)
        for offset in (0.0, 1.0):
            found = ops.rms_norm(x, module.weight, eps=self.eps(module) or 0.0, offset=offset)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=2e-2, atol=2e-2):
                return offset
        raise Refused("its result is no RMS norm's")

    def compute(self, module: nn.Module, x: Tensor, **options: Any) -> Tensor:
        eps = self.eps(module)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return ops.rms_norm(x, module.weight, eps=eps, offset=state_of(module).kernel)

    def eps(self, module: nn.Module) -> float | None:
        """None for that of the dtype, as torch's own norm has it."""
        for name in ("variance_epsilon", "eps"):
            if isinstance(module.__dict__.get(name), float):
                return module.__dict__[name]
        return None
