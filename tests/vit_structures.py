"""Transformers as timm and open_clip build them, by the names of their modules."""

from __future__ import annotations

import collections

import torch
import torch.nn.functional as F
from torch import nn


class LayerScale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = torch.empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class TimmAttention(nn.Module):
    def __init__(self, size, heads, norm):
        super().__init__()
        self.num_heads, self.head_dim = heads, size // heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(size, 3 * size)
        self.q_norm = nn.LayerNorm(self.head_dim) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.proj = nn.Linear(size, size)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        batch, tokens, size = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).reshape(batch, tokens, size))))


class TimmMLP(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(size, 2 * size), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(2 * size, size), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmBlock(nn.Module):
    def __init__(self, size=64, heads=4, norm=False, scale=True, drop_path=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(size), TimmAttention(size, heads, norm)
        self.ls1 = LayerScale(size) if scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(size), TimmMLP(size)
        self.ls2 = LayerScale(size) if scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class OpenClipBlock(nn.Module):
    def __init__(self, size=64, heads=4, scale=False, batch_first=True):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(size), nn.MultiheadAttention(size, heads, batch_first=batch_first)
        self.ls_1 = LayerScale(size) if scale else nn.Identity()
        self.ln_2 = nn.LayerNorm(size)
        layers = ("c_fc", nn.Linear(size, 4 * size)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * size, size))
        self.mlp = nn.Sequential(collections.OrderedDict(layers))
        self.ls_2 = LayerScale(size) if scale else nn.Identity()

    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        k_x, v_x = (q_x if x is None else x for x in (k_x, v_x))
        return self.attn(q_x, k_x, v_x, need_weights=False, attn_mask=attn_mask)[0]

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        x = q_x + self.ls_1(self.attention(self.ln_1(q_x), k_x, v_x, attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))
