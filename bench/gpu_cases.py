"""What is compared on a GPU: each op and block of jina-vlm at 13 crops, forward and backward, and every provider of it.

Providers take the same tensors. A provider that a machine, a torch build or a shape does not have is left out there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from bench_attention import eager as eager_attention
from bench_attention_pool import GRID
from bench_attention_pool import Eager as EagerPool
from bench_siglip_block import Transformers as EagerBlock
from bench_swiglu_mlp import Eager as EagerMLP
from bench_vision_path import EagerPath, make_vision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmkern import ops
from vlmkern.models.jina_vlm.config import VisionConfig
from vlmkern.models.jina_vlm.vision import VisionBlock, run_tower

CROPS, TOKENS, HEADS, WIDTH = 13, 729, 16, 1152

Call = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """One computation and those who can do it.

    Attributes:
        inputs: what gradients are taken of, beside the weights that `providers` hold.
        flops: of the mathematics at D = 72, whatever a provider pads or leaves out.
        least_bytes: inputs, weights and result once.
        weights: what gradients are taken of in every provider.
    """

    name: str
    inputs: list[Tensor]
    providers: dict[str, Call]
    flops: float
    least_bytes: float
    weights: list[Tensor] = field(default_factory=list)
    backward: bool = True


def cases(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Iterator[Case]:
    """All cases, made one after the other, so that one's memory is free before the next."""
    for head_dim, tokens, images in ((72, 729, 13), (72, 729, 1), (64, 1025, 13), (80, 3996, 1)):
        yield attention(images, tokens, head_dim, dtype, device)
    yield attention_pool(HEADS, 72, 72, dtype, device)
    yield attention_pool(1, 1152, 2304, dtype, device)
    for rows in (2548, 196):
        yield swiglu_mlp(rows, dtype, device)
    yield linear("gelu_tanh", False, dtype, device)
    yield linear("none", True, dtype, device)
    yield add_layer_norm(dtype, device)
    yield block(dtype, device)
    yield vision_path(dtype, device)


