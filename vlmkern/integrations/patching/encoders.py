"""Encoders of images that differ in size: stacks of blocks that leave out padding, in place of computing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Block
from .swap import TOKENS, Refused, Swap, takes
from .swapped import is_swapped, observed, state_of


class Packed(NamedTuple):
    """Which tokens of a batch are there, and where they lie when these are packed.

    Attributes:
        rows: of all tokens of the batch, one after the other, those that are there.
        lengths: of each image.
        bounds: where each image begins and ends among the packed tokens, int32.
    """

    rows: Tensor
    lengths: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Packed:
        """real [B, N], true where a token is there."""
        lengths = real.sum(1)
        bounds = torch.zeros(len(real) + 1, dtype=torch.int32, device=real.device)
        bounds[1:] = lengths.cumsum(0)
        return cls(real.flatten().nonzero()[:, 0], lengths, bounds)

    def longest(self) -> int:
        """Tokens of the largest image."""
        return int(self.lengths.max()) if len(self.lengths) else 0


class Encoder(Swap):
    """Blocks one after the other over a padded batch, with a mask: those of Idefics2 and 3, SmolVLM and SigLIP2.

    Padding takes no part in anything: its rows of the result are 0, where the original has numbers that nobody reads.
    Without a mask the blocks run as they are.
    """

    name = "encoder without its padding"
    linears = ()
    called = ("layers",)
    options = ("attention_mask",)
    rank = 3

    def recognises(self, module: nn.Module) -> bool:
        layers = module._modules.get("layers")
        return (
            isinstance(layers, nn.ModuleList)
            and len(layers) > 0
            and len(list(module.children())) == 1
            and not module._parameters
            and all(map(_is_dense_block, layers))
        )

    def serves(self, module: nn.Module, parents: Sequence[nn.Module]) -> bool:
        masks = ("attention_mask", "patch_attention_mask", "pixel_attention_mask")
        return not parents or any(takes(parent, name) for parent in parents for name in masks)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return self.called

    def check(self, module: nn.Module) -> None:
        if any(_asked_for_more(module)):
            raise Refused("its configuration asks for what blocks have between them")
        super().check(module)

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return _asked_for_more(module)

    def weight(self, module: nn.Module) -> Tensor:
        block = module.layers[0]
        return state_of(block).swap.weight(block)

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return []

    def example_options(self, module: nn.Module) -> dict[str, Any]:
        weight = self.weight(module)
        mask = torch.zeros(2, 1, TOKENS, TOKENS, dtype=weight.dtype, device=weight.device)
        mask[1, :, :, 1::2] = torch.finfo(weight.dtype).min
        return {"attention_mask": mask}

    def judged(self, result: Tensor, options: dict[str, Any]) -> Tensor:
        real = _real(options["attention_mask"], result)
        return result if real is None else result[real]

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        mask = options.get("attention_mask")
        if mask is None or torch.compiler.is_compiling() or not super().covers(module, x):
            return False
        for block in module.layers:
            if not _is_dense_block(block) or observed(block) or not state_of(block).swap.covers(block, x):
                return False
        return _real(mask, x) is not None

    def compute(self, module: nn.Module, x: Tensor, *, attention_mask: Tensor) -> Tensor:
        packed = Packed.of(_real(attention_mask, x))
        options = {"cu_seqlens": packed.bounds, "max_seqlen": packed.longest()}
        rows = x.flatten(0, 1)[packed.rows]
        for block in module.layers:
            rows = state_of(block).swap.compute(block, rows, **options)
        return x.new_zeros(x.shape[0] * x.shape[1], x.shape[2]).index_copy(0, packed.rows, rows).view(x.shape)


def _asked_for_more(module: nn.Module) -> tuple[Any, ...]:
    config = module.__dict__.get("config")
    return getattr(config, "output_hidden_states", None), getattr(config, "output_attentions", None)


def _is_dense_block(module: nn.Module) -> bool:
    if not is_swapped(module) or not isinstance(state_of(module).swap, Block):
        return False
    return not state_of(module).swap.example_options(module)


def _real(mask: Tensor, x: Tensor) -> Tensor | None:
    """Which tokens of x [B, N, C] a mask [B, 1, N, N] shows to all queries alike, [B, N]; None if it is another one."""
    if mask.dim() != 4 or mask.shape[0] != x.shape[0] or mask.shape[-1] != x.shape[1] or mask.numel() == 0:
        return None
    keys = mask[:, :1, :1]
    if not torch.equal(mask, keys.expand_as(mask)):
        return None
    keys = keys[:, 0, 0]
    if keys.dtype is torch.bool:
        return keys
    hidden = keys <= torch.finfo(keys.dtype).min / 2
    return ~hidden if bool(((keys == 0) | hidden).all()) else None
