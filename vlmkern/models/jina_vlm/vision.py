"""The vision tower: SigLIP2-so400m/14 over flattened patches, up to the last block whose output is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import ops
from ...nn import TileAttention, VisionLanguageConnector, functional
from ...ops.attention_pool.windows import windows_per_tile
from .config import JinaVLMConfig, VisionConfig

# what batches fill missing crops with; a black tile looks the same after min-max normalisation
PAD_PIXEL = -1.0


class PatchEmbedding(nn.Module):
    """Linear embedding of patches flattened as row in patch, column in patch, channel."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return ops.linear(patches, self.proj.weight, self.proj.bias)


class VisionMLP(nn.Module):
    """down(gelu_tanh(up(x))) + residual."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size)
        self.down = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        up, down = (self.up.weight, self.up.bias), (self.down.weight, self.down.bias)
        return functional.mlp(x, up, down, "gelu_tanh", residual)


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn_lnorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = TileAttention(config.hidden_size, config.num_heads, config.head_dim)
        self.ffn_lnorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        return functional.pre_norm_block(
            x,
            self.attn_lnorm,
            lambda normed, residual: self.attn(normed, residual=residual),
            self.ffn_lnorm,
            self.ffn,
        )


class VisionModel(nn.Module):
    """Tower and connector, under the names they have in the checkpoint.

    All blocks and the final norm exist as parameters, so that a checkpoint loads and saves whole; those
    after the last feature that is used are never run (blocks 25, 26 and the norm as released).
    """

    def __init__(self, config: JinaVLMConfig) -> None:
        super().__init__()
        vision, connector = config.vision, config.connector
        self.config = vision
        self.patch_embed = PatchEmbedding(vision)
        self.pos_embed = nn.Parameter(torch.zeros(vision.num_patches, vision.hidden_size))
        self.layers = nn.ModuleList(VisionBlock(vision) for _ in range(vision.num_layers))
        self.post_lnorm = nn.LayerNorm(vision.hidden_size, eps=vision.norm_eps)
        self.vl_connector = VisionLanguageConnector(
            vision.hidden_size * len(vision.feature_layers),
            num_heads=connector.num_heads,
            head_dim=connector.head_dim,
            pooled_size=vision.hidden_size,
            mlp_size=connector.mlp_size,
            output_size=connector.output_size,
            grid=vision.grid,
            window=connector.window,
        )

    def forward(self, crops: Tensor) -> list[Tensor]:
        """crops [T, N, patch_dim] in [-1, 1] -> the hidden states named by `feature_layers`, each [T, N, C].

        Crops whose every value is -1 (batch padding, or black) give zeros.
        """
        x = self.patch_embed(crops.to(self.pos_embed.dtype)) + self.pos_embed
        slots = self.config.feature_slots
        outputs: dict[int, Tensor] = {}
        for index, block in enumerate(self.layers[: max(slots) + 1]):
            x = block(x)
            if index in slots:
                outputs[index] = x
        if self.config.num_layers in slots:
            outputs[self.config.num_layers] = self.post_lnorm(x)
        seen = (crops != PAD_PIXEL).flatten(1).any(1).view(-1, 1, 1)
        return [outputs[slot] * seen for slot in slots]


class VisionPath(nn.Module):
    """Tower and connector as one module whose work depends on shapes only: what to compile or to export.

    `encode_crops` leaves out work that a look at the pixels shows to be needless, which a compiled graph cannot.
    """

    def __init__(self, vision: VisionModel) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, crops: Tensor, image_masks: Tensor, keep: Tensor | None = None) -> Tensor:
        """crops [T, N, patch_dim], image_masks [T, N] -> [T, M, C], or [K, C] for the windows in `keep`, flat indices
        into T * M."""
        return self.vision.vl_connector(self.vision(crops), image_masks, keep)


def run_tower(vision: VisionModel, crops: Tensor) -> list[Tensor]:
    """`vision(crops)`, in inference on CPUs a few crops at a time: crops do not see each other, and the activations of
    one crop a thread stay in cache, where those of thirteen are written to fresh memory (float32, five crops: 8 % of
    the time)."""
    # each call of a block that FSDP shards is a collective, of which all ranks must run as many
    whole = torch.is_grad_enabled() or crops.device.type != "cpu" or any(hasattr(b, "unshard") for b in vision.layers)
    size = len(crops) if whole else torch.get_num_threads()
    parts = [vision(part) for part in crops.split(max(1, size))]
    return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def encode_crops(
    vision: VisionModel,
    crops: Tensor,
    image_masks: Tensor,
    keep: Tensor | None,
    tower: Callable[[VisionModel, Tensor], list[Tensor]] = run_tower,
) -> Tensor:
    """crops [T, N, patch_dim] and image_masks [T, N] -> rows for the decoder [K, C] of the windows in `keep` [K], flat
    indices into T * M in any order, or of all [T, M, C].

    The tower runs only on crops that are needed, and once for neighbours of the same pixels, as thumbnail and tile of
    a 1x1 tiling are; `tower(vision, crops)` says how.
    """
    count = crops.shape[0]
    pooling = vision.vl_connector.pooling
    windows = windows_per_tile(pooling.grid, pooling.window)
    needed = torch.arange(count, device=crops.device) if keep is None else torch.unique(keep // windows)
    source = _first_of_equal(crops)[needed]
    run = torch.unique(source)
    features = tower(vision, crops if len(run) == count else crops[run])
    if len(run) < len(needed):
        copies = torch.searchsorted(run, source)
        features = [feature[copies] for feature in features]
    if keep is not None and len(needed) < count:
        image_masks = image_masks[needed]
        keep = torch.searchsorted(needed, keep // windows) * windows + keep % windows
    return vision.vl_connector(features, image_masks, keep)


def _first_of_equal(crops: Tensor) -> Tensor:
    """For each crop, the index of the first in its run of neighbours with the same values."""
    index = torch.arange(len(crops), device=crops.device)
    if len(crops) < 2:
        return index
    same = (crops[1:] == crops[:-1]).flatten(1).all(1)
    return torch.cat([index[:1], index[1:].masked_fill(same, 0)]).cummax(0).values
