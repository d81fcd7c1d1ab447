"""What is compared on a GPU: each op and block of jina-vlm at 13 crops, forward and backward, and every provider of it.

Providers take the same tensors. One that a machine, a torch build or a shape does not have says so when it is called.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gpu_device
import torch
import torch.nn.functional as F
from bench_attention import eager as eager_attention
from bench_attention_pool import Eager as EagerPool
from bench_swiglu_mlp import Eager as EagerMLP
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlmkern
from vlmkern import ops

DEVICE = gpu_device.current()
_size = DEVICE.size
CROPS, HEADS, WIDTH, HIDDEN, OUT = _size(13, 2), _size(16, 2), _size(1152, 144), _size(4304, 40), _size(2048, 24)
GRID = (_size(27, 3), _size(27, 3))
TOKENS = GRID[0] * GRID[1]
WINDOWS = CROPS * ((GRID[0] + 1) // 2) * ((GRID[1] + 1) // 2)

# what is imported with the models, beyond what the ops need
MODELS_NEED = ("safetensors", "tokenizers", "PIL")

Provider = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """One computation and those who can do it.

    Attributes:
        inputs: what gradients are taken of, beside the weights that `providers` hold.
        reference: the computation in plain torch, on inputs and weights of any dtype.
        providers: those who do it, by name; of all torch.compile is "compile" and we are "vlmkern".
        flops: of the mathematics at D = 72, whatever a provider pads or leaves out.
        backward_flops: how many times as many its gradients take, without what is computed again.
        least_bytes: inputs, weights and result once.
        weights: what gradients are taken of in every provider.
        modules: what holds further weights.
        forward_only: providers that are not asked for gradients.
    """

    inputs: list[Tensor]
    reference: Provider
    providers: dict[str, Provider]
    flops: float
    least_bytes: float
    weights: list[Tensor] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    backward_flops: float = 2
    forward_only: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Entry:
    """A case that can be made, so that one's memory is free before the next."""

    name: str
    make: Callable[[], Case]
    modes: tuple[str, ...] = ("fwd", "bwd")
    compiled: bool = True

    @property
    def units(self) -> dict[str, str]:
        """Names of what is timed together, and their modes."""
        return {f"{self.name} {mode}": mode for mode in self.modes}


def op_entries(dtype: torch.dtype = torch.bfloat16) -> list[Entry]:
    """Those of single ops, by their worth."""
    rows = CROPS * TOKENS
    attentions = [(CROPS, TOKENS, 72), (1, TOKENS, 72), (CROPS, _size(1025, 33), 64), (1, _size(3996, 40), 80)]
    pools = [(HEADS, 72, 72), (1, WIDTH, 2 * WIDTH)]
    linears = [(WIDTH, HIDDEN, "gelu_tanh"), (HIDDEN, WIDTH, "none")]
    # a decoder's 1024 tokens of an image and 720 of text, with the heads of Qwen3 and of Gemma 2, and Qwen2-VL's tower
    prefills = [(16, 8, 128, 0.0), (8, 4, 256, 50.0)]
    prompt, images, patches = _size(1744, 40), _size(4, 2), _size(999, 20)
    return [
        *(Entry(f"attention {n}x{t}x{HEADS}x{d}", partial(attention, n, t, d, dtype)) for n, t, d in attentions),
        *(
            Entry(
                f"attention causal {prompt}x{h}/{k}x{d}" + (f", cap {c:g}" if c else ""),
                partial(causal_attention, prompt, h, k, d, c, dtype),
            )
            for h, k, d, c in prefills
        ),
        Entry(
            f"attention packed {images}x{patches}x{HEADS}x80, rotary",
            partial(rotary_attention, images, patches, 80, dtype),
        ),
        *(
            Entry(
                f"attention_pool {WINDOWS} windows, {heads}x{k}, {heads}x{v}",
                partial(attention_pool, heads, k, v, dtype),
            )
            for heads, k, v in pools
        ),
        *(
            Entry(f"swiglu_mlp {count}x{WIDTH}-{_size(6144, 40)}-{OUT}", partial(swiglu_mlp, count, dtype))
            for count in (WINDOWS, _size(196, 9))
        ),
        *(
            Entry(f"linear {rows}x{c}-{e}, {a}{' + residual' * (a == 'none')}", partial(linear, c, e, a, dtype))
            for c, e, a in linears
        ),
        Entry(f"add_layer_norm {rows}x{WIDTH}", partial(add_layer_norm, dtype)),
        Entry(f"rms_norm {rows}x{OUT}", partial(rms_norm, dtype)),
        Entry(f"rms_norm of q, {rows}x{HEADS}x{_size(128, 8)}", partial(rms_norm_of_heads, _size(128, 8), dtype)),
        Entry(
            f"rms_norm and rotary of q, {rows}x{HEADS}x{_size(128, 8)}",
            partial(rms_norm_and_rotary, _size(128, 8), dtype),
        ),
    ]


