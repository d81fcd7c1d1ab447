"""Attention pooling of concatenated hidden states over windows of a patch grid.

For each window of slots x_j (rows of the L hidden states, side by side: x_j in R^{L*C}):

    q = W_Q mean_j(x_j) + b_Q,  k_j = W_K x_j + b_K,  v_j = W_V x_j + b_V
    o = W_O concat_h( softmax_j(q_h . k_jh * Dk^-0.5) v_jh ) + b_O

jina-vlm, eq. 2-3 (one head, no biases, W_V of 2d x 2d); the released model has 16 heads of 72 with biases.
Grids that are no multiple of the window are padded at the bottom and right with zero slots, which count in
the mean and are attended to. Products have the tensors' dtype, scores and softmax are float32 (float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import AttentionPool, AttentionPoolGradient


def attention_pool(p: AttentionPool) -> Tensor:
    """L features [T, N, C] -> [T, M, Co] for all M windows of the grid, or [K, Co] for those in `keep`."""
    x = _chosen(_windows(_padded(p.features, p.pad_embed, p.mask), p.grid, p.window), p.keep)
    out = F.linear(_attend(x, p.w_q, p.b_q, p.w_kv, p.b_kv, p.num_heads).context, p.w_o, p.b_o)
    return out if p.keep is not None else out.unflatten(0, (len(p.features[0]), _count(p.grid, p.window)))


def attention_pool_bwd(p: AttentionPoolGradient) -> list[Tensor]:
    """Gradients by (*features, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed), those that are wanted, in this order.
    Everything is recomputed from the inputs."""
    grad, features, w_q, b_q, w_kv, b_kv, w_o, grid, num_heads, window, pad_embed, mask, keep, wanted = p
    patches = _padded(features, pad_embed, mask)
    slots = _windows(patches, grid, window)
    x = _chosen(slots, keep)
    count, size, width = x.shape
    a = _attend(x, w_q, b_q, w_kv, b_kv, num_heads)

    d_out = grad.reshape(count, len(w_o))
    d_context = (d_out @ w_o).unflatten(-1, (num_heads, -1)).unsqueeze(1).to(a.p.dtype)
    d_v = a.p.unsqueeze(-1) * d_context
    d_p = (d_context * a.v).sum(-1)
    d_scores = a.p * (d_p - (a.p * d_p).sum(1, keepdim=True)) * a.scale
    d_k = d_scores.unsqueeze(-1) * a.q
    d_q = (d_scores.unsqueeze(-1) * a.k).sum(1).flatten(1).to(x.dtype)
    d_kv = torch.cat([d_k.flatten(2), d_v.flatten(2)], dim=-1).to(x.dtype).flatten(0, 1)
    # the mean gives every slot of a window the same share of the query's gradient
    d_x = (d_kv @ w_kv).view(count, size, width) + (d_q @ w_q / size).unsqueeze(1)

    if keep is not None:
        d_x = torch.zeros_like(slots).index_add_(0, keep.clamp(0, max(len(slots) - 1, 0)), d_x)
    d_patches = _patches(d_x, grid, window, len(features[0]))
    every = [d.contiguous() for d in d_patches.unflatten(-1, (len(features), features[0].shape[2])).unbind(-2)]
    every += [
        d_q.mT @ x.mean(1),
        d_q.sum(0),
        d_kv.mT @ x.flatten(0, 1),
        d_kv.sum(0),
        d_out.mT @ a.context,
        d_out.sum(0),
    ]
    if mask is not None:
        zero, partial = _pad_rows(mask)
        every.append(torch.stack([d_patches[zero].sum(0), d_patches[partial].sum(0)]))
    return [gradient for gradient, want in zip(every, wanted, strict=False) if want]


class _Attended(NamedTuple):
    q: Tensor  # [W, 1, H, Dk]
    k: Tensor  # [W, J, H, Dk]
    v: Tensor  # [W, J, H, Dv]
    p: Tensor  # [W, J, H]
    scale: float
    context: Tensor  # [W, H * Dv]


def _attend(x: Tensor, w_q: Tensor, b_q: Tensor | None, w_kv: Tensor, b_kv: Tensor | None, num_heads: int) -> _Attended:
    accumulator = torch.promote_types(x.dtype, torch.float32)
    kv = F.linear(x, w_kv, b_kv)
    q = F.linear(x.mean(1), w_q, b_q).unflatten(-1, (num_heads, -1)).unsqueeze(1).to(accumulator)
    k, v = (
        t.unflatten(-1, (num_heads, -1)).to(accumulator) for t in kv.split([len(w_q), len(w_kv) - len(w_q)], dim=-1)
    )
    scale = q.shape[-1] ** -0.5
    p = ((q * k).sum(-1) * scale).softmax(1)
    context = (p.unsqueeze(-1) * v).sum(1).flatten(1).to(x.dtype)
    return _Attended(q, k, v, p, scale, context)


def _padded(features: list[Tensor], pad_embed: Tensor | None, mask: Tensor | None) -> Tensor:
    """The hidden states side by side with the embeddings of padding added, [T, N, L*C]."""
    x = torch.cat(features, dim=-1)
    if mask is None:
        return x
    for row, chosen in zip(pad_embed, _pad_rows(mask), strict=True):
        x = torch.where(chosen.unsqueeze(-1), x + row, x)
    return x


def _pad_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask == 0, (mask < 1) & (mask != 0)


def _windows(x: Tensor, grid: list[int], window: list[int]) -> Tensor:
    """[T, N, L*C] -> slots [T * M, J, L*C] of all windows, with zeros beyond the grid."""
    (rows, cols), (height, width) = grid, window
    x = x.unflatten(1, (rows, cols))
    x = F.pad(x, (0, 0, 0, -cols % width, 0, -rows % height))
    x = x.unflatten(2, (-1, width)).unflatten(1, (-1, height))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _patches(slots: Tensor, grid: list[int], window: list[int], tiles: int) -> Tensor:
    """The way back: slots [T * M, J, L*C] -> [T, N, L*C], without those beyond the grid."""
    (rows, cols), (height, width) = grid, window
    x = slots.unflatten(0, (tiles, -(-rows // height), -(-cols // width))).unflatten(3, (height, width))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :rows, :cols].flatten(1, 2)


def _chosen(windows: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return windows
    # unchecked indices (on GPUs) must not reach outside, and without a window there is nothing but zeros to give
    if len(windows) == 0:
        return windows.new_zeros(len(keep), *windows.shape[1:])
    return windows[keep.clamp(0, len(windows) - 1)]


def _count(grid: list[int], window: list[int]) -> int:
    return -(-grid[0] // window[0]) * -(-grid[1] // window[1])
