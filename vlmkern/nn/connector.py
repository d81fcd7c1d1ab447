"""The vision-language connector: attention pooling of two hidden states, then a SwiGLU projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention_pool import AttentionPool
from .swiglu_mlp import SwiGLUMLP


class VisionLanguageConnector(nn.Module):
    """Hidden states of a vision tower to rows of a language model's embedding space (jina-vlm, eq. 2-4).

    Args:
        feature_size: L*C, width of the concatenated hidden states.
        num_heads, head_dim: of the pooling.
        pooled_size: width between pooling and projector.
        mlp_size: F of the projector.
        output_size: width of the language model.
        grid: patch rows and columns.
        window: slot rows and columns of a window.

    Parameters: `pad_embed` [2, L*C], those of `pooling` (`AttentionPool`) and of `projector` (`SwiGLUMLP`).
    """

    def __init__(
        self,
        feature_size: int,
        *,
        num_heads: int,
        head_dim: int,
        pooled_size: int,
        mlp_size: int,
        output_size: int,
        grid: tuple[int, int],
        window: tuple[int, int] = (2, 2),
    ) -> None:
        super().__init__()
        self.pad_embed = nn.Parameter(torch.zeros(2, feature_size))
        self.pooling = AttentionPool(feature_size, num_heads, head_dim, pooled_size, grid=grid, window=window)
        self.projector = SwiGLUMLP(pooled_size, mlp_size, output_size)

    def forward(self, features: Sequence[Tensor], mask: Tensor, keep: Tensor | None = None) -> Tensor:
        """features L x [T, N, C], mask [T, N] -> [T, M, E], or [K, E] for the windows in `keep`.

        The mask says how much of each patch is picture: pad_embed[0] is added where it is 0, pad_embed[1]
        where it is below 1 and not 0.
        """
        return self.projector(self.pooling(features, self.pad_embed, mask, keep))