def block_entries(dtype: torch.dtype = torch.bfloat16) -> list[Entry]:
    """Those of parts of the model, if what it needs is there; torch.compile takes minutes over the whole tower."""
    if not all(_is_there(module) for module in MODELS_NEED):
        return []
    few, whole = (4, (3, 1)), (_size(27, 4), (-4, _size(-10, -3)))
    return [
        Entry(f"siglip block, {CROPS} crops", partial(block, dtype), ("fwd",)),
        Entry(f"vision path, {CROPS} crops, 4 blocks", partial(vision_path, *few, dtype), ("fwd",)),
        Entry(
            f"vision path, {CROPS} crops, whole tower", partial(vision_path, *whole, dtype), ("fwd",), compiled=False
        ),
    ]


def attention(images: int, tokens: int, head_dim: int, dtype: torch.dtype) -> Case:
    """On views of one fused projection."""
    qkv = torch.randn(images, tokens, 3, HEADS, head_dim, dtype=dtype, device=DEVICE.name)
    heads = images * HEADS

    def eager(qkv: Tensor) -> Tensor:
        return eager_attention(*qkv.unbind(2))

    def sdpa(*backends: SDPBackend) -> Provider:
        def call(qkv: Tensor) -> Tensor:
            with sdpa_kernel(list(backends)):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2)

        return call

    return Case(
        [qkv],
        eager,
        {
            "eager": eager,
            "compile": compiled(eager),
            "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "sdpa_efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
            **_attention_libraries(head_dim),
            "vlmkern": lambda qkv: ops.attention(*qkv.unbind(2)),
        },
        flops=4 * heads * tokens**2 * head_dim,
        least_bytes=4 * heads * tokens * head_dim * dtype.itemsize,
        backward_flops=2.5,
        # its dQ is wrong at head dimensions that are no power of two, by its own issue tracker
        forward_only=frozenset({"flash_attn_4"}),
    )


