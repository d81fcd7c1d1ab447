"""Modules with the names, signatures and returns that jina-vlm's own code has, and its maths in plain torch: what
`patch` meets when the model is loaded through transformers with remote code."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, size, heads, head_dim, *, output=None, causal=False, self_attn=True):
        super().__init__()
        self.n_heads = self.n_kv_heads = heads
        self.head_dim, self.scale, self.is_causal, self.self_attn = head_dim, head_dim**-0.5, causal, self_attn
        self.clip_qkv, self.sliding_window = None, -1
        inner = heads * head_dim
        if self_attn:
            self.qkv_w = nn.Linear(size, 3 * inner, bias=False)
        else:
            self.q_w, self.kv_w = nn.Linear(size, inner, bias=False), nn.Linear(size, 2 * inner, bias=False)
        self.out = nn.Linear(inner, output or size)
        self.q_b, self.k_b, self.v_b = (nn.Parameter(torch.randn(inner) * 0.1) for _ in range(3))
        self.q_lnorm, self.k_lnorm, self.inner_lnorm = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, xq, xk=None, rope_embeddings=None, attention_mask=None, attn_implementation=None, **kwargs):
        if self.self_attn:
            q, k, v = F.linear(xq, self.qkv_w.weight, torch.cat([self.q_b, self.k_b, self.v_b])).chunk(3, dim=-1)
        else:
            q = F.linear(xq, self.q_w.weight, self.q_b)
            k, v = F.linear(xk, self.kv_w.weight, torch.cat([self.k_b, self.v_b])).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class FFN(nn.Module):
    def __init__(self, size, hidden, *, output=None, gated=False):
        super().__init__()
        self.gated = gated
        self.act = nn.SiLU() if gated else nn.GELU(approximate="tanh")
        self.up = nn.Linear(size, hidden * (2 if gated else 1), bias=not gated)
        self.down = nn.Linear(hidden, output or size, bias=not gated)
        self.inner_lnorm = nn.Identity()

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            value, gate = x.chunk(2, dim=-1)
            return self.down(self.act(gate) * value)
        return self.down(self.act(x))


class TransformerBlock(nn.Module):
    def __init__(self, size, heads, head_dim, hidden):
        super().__init__()
        self.attn_lnorm, self.ffn_lnorm = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.attn, self.ffn = Attention(size, heads, head_dim), FFN(size, hidden)
        self.attn_drop, self.path_drop = nn.Dropout(0.0), nn.Identity()

    def forward(self, x, rope_embeddings=None, attention_mask=None, drop_mask=None, **kwargs):
        attended, weights = self.attn(self.attn_lnorm(x), attention_mask=attention_mask, **kwargs)
        x = x + self.attn_drop(attended)
        return x + self.ffn(self.ffn_lnorm(x)), weights


class VisionLanguageConnector(nn.Module):
    def __init__(self, size, heads, head_dim, pooled, hidden, output, grid):
        super().__init__()
        self.n_patches, self.pooling_h, self.pooling_w = grid, 2, 2
        self.pad_embed = nn.Parameter(torch.randn(2, size))
        self.pooling = Attention(size, heads, head_dim, output=pooled, self_attn=False)
        self.projector = FFN(pooled, hidden, output=output, gated=True)
        self.feature_dropout = nn.Dropout(0.0)

    def forward(self, image_features, image_masks=None, attn_implementation=None, **kwargs):
        batch, crops = image_features.shape[:2]
        partial = (image_masks < 1) & (image_masks != 0)
        x = image_features + self.pad_embed[0] * (image_masks == 0).unsqueeze(-1)
        x = self.feature_dropout(x + self.pad_embed[1] * partial.unsqueeze(-1))
        rows, columns = self.n_patches
        x = F.pad(x.unflatten(2, self.n_patches), (0, 0, 0, columns % 2, 0, rows % 2))
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4, 5).flatten(0, 3)
        pooled, _ = self.pooling(xq=x.mean(1, keepdim=True), xk=x)
        return self.projector(pooled.view(batch, crops, -1, pooled.shape[-1]))


class Vision(nn.Module):
    """Two blocks and the connector over embedded patches [B, T, N, C]."""

    def __init__(self, size=24, heads=2, head_dim=12, hidden=40, grid=(5, 3)):
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(size, heads, head_dim, hidden) for _ in range(2))
        self.vl_connector = VisionLanguageConnector(2 * size, heads, head_dim, size, 32, 16, grid)

    def forward(self, patches, masks):
        x, features = patches.flatten(0, 1), []
        for layer in self.layers:
            x, _ = layer(x, attn_implementation="eager")
            features.append(x)
        joined = torch.cat(features, dim=-1).unflatten(0, patches.shape[:2])
        return self.vl_connector(joined, masks, attn_implementation="eager")
