"""Copies of weights in the layouts that the CPU kernels like best, for those who ask for them.

Ops read weights as they are, unless `pack` was called for the module that the weights belong to. Then each weight's
copy is made when an op first needs it: 4 to 10 % less time for products of many rows on Zen 5, and two products in the
place of four for one-head attention pooling, at the price of the memory that `pack` reports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from .dispatch import routes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Copy:
    state: list[Any]
    made: Any
    bytes: int


# weight -> name -> copy; a weight is here from `pack` to `unpack`, or for as long as it lives
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class PackReport:
    """What `pack` did.

    Attributes:
        weights: name -> bytes, of the parameters that may be copied.
        released: name -> bytes, of those that are there as a copy only.
        passed_over: name -> why a parameter is neither.
    """

    weights: Mapping[str, int]
    released: Mapping[str, int]
    passed_over: Mapping[str, str]
    _tensors: tuple[Tensor, ...] = field(repr=False, default=())

    @property
    def bytes(self) -> int:
        """What the copies take now. They are made when they are first needed, so this grows in the first pass."""
        return sum(copy.bytes for tensor in self._tensors for copy in _copies.get(tensor, {}).values())

    @property
    def most_bytes(self) -> int:
        """What the copies take at most, but for the padding of blocks: as much as the weights themselves."""
        return sum(self.weights.values())

    def __str__(self) -> str:
        return (
            f"{len(self.weights)} weights may be copied, {len(self.released)} released,"
            f" {len(self.passed_over)} passed over;"
            f" copies take {self.bytes / 1e6:.1f} MB now, at most about {self.most_bytes / 1e6:.1f} MB"
        )


def pack(model: nn.Module, *, release: bool = False) -> PackReport:
    """Lets the ops keep copies of a module's weights in the layouts that are fastest for them, from now on.

    A copy follows its weight through whatever torch counts or shows: operations in place, optimizers,
    `load_state_dict`, `weight.data = other`. What torch does not see, a copy does not follow: writes through
    `weight.data[...]`, through a numpy array that shares the memory, or from another process. Call `pack` again after
    such a write: it drops the copies that there are. Weights that are swapped for others (`functional_call`, sharded
    training) are read as they are.

    Results do not depend on how often a module was called. They may differ from those before `pack` in the last bits.

    Args:
        model: a module whose parameters are on CPU. Parameters elsewhere are passed over.
        release: the packed form takes the place of the weights of linear layers, so that nothing is there twice. Only
            `ops.linear` and `ops.swiglu_mlp` read it, without a gradient; everything else (other code, saving, moving,
            copying) raises until `unpack` gives the weights back. Products of up to four rows, as a decoder's, are
            slower with it. Left as they are: weights that are trained, that several modules share, or that an op reads
            in another form.

    Returns:
        The weights, and what their copies take. VLMKERN_PREPACK=0 passes all over.

    Raises:
        TypeError: `model` is not a module.
    """
    _require_module(model)
    released = _release(model) if release else {}
    weights, passed_over, tensors = {}, {}, []
    for name, parameter in model.named_parameters():
        reason = _unfit(parameter)
        if reason is not None:
            if name not in released:
                passed_over[name] = reason
            continue
        _copies[parameter] = {}
        weights[name] = parameter.nbytes
        tensors.append(parameter)
    return PackReport(weights, released, passed_over, tuple(tensors))


def unpack(model: nn.Module) -> int:
    """Drops the copies of a module's weights and makes no more; weights that were released are there again, to the bit.

    Returns:
        The bytes of the copies that are dropped.

    Raises:
        TypeError: `model` is not a module.
    """
    _require_module(model)
    freed = sum(copy.bytes for p in model.parameters() for copy in _copies.pop(p, {}).values())
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_mkldnn:
                module._parameters[name] = nn.Parameter(parameter.to_dense(), requires_grad=False)
                freed += parameter.nbytes
    return freed


def packed(name: str, weights: tuple[Tensor, ...], make: Callable[[], Any]) -> Any | None:
    """`make()`, kept under `name` with the first of the weights while none of them changes; None unless `pack` was
    called for all of them. For the ops' implementations."""
    if not _copies or any(weight not in _copies for weight in weights):
        return None
    if any(_unfit(weight) is not None for weight in weights):
        return None
    kept = _copies[weights[0]]
    state = [part for weight in weights for part in _state(weight)]
    copy = kept.get(name)
    if copy is None or copy.state != state:
        kept.pop(name, None)  # the old one goes first: there is memory for one
        del copy
        made = make()
        copy = kept[name] = _Copy(state, made, sum(part.nbytes for part in _parts(made)))
    return copy.made


def _release(model: nn.Module) -> dict[str, int]:
    """Puts the packed form in the place of the weights that allow it: name -> bytes."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    released = {}
    for prefix, parent in list(model.named_modules()):
        # what an op reads in another form than a product's, its module says
        kept = getattr(parent, "plain_weights", ())
        for name, layer in parent.named_children():
            weight = getattr(layer, "weight", None)
            if type(layer) is not nn.Linear or name in kept or weight.requires_grad or owners[id(weight)] > 1:
                continue
            if _unfit(weight) is not None or weight.numel() == 0 or routes.here(weight.dtype) != "oneDNN":
                continue
            layer.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight.detach()), requires_grad=False)
            released[".".join(part for part in (prefix, name, "weight") if part)] = weight.nbytes
    return released


def _state(weight: Tensor) -> tuple[Any, ...]:
    # a weak reference keeps the storage's address from being used for another
    return StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), weight._version, weight.shape, weight.stride()


def _unfit(weight: Tensor) -> str | None:
    """Why a weight may not be copied, or None when it may."""
    if os.environ.get("VLMKERN_PREPACK") == "0":
        return "VLMKERN_PREPACK=0"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"it is a {type(weight).__name__}, whose changes are not seen"
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if weight.dtype not in _DTYPES:
        return f"it is {weight.dtype}"
    if weight.is_mkldnn:
        return "it is released"
    if weight.is_inference():
        return "it was made in inference mode, where changes are not counted"
    if not weight.is_contiguous():
        return "it is a view with gaps or transposed"
    return None


def _parts(made: Any) -> list[Tensor]:
    return [part for part in (made if isinstance(made, (list, tuple)) else (made,)) if part is not None]


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
