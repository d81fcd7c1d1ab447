"""Idefics2's connector: a projection of patches, and a perceiver that resamples them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .encoders import Packed
from .norms import RMSNorm
from .swap import TOKENS, Refused, Swap, example
from .swapped import is_swapped, observed, state_of

_NORMS = ("input_latents_norm", "input_context_norm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class PerceiverConnector(Swap):
    """A projection of the patches that are there, padding left out, and layers in which a few latents attend to them.

    Keys and values of all layers are one product: the layers' norms of the patches differ in their weights alone, which
    go into the projections' columns, so that the rows are normed once.
    """

    name = "connector without padding, on vlmkern.ops.attention and linear"
    linears = ()
    called = ("modality_projection",)
    inputs = 2
    rank = 3

    def recognises(self, module: nn.Module) -> bool:
        resampler = module._modules.get("perceiver_resampler")
        return (
            resampler is not None
            and module._modules.get("modality_projection") is not None
            and isinstance(resampler._modules.get("layers"), nn.ModuleList)
            and len(resampler.layers) > 0
            and isinstance(getattr(resampler, "latents", None), nn.Parameter)
        )

    def check(self, module: nn.Module) -> None:
        for layer in module.perceiver_resampler.layers:
            parts = layer._modules
            for name in _NORMS:
                if not _is_rms_norm(parts.get(name)) or state_of(parts[name]).kernel != 0.0:
                    raise Refused(f"{name} is no RMS norm that is swapped")
            for name in _PROJECTIONS:
                child = parts["self_attn"]._modules.get(name)
                if type(child) is not nn.Linear or child.bias is not None:
                    raise Refused(f"{name} is not a plain linear layer without bias")
        super().check(module)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return ("modality_projection", "perceiver_resampler")

    def weight(self, module: nn.Module) -> Tensor:
        return next(module.modality_projection.parameters())

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return [layer.self_attn._modules[name] for layer in module.perceiver_resampler.layers for name in _PROJECTIONS]

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        x = example((2, TOKENS, self.weight(module).shape[-1]), self.weight(module))
        real = torch.ones(2, TOKENS, dtype=torch.bool, device=x.device)
        real[1, 2:] = False
        return x, real

    def stands_for(self, module: nn.Module) -> tuple[nn.Module, ...]:
        resampler = module.perceiver_resampler
        inner = [part for layer in resampler.layers for part in (layer, layer.self_attn)]
        return (module, resampler, *inner)

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        (real,) = rest
        if torch.compiler.is_compiling() or real.shape != x.shape[:2] or not super().covers(module, x):
            return False
        layers = module.perceiver_resampler.layers
        return not observed(layers) and all(
            not observed(layer) and is_swapped(layer.input_context_norm) for layer in layers
        )

    def compute(self, module: nn.Module, x: Tensor, mask: Tensor, **options: Any) -> Tensor:
        packed = Packed.of(mask.bool())
        context = module.modality_projection(x.flatten(0, 1)[packed.rows])
        return _resampled(module.perceiver_resampler, context, packed)


def _resampled(resampler: nn.Module, context: Tensor, packed: Packed) -> Tensor:
    """context [T, C] of images packed -> [B, latents, C]."""
    images, count = len(packed.lengths), len(resampler.latents)
    latents = resampler.latents.expand(images, -1, -1).flatten(0, 1)
    # of each image its patches, and behind these its latents
    bounds_q = torch.arange(images + 1, dtype=torch.int32, device=context.device) * count
    bounds = packed.bounds + bounds_q
    image = torch.repeat_interleave(torch.arange(images, device=context.device), packed.lengths)
    of_context = torch.arange(len(context), device=context.device) + image * count
    of_latents = (bounds[1:, None] - count + torch.arange(count, device=context.device)).flatten()
    longest = packed.longest() + count
    for layer, of_layer in zip(resampler.layers, _keys_and_values(resampler.layers, context), strict=True):
        attention = layer.self_attn
        width = attention.k_proj.weight.shape[0]
        heads = width // attention.head_dim
        normed = layer.input_latents_norm(latents)
        own = torch.cat([ops.linear(normed, attention.k_proj.weight), ops.linear(normed, attention.v_proj.weight)], -1)
        kv = own.new_empty(len(context) + len(latents), 2 * width)
        kv = kv.index_copy(0, of_context, of_layer).index_copy(0, of_latents, own)
        k, v = kv.unflatten(-1, (2, heads, -1)).unbind(1)
        attended = ops.attention(
            ops.linear(normed, attention.q_proj.weight).unflatten(-1, (-1, attention.head_dim)),
            k,
            v,
            scale=attention.scaling if hasattr(attention, "scaling") else None,
            cu_seqlens=bounds_q,
            max_seqlen=count,
            cu_seqlens_k=bounds,
            max_seqlen_k=longest,
        )
        latents = ops.linear(attended.flatten(1), attention.o_proj.weight, residual=latents)
        latents = latents + layer.mlp(layer.post_attention_layernorm(latents))
    return resampler.norm(latents).unflatten(0, (images, count))


def _keys_and_values(layers: nn.ModuleList, context: Tensor) -> tuple[Tensor, ...]:
    """Of the context for each layer, [T, keys and values], from one product."""
    weights = [
        getattr(layer.self_attn, name).weight * layer.input_context_norm.weight
        for layer in layers
        for name in ("k_proj", "v_proj")
    ]
    rows = layers[0].input_context_norm
    normed = ops.rms_norm(context, torch.ones_like(rows.weight), eps=state_of(rows).swap.eps(rows))
    return ops.linear(normed, torch.cat(weights)).chunk(len(layers), -1)


def _is_rms_norm(module: nn.Module | None) -> bool:
    return module is not None and is_swapped(module) and isinstance(state_of(module).swap, RMSNorm)
