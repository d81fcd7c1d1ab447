"""Connectors between towers and language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .attention import heads_of
from .swap import Refused, Swap, example, projection


class Connector(Swap):
    """Attention pooling of windows and a projector: jina-vlm's connector. The projector stays a module."""

    name = "connector on vlmkern.ops.attention_pool"
    linears = ()
    called = ("projector",)
    inputs = 2
    rank = 4
    _pooling = ("q_w", "kv_w", "out")

    def recognises(self, module: nn.Module) -> bool:
        pooling = module._modules.get("pooling")
        return (
            pooling is not None
            and module._modules.get("projector") is not None
            and all(pooling._modules.get(name) is not None for name in self._pooling)
            and hasattr(module, "n_patches")
        )

    def check(self, module: nn.Module) -> None:
        if getattr(module, "pad_embed", None) is None or module.pad_embed.dim() != 2:
            raise Refused("pad_embed is not [2, channels]")
        for name in self._pooling:
            if type(getattr(module.pooling, name)) is not nn.Linear:
                raise Refused(f"pooling.{name} is a {type(getattr(module.pooling, name)).__name__}")
        super().check(module)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return ("pooling", "projector")

    def weight(self, module: nn.Module) -> Tensor:
        return module.pad_embed

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        rows, columns = module.n_patches
        features = example((1, 2, rows * columns, module.pad_embed.shape[1]), module.pad_embed)
        masks = torch.tensor([0.0, 0.5, 1.0, -1.0], device=features.device).repeat(rows * columns)
        return features, masks[: 2 * rows * columns].view(1, 2, -1)

    def stands_for(self, module: nn.Module) -> tuple[nn.Module, ...]:
        return module, module.pooling

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        # the original takes whatever broadcasts
        return rest[0].shape == x.shape[:-1] and super().covers(module, x)

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return [module.pooling._modules[name] for name in self._pooling]

    def compute(self, module: nn.Module, features: Tensor, masks: Tensor, **options: Any) -> Tensor:
        pooling = module.pooling
        pooled = ops.attention_pool(
            [features.flatten(0, 1)],
            pooling.q_w.weight,
            pooling.q_b,
            pooling.kv_w.weight,
            torch.cat([pooling.k_b, pooling.v_b]),
            *projection(pooling.out),
            grid=tuple(module.n_patches),
            num_heads=heads_of(pooling),
            window=(module.pooling_h, module.pooling_w),
            pad_embed=module.pad_embed,
            mask=masks.flatten(0, 1),
        )
        return module.projector(pooled.unflatten(0, features.shape[:2]))
