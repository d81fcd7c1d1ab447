"""MLPs: two linear layers with an activation, or a gate, between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...nn import functional
from ...ops._algebra import ACTIVATIONS, activate
from .swap import TOKENS, Refused, Swap, example, projection
from .swapped import state_of

# what models call it; the second module of an nn.Sequential
_ACTIVATIONS = ("activation_fn", "act", "act_fn", "activation", "gelu", "1")


class MLP(Swap):
    """Two linear layers with an activation between: fc1 and fc2, up and down, or those of an `nn.Sequential`."""

    name = "MLP on vlmkern.ops.linear"

    def __init__(self, up: str, down: str) -> None:
        self.linears = (up, down)

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and self._widths(module) == 1

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return _ACTIVATIONS

    def stands_for(self, module: nn.Module) -> tuple[nn.Module, ...]:
        return _with_activation(module)

    def kernel(self, module: nn.Module) -> str | None:
        return _known_activation(module)

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return (_activation(module),)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        up, down = (projection(getattr(module, name)) for name in self.linears)
        return functional.mlp(x, up, down, state_of(module).kernel, residual)

    def _widths(self, module: nn.Module) -> float:
        """How many times as wide the first layer's result is as the second's input; 0 if they do not say."""
        up, down = (getattr(module, name) for name in self.linears)
        return getattr(up, "out_features", 0) / max(1, getattr(down, "in_features", 0))


class NormedMLP(MLP):
    """A norm, neighbours side by side, and an MLP: the connectors of InternVL and Qwen3-VL."""

    name = "MLP after a norm on vlmkern.ops.linear"

    def __init__(self, norm: str, up: str, down: str) -> None:
        super().__init__(up, down)
        self.called = (norm,)

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and isinstance(module._modules.get(self.called[0]), nn.LayerNorm)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return (*super().others(module), *self.called)

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        up = self.weight(module)
        width = module._modules[self.called[0]].normalized_shape[-1]
        return (example((TOKENS * max(1, up.shape[-1] // width), width), up),)

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        # those that put neighbours together give rows, whatever they are given
        return (x.dim() == 2 or not hasattr(module, "use_postshuffle_norm")) and super().covers(module, x)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        norm, inputs = module._modules[self.called[0]], self.weight(module).shape[-1]
        width = norm.normalized_shape[-1]
        x = norm(x if x.shape[-1] == width else x.reshape(-1, width))
        return super().compute(module, x if width == inputs else x.reshape(-1, inputs), residual)


class GatedMLP(Swap):
    """Gated MLP with separate projections: SwiGLU of Qwen, Llama, Mistral and Idefics2, GeGLU of Gemma."""

    name = "gated MLP on vlmkern.ops.linear"
    linears = ("gate_proj", "up_proj", "down_proj")

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return _ACTIVATIONS

    def stands_for(self, module: nn.Module) -> tuple[nn.Module, ...]:
        return _with_activation(module)

    def kernel(self, module: nn.Module) -> str | None:
        return _known_activation(module)

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return (_activation(module),)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        gate, value, down = (projection(getattr(module, name)) for name in self.linears)
        return functional.gated_mlp(x, gate, value, down, state_of(module).kernel, residual)


class FusedSwiGLU(MLP):
    """Gated MLP whose first projection gives [value | gate]: jina-vlm's connector and decoder."""

    name = "SwiGLU on vlmkern.ops.swiglu_mlp"

    def __init__(self) -> None:
        super().__init__("up", "down")

    def recognises(self, module: nn.Module) -> bool:
        return Swap.recognises(self, module) and self._widths(module) == 2

    def kernel(self, module: nn.Module) -> str | None:
        return _silu(module)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        (w_up, b_up), (w_down, b_down) = (projection(getattr(module, name)) for name in self.linears)
        y = ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down)
        return y if residual is None else residual + y


def _activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    for name in _ACTIVATIONS:
        function = module._modules.get(name)
        if function is None:
            function = module.__dict__.get(name)
        if callable(function):
            return function
    return None


def _with_activation(module: nn.Module) -> tuple[nn.Module, ...]:
    function = _activation(module)
    return (module, function) if isinstance(function, nn.Module) else (module,)


def _known_activation(module: nn.Module) -> str:
    """Which of the activations in `ops.linear` a module's is, found out by its values."""
    function = _activation(module)
    if function is None:
        raise Refused("it has no activation under a known name")
    if not (isinstance(function, nn.Module) and list(function.parameters())):
        x = torch.linspace(-6, 6, 97)
        with torch.no_grad():
            values = function(x)
        for name in ACTIVATIONS[1:]:
            if torch.allclose(values, activate(x, name), rtol=0, atol=1e-6):
                return name
    raise Refused(f"its activation, {type(function).__name__}, has no kernel")


def _silu(module: nn.Module) -> str:
    name = _known_activation(module)
    if name != "silu":
        raise Refused(f"its gate's activation is {name}, not silu")
    return name
