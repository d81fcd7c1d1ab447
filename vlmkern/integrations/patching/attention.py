"""Self-attention of towers: which modules are that, and what they ask of `ops.attention`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import functional
from .swap import TOKENS, Refused, Swap, example, projection, takes


class SelfAttention(Swap):
    """Non-causal self-attention, with a projection each for queries, keys and values, or with one for all three.

    SigLIP, CLIP, Idefics, DINOv2, ViT, InternVL, and those of timm. Norms of queries and keys, of their whole width or
    of each head, are called as they are.
    """

    name = "attention on vlmkern.ops.attention and linear"
    called = ("q_norm", "k_norm")
    rank = 3

    def __init__(self, qkv: tuple[str, ...], out: str) -> None:
        self.linears = (*qkv, out)

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and not takes(module, "cu_seqlens")

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return asked_of_attention(module)

    def check(self, module: nn.Module) -> None:
        if getattr(module, "is_causal", False) or not takes_one_tensor(module):
            raise Refused("causal or cross-attention, which vlmkern leaves to the model")
        super().check(module)
        heads_of(module)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return self.called

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        return not options and super().covers(module, x)

    def compute(
        self,
        module: nn.Module,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        *qkv, out = (projection(getattr(module, name)) for name in self.linears)
        return functional.self_attention(
            x,
            qkv,
            out,
            heads_of(module),
            scale=scale_of(module),
            # of an encoder that leaves out its padding
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            residual=residual,
            prepare=_normed(module),
        )


class PackedSelfAttention(SelfAttention):
    """The same over packed images, whose queries and keys are turned by their places: Qwen2-VL, 2.5-VL and 3-VL."""

    options = ("cu_seqlens", "position_embeddings", "max_seqlen")
    rank = 2

    def recognises(self, module: nn.Module) -> bool:
        return Swap.recognises(self, module) and takes(module, "cu_seqlens")

    def check(self, module: nn.Module) -> None:
        Swap.check(self, module)
        heads_of(module)

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        return tuple(x.flatten(0, 1) for x in super().example(module))

    def example_options(self, module: nn.Module) -> dict[str, Any]:
        weight = self.weight(module)
        angles = example((2 * TOKENS, weight.shape[-1] // heads_of(module) // 2), weight).float()
        angles = torch.cat([angles, angles], -1)
        bounds = torch.tensor([0, 3, 2 * TOKENS], dtype=torch.int32, device=weight.device)
        return {"cu_seqlens": bounds, "position_embeddings": (angles.cos(), angles.sin())}

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        bounds, tables = options.get("cu_seqlens"), options.get("position_embeddings")
        if bounds is None or tables is None or bounds.dim() != 1 or len(tables) != 2:
            return False
        if any(table.dim() != 2 or table.shape[0] != x.shape[0] for table in tables):
            return False
        if torch.compiler.is_compiling() and not isinstance(options.get("max_seqlen"), int):
            return False  # what is as long as the longest image is known by its values alone
        return Swap.covers(self, module, x)

    def compute(
        self,
        module: nn.Module,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int | None = None,
    ) -> Tensor:
        *qkv, out = (projection(getattr(module, name)) for name in self.linears)
        bounds, longest = _bounds(cu_seqlens)
        return functional.self_attention(
            x,
            qkv,
            out,
            heads_of(module),
            scale=scale_of(module),
            cu_seqlens=bounds,
            max_seqlen=max_seqlen if isinstance(max_seqlen, int) else longest(),
            rotary=tuple(table.float() for table in position_embeddings),
            residual=residual,
            prepare=_normed(module),
        )


class JinaSelfAttention(Swap):
    """Non-causal self-attention whose one projection has its bias beside it: jina-vlm's tower, by its own code."""

    name = SelfAttention.name
    linears = ("qkv_w", "out")
    rank = 3

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return asked_of_attention(module)

    def check(self, module: nn.Module) -> None:
        if getattr(module, "is_causal", False):
            raise Refused("causal attention, which vlmkern leaves to the model")
        for name, none in (("clip_qkv", None), ("sliding_window", -1)):
            if getattr(module, name, none) not in (none, None):
                raise Refused(f"{name} is {getattr(module, name)}")
        super().check(module)
        heads_of(module)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        bias = torch.cat([module.q_b, module.k_b, module.v_b])
        return functional.self_attention(
            x,
            [(module.qkv_w.weight, bias)],
            projection(module.out),
            heads_of(module),
            scale=scale_of(module),
            residual=residual,
        )


