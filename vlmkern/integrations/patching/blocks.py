"""Pre-norm blocks of an attention and an MLP that are swapped."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn import functional
from .norms import RMSNorm
from .swap import Refused, Swap
from .swapped import is_swapped, state_of


class Block(Swap):
    """Pre-norm block of an attention and an MLP, for the residuals to be added where their summands are made.

    Norms are layer norms, or RMS norms that are swapped. Before they are added, summands may be multiplied by a vector
    each, LayerScale: parameters of the block, or of modules that have nothing else.
    """

    name = "block with fused residuals"
    linears = ()
    options = ("cu_seqlens", "position_embeddings", "max_seqlen")

    def __init__(
        self, attention_norm: str, attention: str, mlp_norm: str, mlp: str, scales: tuple[str, str] = ("", "")
    ) -> None:
        self.parts = (attention_norm, attention, mlp_norm, mlp)
        self.norms = (attention_norm, mlp_norm)
        # the second norm may be one op with the sum before it
        self.called = (attention_norm,)
        self.scales = scales

    def recognises(self, module: nn.Module) -> bool:
        return all(module._modules.get(name) is not None for name in self.parts)

    def check(self, module: nn.Module) -> None:
        for name in self.norms:
            norm = getattr(module, name)
            if type(norm) is not nn.LayerNorm and not _is_rms_norm(norm):
                raise Refused(f"{name} is a {type(norm).__name__}, not a LayerNorm")
        if not all(is_swapped(part) for part in self._summands(module)):
            raise Refused("its attention or its MLP is not swapped")
        super().check(module)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return self.parts + self.scales

    def weight(self, module: nn.Module) -> Tensor:
        return getattr(module, self.parts[0]).weight

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        attention, _ = self._summands(module)
        return state_of(attention).swap.example(attention)[:1]

    def example_options(self, module: nn.Module) -> dict[str, Any]:
        attention, _ = self._summands(module)
        options = state_of(attention).swap.example_options(attention)
        return {name: value for name, value in options.items() if name in self.options}

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        attention, mlp = self._summands(module)
        return (
            super().covers(module, x)
            and all(is_swapped(part) for part in (attention, mlp))
            and state_of(attention).swap.covers_as_part(attention, x, **options)
            and state_of(mlp).swap.covers_as_part(mlp, x)
        )

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return [module._modules[self.parts[2]]]

    def compute(self, module: nn.Module, x: Tensor, **options: Any) -> Tensor:
        attention_norm, mlp_norm = (module._modules[name] for name in self.norms)

        def of(part: nn.Module, options: dict[str, Any]) -> Any:
            return lambda normed, residual: state_of(part).swap.compute(part, normed, residual=residual, **options)

        attention, mlp = self._summands(module)
        return functional.pre_norm_block(
            x, attention_norm, of(attention, options), mlp_norm, of(mlp, {}), self._scales_of(module)
        )

    def _summands(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        return module._modules[self.parts[1]], module._modules[self.parts[3]]

    def _scales_of(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        attention, mlp = (_vector(module, name) for name in self.scales)
        return attention, mlp


def _is_rms_norm(module: nn.Module) -> bool:
    return is_swapped(module) and isinstance(state_of(module).swap, RMSNorm)


def _vector(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of the block, or the only one of its child; None where it has neither."""
    own = module._parameters.get(name)
    child = module._modules.get(name)
    if own is not None or child is None:
        return own
    return next((p for p in child._parameters.values() if p is not None), None)