def causal_attention(tokens: int, heads: int, heads_k: int, head_dim: int, softcap: float, dtype: torch.dtype) -> Case:
    """A decoder's: FLOPs of the half of the scores that there are."""
    q = torch.randn(1, tokens, heads, head_dim, dtype=dtype, device=DEVICE.name)
    k, v = torch.randn(2, 1, tokens, heads_k, head_dim, dtype=dtype, device=DEVICE.name).unbind(0)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (
            x.transpose(1, 2) for x in (q, *(x.repeat_interleave(heads // heads_k, 2) for x in (k, v)))
        )
        scores = query @ key.mT * head_dim**-0.5
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        behind = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        return (scores.masked_fill(behind, -torch.inf).softmax(-1) @ value).transpose(1, 2)

    def sdpa(backend: SDPBackend) -> Provider:
        def call(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                heads_first = (x.transpose(1, 2) for x in qkv)
                return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

        return call

    libraries = {"sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    return Case(
        [q, k, v],
        eager,
        {
            "eager": eager,
            "compile": compiled(eager),
            # which have no cap
            **({} if softcap else libraries),
            "vlmkern": lambda *qkv: ops.attention(*qkv, causal=True, softcap=softcap),
        },
        flops=2 * heads * tokens * (tokens + 1) * head_dim,
        least_bytes=2 * (heads + heads_k) * tokens * head_dim * dtype.itemsize,
        backward_flops=2.5,
    )


def rotary_attention(images: int, patches: int, head_dim: int, dtype: torch.dtype) -> Case:
    """A tower's of images packed one after the other, with its rotation of queries and keys."""
    tokens = images * patches
    qkv = torch.randn(tokens, 3, HEADS, head_dim, dtype=dtype, device=DEVICE.name)
    angles = 6 * torch.rand(tokens, head_dim // 2, device=DEVICE.name)
    cos, sin = angles.cos(), angles.sin()
    bounds = torch.arange(images + 1, dtype=torch.int32, device=DEVICE.name) * patches

    def turned(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.chunk(2, -1)
        whole = [table.repeat(1, 2)[:, None] for table in (cos, sin)]
        return (wide * whole[0] + torch.cat((-second, first), -1) * whole[1]).to(x.dtype)

    def by_image(attend: Provider) -> Provider:
        def call(qkv: Tensor) -> Tensor:
            q, k, v = qkv.unbind(1)
            rows = (x.unflatten(0, (images, patches)) for x in (turned(q), turned(k), v))
            return attend(*rows).flatten(0, 1)

        return call

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def ours(qkv: Tensor) -> Tensor:
        return ops.attention(*qkv.unbind(1), cu_seqlens=bounds, max_seqlen=patches, rotary=(cos, sin))

    eager = by_image(eager_attention)
    return Case(
        [qkv],
        eager,
        {"eager": eager, "compile": compiled(eager), "sdpa": by_image(sdpa), "vlmkern": ours},
        flops=4 * HEADS * images * patches**2 * head_dim,
        least_bytes=4 * HEADS * tokens * head_dim * dtype.itemsize + 2 * cos.numel() * 4,
        backward_flops=2.5,
    )


def _attention_libraries(head_dim: int) -> dict[str, Provider]:
    """Attention of packages that may be installed. Each takes [B, N, H, D]; some give the log-sum-exp as well."""

    def flash(module: str) -> Provider:
        def call(qkv: Tensor) -> Tensor:
            out = importlib.import_module(module).flash_attn_func(*qkv.unbind(2))
            return out[0] if isinstance(out, tuple) else out

        return call

    def transformer_engine() -> Provider:
        made: list[nn.Module] = []

        def call(qkv: Tensor) -> Tensor:
            if not made:
                engine = importlib.import_module("transformer_engine.pytorch")
                settings = {"attention_dropout": 0.0, "qkv_format": "bshd", "attn_mask_type": "no_mask"}
                made.append(engine.DotProductAttention(HEADS, head_dim, **settings))
            # it wants them apart, each dense
            out = made[0](*(x.contiguous() for x in qkv.unbind(2)))
            return out.unflatten(-1, (HEADS, head_dim))

        return call

    found = {
        "flash_attn_2": ("flash_attn_2_cuda", flash("flash_attn")),
        "flash_attn_3": ("flash_attn_interface", flash("flash_attn_interface")),
        "flash_attn_4": ("flash_attn.cute", flash("flash_attn.cute")),
        "transformer_engine": ("transformer_engine", transformer_engine()),
    }
    return {name: provider for name, (module, provider) in found.items() if _is_there(module)}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        # of a part of a package, without the package
        return False


def attention_pool(heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> Case:
    """Of two hidden states; the formula's count, keys and values of every slot."""
    features = list(torch.randn(2, CROPS, TOKENS, WIDTH, dtype=dtype, device=DEVICE.name).unbind(0))
    module = EagerPool(heads, key_dim, value_dim, WIDTH, GRID).to(DEVICE.name, dtype)
    weights = [module.q.weight, module.kv.weight, module.out.weight]

    def eager(*features: Tensor) -> Tensor:
        return module(features)

    def ours(*features: Tensor) -> Tensor:
        q, kv, out = weights
        return ops.attention_pool(features, q, None, kv, None, out, None, grid=GRID, num_heads=heads)

    sizes = [weight.numel() for weight in weights]
    return Case(
        features,
        eager,
        {"eager": eager, "compile": compiled(eager), "vlmkern": ours},
        flops=2 * WINDOWS * (sizes[0] + 4 * sizes[1] + sizes[2]),
        least_bytes=(2 * features[0].numel() + sum(sizes) + WINDOWS * WIDTH) * dtype.itemsize,
        weights=weights,
    )


def swiglu_mlp(rows: int, dtype: torch.dtype) -> Case:
    """The connector's projector."""
    x = torch.randn(rows, WIDTH, dtype=dtype, device=DEVICE.name)
    module = EagerMLP(WIDTH, _size(6144, 40), OUT).to(DEVICE.name, dtype)
    weights = [module.up.weight, module.down.weight]
    return Case(
        [x],
        module,
        {"eager": module, "compile": compiled(module), "vlmkern": lambda x: ops.swiglu_mlp(x, *weights)},
        flops=2 * rows * sum(weight.numel() for weight in weights),
        least_bytes=(x.numel() + sum(weight.numel() for weight in weights) + rows * OUT) * dtype.itemsize,
        weights=weights,
    )


def linear(inputs: int, outputs: int, activation: str, dtype: torch.dtype) -> Case:
    """A tower block's projections: into the MLP with its activation, or, with none, out of it onto the residual."""
    rows, residual = CROPS * TOKENS, activation == "none"
    weight = torch.randn(outputs, inputs, device=DEVICE.name) * inputs**-0.5
    bias = torch.randn(outputs, device=DEVICE.name)
    weights = [weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]
    tensors = [torch.randn(rows, inputs, dtype=dtype, device=DEVICE.name)]
    if residual:
        tensors.append(torch.randn(rows, outputs, dtype=dtype, device=DEVICE.name))

    def eager(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = F.linear(x, *weights)
        y = F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y
        return y if added is None else y + added

    def ours(x: Tensor, added: Tensor | None = None) -> Tensor:
        return ops.linear(x, *weights, activation=activation, residual=added)

    least = sum(x.numel() for x in tensors) + weight.numel() + rows * outputs
    return Case(
        tensors,
        eager,
        {"eager": eager, "compile": compiled(eager), "vlmkern": ours},
        flops=2 * rows * weight.numel(),
        least_bytes=least * dtype.itemsize,
        weights=weights,
    )


def add_layer_norm(dtype: torch.dtype) -> Case:
    """Between a tower block's halves: residual and norm."""
    rows = CROPS * TOKENS
    tensors = [torch.randn(rows, WIDTH, dtype=dtype, device=DEVICE.name) for _ in range(2)]
    weights = [torch.randn(WIDTH, dtype=dtype, device=DEVICE.name).requires_grad_() for _ in range(2)]

    def eager(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (WIDTH,), *weights, 1e-6), total

    def ours(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(x, residual, *weights, eps=1e-6)

    return Case(
        tensors,
        eager,
        {"eager": eager, "compile": compiled(eager), "vlmkern": ours},
        flops=8 * rows * WIDTH,
        least_bytes=4 * rows * WIDTH * dtype.itemsize,
        weights=weights,
    )


def rms_norm(dtype: torch.dtype) -> Case:
    """Between a decoder block's halves: residual and norm."""
    rows = CROPS * TOKENS
    tensors = [torch.randn(rows, OUT, dtype=dtype, device=DEVICE.name) for _ in range(2)]
    weight = torch.randn(OUT, dtype=dtype, device=DEVICE.name).requires_grad_()

    def eager(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (OUT,), weight, 1e-6), total

    def ours(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, weight, residual=residual)

    return _rms_norm_case(tensors, weight, eager, ours, 4)


def rms_norm_of_heads(head_dim: int, dtype: torch.dtype) -> Case:
    """Of the queries of a decoder, a view of one fused projection."""
    qkv = torch.randn(CROPS, TOKENS, 3, HEADS, head_dim, dtype=dtype, device=DEVICE.name)
    weight = torch.randn(head_dim, dtype=dtype, device=DEVICE.name).requires_grad_()

    def eager(q: Tensor) -> Tensor:
        return F.rms_norm(q, (head_dim,), weight, 1e-6)

    def ours(q: Tensor) -> Tensor:
        return ops.rms_norm(q, weight)

    return _rms_norm_case([qkv[:, :, 0]], weight, eager, ours, 2)


def rms_norm_and_rotary(head_dim: int, dtype: torch.dtype) -> Case:
    """The same, turned by angles of the tokens."""
    qkv = torch.randn(CROPS, TOKENS, 3, HEADS, head_dim, dtype=dtype, device=DEVICE.name)
    weight = torch.randn(head_dim, dtype=dtype, device=DEVICE.name).requires_grad_()
    angles = 6 * torch.rand(TOKENS, head_dim // 2, device=DEVICE.name)
    tables = angles.cos(), angles.sin()
    cos, sin = (t.repeat(1, 2)[:, None] for t in tables)

    def eager(q: Tensor) -> Tensor:
        normed = F.rms_norm(q, (head_dim,), weight, 1e-6)
        first, second = normed.chunk(2, -1)
        return (normed * cos + torch.cat((-second, first), -1) * sin).to(q.dtype)

    def ours(q: Tensor) -> Tensor:
        return ops.rms_norm(q, weight, rotary=tables)

    return _rms_norm_case([qkv[:, :, 0]], weight, eager, ours, 2)


def _rms_norm_case(
    tensors: list[Tensor], weight: Tensor, eager: Callable[..., Any], ours: Callable[..., Any], moved: int
) -> Case:
    """Of which as many tensors as `moved`, of the first one's size, are read or written."""
    x = tensors[0]
    return Case(
        tensors,
        eager,
        {"eager": eager, "compile": compiled(eager), "vlmkern": ours},
        flops=6 * x.numel(),
        least_bytes=moved * x.numel() * x.element_size(),
        weights=[weight],
    )


def block(dtype: torch.dtype) -> Case:
    """One block of the tower, against transformers' own layer."""
    from vlmkern.models.jina_vlm.vision import VisionBlock

    config = _vision_config()
    with torch.device(DEVICE.name):
        ours = VisionBlock(config)
        theirs = _theirs(lambda: importlib.import_module("bench_siglip_block").Transformers(ours, config))
    x = torch.randn(CROPS, TOKENS, WIDTH, dtype=dtype, device=DEVICE.name)
    return _of_modules(
        [x],
        ours,
        theirs,
        ours,
        dtype,
        flops=_block_flops(),
        least_bytes=(2 * x.numel() + sum(p.numel() for p in ours.parameters())) * dtype.itemsize,
    )


def vision_path(layers: int, features: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Crops to projected rows through a tower and the connector, the same work in all providers."""
    from bench_vision_path import EagerPath, make_vision

    from vlmkern.models.jina_vlm.config import ConnectorConfig, JinaVLMConfig, TextConfig
    from vlmkern.models.jina_vlm.vision import run_tower

    config = JinaVLMConfig(
        vision=_vision_config(num_layers=layers, feature_layers=features),
        connector=ConnectorConfig(num_heads=HEADS, mlp_size=_size(6144, 40), output_size=OUT),
        text=TextConfig(hidden_size=OUT),
    )
    with torch.device(DEVICE.name):
        vision = make_vision(config)
        theirs = _theirs(lambda: EagerPath(vision))
    crops = torch.rand(CROPS, TOKENS, config.vision.patch_dim, device=DEVICE.name).to(dtype) * 2 - 1

    def ours(crops: Tensor) -> Tensor:
        return vision.vl_connector(run_tower(vision, crops), torch.ones(crops.shape[:2], device=DEVICE.name), None)

    return _of_modules(
        [crops],
        vision,
        theirs,
        ours,
        dtype,
        flops=(max(config.vision.feature_slots) + 1) * _block_flops(),
        least_bytes=(crops.numel() + sum(p.numel() for p in vision.parameters())) * dtype.itemsize,
    )


def _theirs(make: Callable[[], nn.Module]) -> nn.Module | None:
    """transformers' modules on our weights, where it is installed."""
    return make() if _is_there("transformers") else None


def _of_modules(
    inputs: list[Tensor],
    module: nn.Module,
    theirs: nn.Module | None,
    ours: Provider,
    dtype: torch.dtype,
    *,
    flops: float,
    least_bytes: float,
) -> Case:
    """A case whose reference is `ours` on plain torch."""

    def reference(*inputs: Tensor) -> Tensor:
        with vlmkern.use_backend("reference"):
            return ours(*inputs)

    modules = [m.to(DEVICE.name, dtype).requires_grad_(False) for m in (module, theirs) if m is not None]
    providers: dict[str, Provider] = {"vlmkern": ours}
    if theirs is not None:
        providers = {"transformers": theirs, "compile": compiled(theirs), **providers}
    return Case(inputs, reference, providers, flops, least_bytes, modules=modules)


def _vision_config(**changes: Any) -> Any:
    from vlmkern.models.jina_vlm.config import VisionConfig

    return VisionConfig(
        hidden_size=WIDTH, num_heads=HEADS, mlp_size=HIDDEN, image_size=(GRID[0] * 14, GRID[1] * 14), **changes
    )


def _block_flops() -> float:
    tokens = CROPS * TOKENS
    return 2 * tokens * WIDTH * (4 * WIDTH + 2 * HIDDEN) + 4 * tokens * TOKENS * WIDTH


def compiled(function: Callable[..., Any] | nn.Module) -> Provider:
    """torch.compile at its best, free of what earlier baselines left behind; compiled when first called."""
    made: list[Provider] = []

    def call(*args: Tensor) -> Tensor:
        if not made:
            torch._dynamo.reset()
            made.append(torch.compile(function, **DEVICE.compile_options))
        return made[0](*args)

    return call