class TorchAttention(Swap):
    """torch's own `nn.MultiheadAttention`, where keys and values are of one sequence and no weights are asked for, as
    open_clip's towers call it."""

    name = "nn.MultiheadAttention, called without weights, on vlmkern.ops.attention and linear"
    linears = ()
    inputs = 3
    options = ("need_weights",)
    rank = 3

    def recognises(self, module: nn.Module) -> bool:
        return type(module) is nn.MultiheadAttention

    def check(self, module: nn.Module) -> None:
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise Refused("it has other sizes of keys and values, or keys beyond those that it is given")
        super().check(module)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return ("out_proj",)

    def weight(self, module: nn.Module) -> Tensor:
        return module.in_proj_weight

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return [module.out_proj]

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        return super().example(module) * 3

    def example_options(self, module: nn.Module) -> dict[str, Any]:
        return {"need_weights": False}

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor, **options: Any) -> bool:
        key, value = rest
        return (
            key is value
            and key.dim() == x.dim()
            and key.dtype == x.dtype
            and options.get("need_weights") is False
            and self.covers_as_part(module, x)
        )

    def covers_as_part(self, module: nn.Module, x: Tensor, **options: Any) -> bool:
        return super().covers(module, x)

    def compute(
        self, module: nn.Module, x: Tensor, *rest: Tensor, residual: Tensor | None = None, **options: Any
    ) -> Tensor:
        context = rest[0] if rest and rest[0] is not x else None
        if not module.batch_first:
            x, context, residual = (None if t is None else t.transpose(0, 1) for t in (x, context, residual))
        qkv, out = (module.in_proj_weight, module.in_proj_bias), projection(module.out_proj)
        if context is None:
            y = functional.self_attention(x, [qkv], out, module.num_heads, residual=residual)
        else:
            y = functional.cross_attention(x, context, qkv, out, module.num_heads)
        return y if module.batch_first else y.transpose(0, 1)


def heads_of(module: nn.Module) -> int:
    """How many heads attention has, as many of keys as of queries. Raises `Refused` where it does not say."""
    for name in ("num_heads", "n_heads", "num_attention_heads"):
        heads = getattr(module, name, None)
        if isinstance(heads, int):
            break
    else:
        raise Refused("it does not say how many heads it has")
    grouped = getattr(module, "n_kv_heads", getattr(module, "num_key_value_heads", None))
    if grouped not in (None, heads):
        raise Refused(f"{grouped} key-value heads for {heads} heads")
    return heads


def scale_of(module: nn.Module) -> float | None:
    """The factor on the scores, None where a module does not say."""
    for name in ("scale", "scaling"):
        if isinstance(getattr(module, name, None), float):
            return getattr(module, name)
    return None


def asked_of_attention(module: nn.Module) -> tuple[Any, ...]:
    """What a model's user can ask of attention without touching the module."""
    config = module.__dict__.get("config")
    return getattr(config, "_attn_implementation", None), module.__dict__.get("is_causal")


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether a forward needs nothing that such attention has not: neither positions nor another sequence."""
    return not any(takes(module, name) for name in ("position_embeddings", "context", "key_value_states"))


def _normed(module: nn.Module) -> functional.Prepare | None:
    """What becomes of queries and keys [..., H, D] before scores; None where they have no norms."""
    norms = [module._modules.get(name) for name in SelfAttention.called]
    if all(norm is None or type(norm) is nn.Identity for norm in norms):
        return None

    def prepare(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (_of_width(norm, x) for norm, x in zip(norms, (q, k), strict=True))
        return q, k

    return prepare


def _of_width(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Of heads where a norm's weight is one's, of their whole width where it is that."""
    weight = getattr(norm, "weight", None)
    if norm is None or type(norm) is nn.Identity:
        return x
    if weight is not None and weight.shape[-1] == x.shape[-1]:
        return norm(x)
    return norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])


# bounds that a tower gives to each of its blocks: those of the op, and their longest segment
_known: tuple[weakref.ref[Tensor], int, Tensor, list[int]] | None = None


def _bounds(cu_seqlens: Tensor) -> tuple[Tensor, Any]:
    """int32 bounds, and what tells the longest segment, which is read from a device once for all blocks."""
    global _known
    version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
    known = _known
    if known is None or known[0]() is not cu_seqlens or known[1] != version:
        known = weakref.ref(cu_seqlens), version, cu_seqlens.to(torch.int32), []
        if not torch.compiler.is_compiling():
            _known = known
    _, _, bounds, found = known

    def longest() -> int:
        if not found:
            found.append(int(bounds.diff().max()) if len(bounds) > 1 else 0)
        return found[0]

    return bounds, longest
