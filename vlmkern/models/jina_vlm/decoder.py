"""The language model: Qwen3 with fused projections and a second embedding table for image tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...nn import SwiGLUMLP
from .cache import KVCache
from .config import TextConfig


class RMSNorm(nn.Module):
    """x / rms(x) times the weight, in float32, rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class ExtendedEmbedding(nn.Module):
    """Two tables read as one: ids from `vocab_size` on index the second."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.new_embedding = nn.Parameter(torch.zeros(config.additional_vocab_size, config.hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden_size]. Two look-ups, because joining the tables would copy 600 MB."""
        base = self.embedding.shape[0]
        is_new = (ids >= base).unsqueeze(-1)
        return torch.where(
            is_new,
            F.embedding((ids - base).clamp(min=0), self.new_embedding),
            F.embedding(ids.clamp(max=base - 1), self.embedding),
        )


def token_positions(mask: Tensor, real_before: Tensor | int = 0) -> Tensor:
    """Positions [B, S] of the tokens of `mask` [B, S]: real tokens are counted, padding at the start has position 0."""
    return (mask.cumsum(1) - 1 + (real_before if isinstance(real_before, int) else real_before.unsqueeze(1))).clamp(
        min=0
    )


def rotary_tables(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, 1, head_dim] of positions [B, S], computed in float32 (or `dtype`, if wider)."""
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=positions.device) / config.head_dim
    angles = positions[:, :, None, None].to(dtype) * config.rope_theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (j, j + head_dim / 2) of x [B, S, H, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


Real = list[tuple[slice | Tensor, slice | Tensor]]
"""For each sequence the rows of its real tokens among the newest, and among all."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, real: Real | None) -> Tensor:
    """Causal grouped-query attention of q [B, S, H, D], the newest tokens, over k and v [B, K, H_kv, D], all of them.
    With `real`, other tokens take part in nothing and get 0."""
    if real is None:
        return ops.attention(q, k, v, causal=True)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, (rows, all_rows) in enumerate(real):
        out[b, rows] = ops.attention(q[b : b + 1, rows], k[b : b + 1, all_rows], v[b : b + 1, all_rows], causal=True)[0]
    return out


def real_tokens(mask: Tensor, tokens: int) -> Real:
    """Of a mask [B, K] over all tokens, whose last S = `tokens` are the newest. Padding at the start alone, as batches
    have it, leaves views; holes do not."""
    rows: Real = []
    for row, count in zip(mask, mask.sum(1).tolist(), strict=True):
        length = len(row)
        if bool(row[length - count :].all()):
            rows.append((slice(max(0, tokens - count), tokens), slice(length - count, length)))
        else:
            rows.append((row[length - tokens :].nonzero()[:, 0], row.nonzero()[:, 0]))
    return rows


class DecoderAttention(nn.Module):
    """Causal grouped-query attention with per-head RMSNorm of q and k before the rotation."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.sizes = (q_size, kv_size, kv_size)
        self.qkv_w = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.q_b = nn.Parameter(torch.zeros(q_size))
        self.k_b = nn.Parameter(torch.zeros(kv_size))
        self.v_b = nn.Parameter(torch.zeros(kv_size))
        self.q_lnorm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_lnorm = RMSNorm(config.head_dim, config.norm_eps)
        self.out = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        real: Real | None,
        cache: KVCache | None,
        residual: Tensor,
    ) -> Tensor:
        """x [B, S, C] -> attention's output added to `residual` [B, S, C]."""
        qkv = ops.linear(x, self.qkv_w.weight, torch.cat([self.q_b, self.k_b, self.v_b]))
        q, k, v = (t.unflatten(-1, (-1, self.config.head_dim)) for t in qkv.split(self.sizes, dim=-1))
        q, k = apply_rotary(self.q_lnorm(q), *rotary), apply_rotary(self.k_lnorm(k), *rotary)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        attended = causal_attention(q, k, v, real)
        return ops.linear(attended.flatten(2), self.out.weight, residual=residual)


class DecoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.attn_lnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = DecoderAttention(config, layer)
        self.ffn_lnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLUMLP(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], real: Real | None, cache: KVCache | None) -> Tensor:
        x = self.attn(self.attn_lnorm(x), rotary, real, cache, residual=x)
        return x + self.ffn(self.ffn_lnorm(x))


class Decoder(nn.Module):
    """Embeddings in, final hidden states out; the head belongs to the model."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = ExtendedEmbedding(config)
        self.layers = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.num_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, embeds: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """embeds [B, S, C] and mask [B, S] (true where real; None if all are) -> [B, S, C]. With a cache, the tokens
        follow those in it. Positions count real tokens; padding takes part in nothing."""
        batch, tokens = embeds.shape[:2]
        if mask is not None and bool(mask.all()):
            mask = None
        key_mask, before = mask, 0
        if cache is not None:
            before = cache.real_tokens if cache.mask is not None else cache.length
            cache.begin(batch, tokens, mask)
            key_mask = cache.mask
        if mask is None:
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=embeds.device)
        positions = token_positions(mask, before)
        real = None if key_mask is None else real_tokens(key_mask, tokens)
        rotary = rotary_tables(positions, self.config, embeds.dtype)
        x = embeds
        for block in self.layers:
            x = block(x, rotary, real, cache)
        return self.ln_f(x)


class LanguageHead(nn.Linear):
    """Hidden states to logits over the base vocabulary."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)