def attention(images: int, tokens: int, head_dim: int, dtype: torch.dtype, device: str) -> Case:
    """On views of one fused projection."""
    qkv = torch.randn(images, tokens, 3, HEADS, head_dim, dtype=dtype, device=device)
    heads = images * HEADS

    def forced(backend: SDPBackend) -> Call:
        def call(qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2)

        return call

    providers: dict[str, Call] = {
        "eager": lambda qkv: eager_attention(*qkv.unbind(2)),
        "compile": compiled(lambda qkv: eager_attention(*qkv.unbind(2))),
        "sdpa_flash": forced(SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": forced(SDPBackend.CUDNN_ATTENTION),
        "sdpa_efficient": forced(SDPBackend.EFFICIENT_ATTENTION),
        "vlmkern": lambda qkv: ops.attention(*qkv.unbind(2)),
    }
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func

        providers["flash_attn"] = lambda qkv: flash_attn_func(*qkv.unbind(2))
    return Case(
        f"attention {images}x{tokens}x{HEADS}x{head_dim}",
        [qkv],
        providers,
        flops=4 * heads * tokens**2 * head_dim,
        least_bytes=4 * heads * tokens * head_dim * dtype.itemsize,
    )


def attention_pool(heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: str) -> Case:
    """Of two hidden states of 13 crops; the formula's count, keys and values of every slot."""
    features = list(torch.randn(2, CROPS, TOKENS, WIDTH, dtype=dtype, device=device).unbind(0))
    module = EagerPool(heads, key_dim, value_dim).to(device, dtype)
    windows = 196 * CROPS
    weights = [module.q.weight, module.kv.weight, module.out.weight]

    def ours(*features: Tensor) -> Tensor:
        q, kv, out = weights
        return ops.attention_pool(features, q, None, kv, None, out, None, grid=GRID, num_heads=heads)

    sizes = [weight.numel() for weight in weights]
    return Case(
        f"attention_pool {heads} heads, {windows} windows",
        features,
        {
            "eager": lambda *features: module(features),
            "compile": compiled(lambda *features: module(features)),
            "vlmkern": ours,
        },
        flops=2 * windows * (sizes[0] + 4 * sizes[1] + sizes[2]),
        least_bytes=(2 * features[0].numel() + sum(sizes) + windows * WIDTH) * dtype.itemsize,
        weights=weights,
    )


def swiglu_mlp(rows: int, dtype: torch.dtype, device: str) -> Case:
    """The connector's projector."""
    x = torch.randn(rows, WIDTH, dtype=dtype, device=device)
    module = EagerMLP(WIDTH, 6144, 2048).to(device, dtype)
    weights = [module.up.weight, module.down.weight]
    return Case(
        f"swiglu_mlp {rows}x{WIDTH}-6144-2048",
        [x],
        {"eager": module, "compile": compiled(module), "vlmkern": lambda x: ops.swiglu_mlp(x, *weights)},
        flops=2 * rows * sum(weight.numel() for weight in weights),
        least_bytes=(x.numel() + sum(weight.numel() for weight in weights) + rows * 2048) * dtype.itemsize,
        weights=weights,
    )


def linear(activation: str, residual: bool, dtype: torch.dtype, device: str) -> Case:
    """A tower block's projections: into the MLP with its activation, or out of it onto the residual."""
    rows, inputs, outputs = CROPS * TOKENS, *((4304, WIDTH) if residual else (WIDTH, 4304))
    weight, bias = torch.randn(outputs, inputs, device=device) * inputs**-0.5, torch.randn(outputs, device=device)
    weights = [weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]
    tensors = [torch.randn(rows, inputs, dtype=dtype, device=device)]
    if residual:
        tensors.append(torch.randn(rows, outputs, dtype=dtype, device=device))

    def eager(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = F.linear(x, *weights)
        y = F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y
        return y if added is None else y + added

    def ours(x: Tensor, added: Tensor | None = None) -> Tensor:
        return ops.linear(x, *weights, activation=activation, residual=added)

    least = sum(x.numel() for x in tensors) + weight.numel() + rows * outputs
    return Case(
        f"linear {rows}x{inputs}-{outputs}, {activation}{' + residual' if residual else ''}",
        tensors,
        {"eager": eager, "compile": compiled(eager), "vlmkern": ours},
        flops=2 * rows * weight.numel(),
        least_bytes=least * dtype.itemsize,
        weights=weights,
    )


def add_layer_norm(dtype: torch.dtype, device: str) -> Case:
    """Between a tower block's halves: residual and norm."""
    rows = CROPS * TOKENS
    tensors = [torch.randn(rows, WIDTH, dtype=dtype, device=device) for _ in range(2)]
    weights = [torch.randn(WIDTH, dtype=dtype, device=device).requires_grad_() for _ in range(2)]

    def eager(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (WIDTH,), *weights, 1e-6), total

    return Case(
        f"add_layer_norm {rows}x{WIDTH}",
        tensors,
        {
            "eager": eager,
            "compile": compiled(eager),
            "vlmkern": lambda x, residual: ops.add_layer_norm(x, residual, *weights, eps=1e-6),
        },
        flops=8 * rows * WIDTH,
        least_bytes=4 * rows * WIDTH * dtype.itemsize,
        weights=weights,
    )


def block(dtype: torch.dtype, device: str) -> Case:
    """One block of the tower, against transformers' own layer."""
    config = VisionConfig()
    ours = VisionBlock(config)
    theirs = EagerBlock(ours, config).to(device, dtype).requires_grad_(False)
    ours = ours.to(device, dtype).requires_grad_(False)
    x = torch.randn(CROPS, TOKENS, WIDTH, dtype=dtype, device=device)
    return Case(
        "siglip block, 13 crops",
        [x],
        {"transformers": theirs, "compile": compiled(theirs), "vlmkern": ours},
        flops=_block_flops(config),
        least_bytes=(2 * x.numel() + sum(p.numel() for p in ours.parameters())) * dtype.itemsize,
        backward=False,
    )


def vision_path(dtype: torch.dtype, device: str) -> Case:
    """Crops to projected rows through four blocks and the connector, the same work in all providers."""
    vision = make_vision()
    theirs = EagerPath(vision).to(device, dtype).requires_grad_(False)
    vision = vision.to(device, dtype).requires_grad_(False)
    crops = torch.rand(CROPS, TOKENS, 588, device=device).to(dtype) * 2 - 1
    mask = torch.ones(CROPS, TOKENS, device=device)
    return Case(
        "vision path, 13 crops, 4 blocks",
        [crops],
        {
            "transformers": theirs,
            "compile": compiled(theirs),
            "vlmkern": lambda crops: vision.vl_connector(run_tower(vision, crops), mask, None),
        },
        flops=4 * _block_flops(VisionConfig()),
        least_bytes=(crops.numel() + sum(p.numel() for p in vision.parameters())) * dtype.itemsize,
        backward=False,
    )


def compiled(function: Callable[..., Any] | nn.Module) -> Call:
    """torch.compile at its best, free of what earlier baselines left behind; compiled when first called."""
    made: list[Call] = []

    def call(*args: Tensor) -> Tensor:
        if not made:
            torch._dynamo.reset()
            # without CUDA graphs of its own: all providers are timed in graphs
            made.append(torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False))
        return made[0](*args)

    return call


def _block_flops(config: VisionConfig) -> float:
    tokens, width = CROPS * TOKENS, config.hidden_size
    return 2 * tokens * width * (4 * width + 2 * config.mlp_size) + 4 * tokens * TOKENS * width
