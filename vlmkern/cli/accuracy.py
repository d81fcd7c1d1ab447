"""Errors of the ops against the float32 reference, on activations sampled from a run."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import use_backend
from .._ops import NAMESPACE
from ..models.jina_vlm import JinaVLM

# rows of the projector's input that are kept: enough for a maximum, little enough for float32 in a second
_SAMPLED_ROWS = 256


@dataclass
class OpError:
    """One row of the table."""

    op: str
    sample: str
    error: float
    largest: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"op": self.op, "sample": self.sample, "max_error": self.error, "max_value": self.largest}

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        relative = self.error / self.largest if self.largest else 0.0
        return self.op, self.sample, f"{self.error:.3g}", f"{self.largest:.3g}", f"{relative:.1e}"


class SampledInputs:
    """Keeps small samples of what goes into one module of each kind while its `with` block runs."""

    def __init__(self, model: JinaVLM) -> None:
        vision = model.model.vision_model
        self._modules = (
            vision.layers[max(vision.config.feature_slots) // 2].attn,
            vision.vl_connector.pooling,
            vision.vl_connector.projector,
        )
        self._inputs: dict[nn.Module, tuple[Any, ...]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> SampledInputs:
        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if module not in self._inputs:
                self._inputs[module] = _sample(inputs)

        self._handles = [module.register_forward_pre_hook(keep) for module in self._modules]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def op_errors(self) -> list[OpError]:
        """Runs the sampled modules again and compares each vlmkern op in them with its float32 reference."""
        errors = []
        for module, inputs in self._inputs.items():
            with _RecordedOps() as recorded:
                module(*inputs)
            for op, arguments, result in recorded.calls:
                with use_backend("reference"):
                    exact = _first(op(*_widened(arguments)))
                difference = (_first(result).float() - exact).abs().max().item()
                first = _first(arguments[0])
                sample = f"{list(first.shape)} {str(first.dtype).removeprefix('torch.')}"
                errors.append(OpError(op._schema.name.split("::")[1], sample, difference, exact.abs().max().item()))
        return errors


class _RecordedOps(TorchDispatchMode):
    """Remembers the calls of vlmkern ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == NAMESPACE:
            self.calls.append((func, args, result))
        return result


def _sample(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """One image of hidden states [B, N, C], some rows of flat ones [K, C]; for pooling, one image of everything."""
    first = inputs[0]
    if isinstance(first, (list, tuple)):
        features, pad_embed, mask, _ = inputs
        return [feature[-1:].clone() for feature in features], pad_embed, mask[-1:].clone(), None
    return (first[:1].clone() if first.dim() == 3 else first[:_SAMPLED_ROWS].clone(),)


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, (list, tuple)) else value


def _widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(item) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return value
