"""The kinds of module that have an op: how one is recognised, when it is left alone, and what it is computed with.

Modules are told by their children's names and by what these are, not by their class or where it was imported from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...nn import functional
from ...ops._algebra import ACTIVATIONS, activate
from .swapped import (
    DTYPES,
    drops,
    hooked,
    is_swapped,
    observed,
    state_of,
    unchanged,
    weight_fits,
)

_TOKENS = 5
_ACTIVATIONS = ("activation_fn", "act", "act_fn")


class Refused(Exception):
    """Why a module that looks like a candidate is left alone."""


class Swap:
    """One kind of module.

    Attributes:
        name: what a swapped module becomes, for the report.
        linears: children that must be plain linear layers; all of them make a candidate.
        called: children that are called as before, whatever they are.
        inputs: how many tensors it takes.
        rank: how many dimensions these have, where the original says.
    """

    name: str
    linears: tuple[str, ...]
    called: tuple[str, ...] = ()
    inputs = 1
    rank: int | None = None

    def recognises(self, module: nn.Module) -> bool:
        """Whether a module looks like one of this kind."""
        children = module._modules
        return all(children.get(name) is not None for name in self.linears)

    def check(self, module: nn.Module) -> None:
        """Raises `Refused` unless the module can be swapped."""
        for name in self.linears:
            child = module._modules[name]
            if type(child) is not nn.Linear:
                kind = type(child)
                raise Refused(f"{name} is a {kind.__module__}.{kind.__qualname__}, not a plain linear layer")
        for name, child in module.named_children():
            if name not in self.linears and name not in self.others(module) and not _does_nothing(child):
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
        return (example((2, _TOKENS, weight.shape[-1]), weight),)

    def stands_for(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The modules that the ops run in place of, whose children they do not call."""
        return (module,)

    def kernel(self, module: nn.Module) -> str | None:
        """What `ops.linear` calls the module's activation; None where the kind has none."""
        return None

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        """What the result rests on beside parameters, children and settings."""
        return ()

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor) -> bool:
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

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        """The children whose weights the ops read."""
        return [module._modules[name] for name in self.linears]

    def compute(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """The module's result, by the ops."""
        raise NotImplementedError


class SelfAttention(Swap):
    """Non-causal self-attention with separate projections: SigLIP, CLIP, Idefics."""

    name = "attention on vlmkern.ops.attention and linear"
    linears = ("q_proj", "k_proj", "v_proj", "out_proj")
    rank = 3

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return _asked_of_attention(module)

    def check(self, module: nn.Module) -> None:
        _refuse_causal(module)
        super().check(module)
        _heads(module)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        *qkv, out = (_projection(getattr(module, name)) for name in self.linears)
        return functional.self_attention(x, qkv, out, _heads(module), scale=_scale(module), residual=residual)


class FusedSelfAttention(Swap):
    """Non-causal self-attention with one projection for queries, keys and values: jina-vlm's tower."""

    name = SelfAttention.name
    linears = ("qkv_w", "out")
    rank = 3

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return _asked_of_attention(module)

    def check(self, module: nn.Module) -> None:
        _refuse_causal(module)
        for name, none in (("clip_qkv", None), ("sliding_window", -1)):
            if getattr(module, name, none) not in (none, None):
                raise Refused(f"{name} is {getattr(module, name)}")
        super().check(module)
        _heads(module)

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bias = torch.cat([module.q_b, module.k_b, module.v_b])
        return functional.self_attention(
            x,
            [(module.qkv_w.weight, bias)],
            _projection(module.out),
            _heads(module),
            scale=_scale(module),
            residual=residual,
        )


class MLP(Swap):
    """Two linear layers with an activation between: fc1 and fc2, or up and down."""

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

    def compute(self, module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        up, down = (_projection(getattr(module, name)) for name in self.linears)
        return functional.mlp(x, up, down, state_of(module).kernel, residual)

    def _widths(self, module: nn.Module) -> float:
        """How many times as wide the first layer's result is as the second's input; 0 if they do not say."""
        up, down = (getattr(module, name) for name in self.linears)
        return getattr(up, "out_features", 0) / max(1, getattr(down, "in_features", 0))


class SwiGLU(Swap):
    """Gated MLP with separate projections: Qwen, Llama, Mistral, Idefics2."""

    name = "SwiGLU on vlmkern.ops.linear"
    linears = ("gate_proj", "up_proj", "down_proj")

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return _ACTIVATIONS

    def stands_for(self, module: nn.Module) -> tuple[nn.Module, ...]:
        return _with_activation(module)

    def kernel(self, module: nn.Module) -> str | None:
        return _silu(module)

    def facts(self, module: nn.Module) -> tuple[Any, ...]:
        return (_activation(module),)

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        return functional.swiglu(x, *(_projection(getattr(module, name)) for name in self.linears))


class FusedSwiGLU(MLP):
    """Gated MLP whose first projection gives [value | gate]: jina-vlm's connector and decoder."""

    name = "SwiGLU on vlmkern.ops.swiglu_mlp"

    def __init__(self) -> None:
        super().__init__("up", "down")

    def recognises(self, module: nn.Module) -> bool:
        return Swap.recognises(self, module) and self._widths(module) == 2

    def kernel(self, module: nn.Module) -> str | None:
        return _silu(module)

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        (w_up, b_up), (w_down, b_down) = (_projection(getattr(module, name)) for name in self.linears)
        return ops.swiglu_mlp(x, w_up, w_down, b_up=b_up, b_down=b_down)


class Block(Swap):
    """Pre-norm block of an attention and an MLP, for the residuals to be added where their summands are made."""

    name = "block with fused residuals"
    linears = ()

    def __init__(self, attention_norm: str, attention: str, mlp_norm: str, mlp: str) -> None:
        self.parts = (attention_norm, attention, mlp_norm, mlp)
        self.called = (attention_norm,)

    def recognises(self, module: nn.Module) -> bool:
        return all(module._modules.get(name) is not None for name in self.parts)

    def check(self, module: nn.Module) -> None:
        attention_norm, _, mlp_norm, _ = self.parts
        for name in (attention_norm, mlp_norm):
            if type(getattr(module, name)) is not nn.LayerNorm:
                raise Refused(f"{name} is a {type(getattr(module, name)).__name__}, not a LayerNorm")
        if not all(is_swapped(part) for part in self._summands(module)):
            raise Refused("its attention or its MLP is not swapped")
        super().check(module)

    def others(self, module: nn.Module) -> tuple[str, ...]:
        return self.parts

    def weight(self, module: nn.Module) -> Tensor:
        return getattr(module, self.parts[0]).weight

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor) -> bool:
        return super().covers(module, x) and all(
            is_swapped(part) and state_of(part).swap.covers(part, x) for part in self._summands(module)
        )

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return [module._modules[self.parts[2]]]

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        attention_norm, mlp_norm = (module._modules[name] for name in (self.parts[0], self.parts[2]))

        def of(part: nn.Module) -> Any:
            return lambda normed, residual: state_of(part).swap.compute(part, normed, residual)

        attention, mlp = self._summands(module)
        return functional.pre_norm_block(x, attention_norm, of(attention), mlp_norm, of(mlp))

    def _summands(self, module: nn.Module) -> tuple[nn.Module, nn.Module]:
        return module._modules[self.parts[1]], module._modules[self.parts[3]]


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

    def covers(self, module: nn.Module, x: Tensor, *rest: Tensor) -> bool:
        # the original takes whatever broadcasts
        return rest[0].shape == x.shape[:-1] and super().covers(module, x)

    def weighted(self, module: nn.Module) -> list[nn.Module]:
        return [module.pooling._modules[name] for name in self._pooling]

    def compute(self, module: nn.Module, features: Tensor, masks: Tensor) -> Tensor:
        pooling = module.pooling
        pooled = ops.attention_pool(
            [features.flatten(0, 1)],
            pooling.q_w.weight,
            pooling.q_b,
            pooling.kv_w.weight,
            torch.cat([pooling.k_b, pooling.v_b]),
            *_projection(pooling.out),
            grid=tuple(module.n_patches),
            num_heads=_heads(pooling),
            window=(module.pooling_h, module.pooling_w),
            pad_embed=module.pad_embed,
            mask=masks.flatten(0, 1),
        )
        return module.projector(pooled.unflatten(0, features.shape[:2]))


class OtherAttention(Swap):
    """Attention of language models and resamplers, to be named in the report."""

    name = ""
    linears = ("q_proj", "k_proj", "v_proj", "o_proj")

    def check(self, module: nn.Module) -> None:
        raise Refused("causal or cross-attention, which vlmkern leaves to the model")


SWAPS: tuple[Swap, ...] = (
    SelfAttention(),
    FusedSelfAttention(),
    MLP("fc1", "fc2"),
    MLP("up", "down"),
    SwiGLU(),
    FusedSwiGLU(),
    Block("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    Block("attn_lnorm", "attn", "ffn_lnorm", "ffn"),
    Connector(),
    OtherAttention(),
)


def example(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random values, the same in every process and whatever the caller's generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _projection(linear: nn.Linear) -> functional.Projection:
    return linear.weight, linear.bias


def _does_nothing(module: nn.Module) -> bool:
    """Whether a module passes its input on, at least in evaluation (`drops` sees to training)."""
    return type(module) in (nn.Identity, nn.Dropout)


def _refuse_causal(module: nn.Module) -> None:
    if getattr(module, "is_causal", False):
        raise Refused("causal attention, which vlmkern leaves to the model")


def _heads(module: nn.Module) -> int:
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


def _scale(module: nn.Module) -> float | None:
    for name in ("scale", "scaling"):
        if isinstance(getattr(module, name, None), float):
            return getattr(module, name)
    return None


def _asked_of_attention(module: nn.Module) -> tuple[Any, ...]:
    """What a model's user can ask of attention without touching the module."""
    config = module.__dict__.get("config")
    return getattr(config, "_attn_implementation", None), module.__dict__.get("is_causal")


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
