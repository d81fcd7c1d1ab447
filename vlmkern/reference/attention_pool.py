"""Attention pooling of concatenated hidden states over windows of a patch grid.

For each window of slots x_j (rows of the L hidden states, side by side: x_j in R^{L*C}):

    q = W_Q mean_j(x_j) + b_Q,  k_j = W_K x_j + b_K,  v_j = W_V x_j + b_V
    o = W_O concat_h( softmax_j(q_h . k_jh * Dk^-0.5) v_jh ) + b_O

jina-vlm, eq. 2-3 (one head, no biases, W_V of 2d x 2d); the released model has 16 heads of 72 with biases.
Grids that are no multiple of the window are padded at the bottom and right with zero slots, which count in
the mean and are attended to. Products have the tensors' dtype, scores and softmax are float32 (float64).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_pool(
    features: list[Tensor],
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    grid: list[int],
    num_heads: int,
    window: list[int],
    pad_embed: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """L features [T, N, C] -> [T, M, Co] for all M windows of the grid, or [K, Co] for those in `keep`."""
    slots = _slots(features[0].shape[0], grid, window, keep, features[0].device)
    x = _gather(features, slots, pad_embed, mask)
    ctx = _attend(x, w_q, b_q, w_kv, b_kv, num_heads).context
    out = F.linear(ctx, w_o, b_o)
    return out if keep is not None else out.unflatten(0, (features[0].shape[0], windows_per_tile(grid, window)))


def attention_pool_bwd(
    grad: Tensor,
    features: list[Tensor],
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    grid: list[int],
    num_heads: int,
    window: list[int],
    pad_embed: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    wanted: list[bool],
    *,
    attend_bwd: Callable[..., tuple[Tensor, list[Tensor]]] | None = None,
) -> list[Tensor]:
    """Gradients by (*features, w_q, b_q, w_kv, b_kv, w_o, b_o, pad_embed), those that are wanted, in this
    order. Everything is recomputed from the inputs. Backends may have their own `attend_bwd`."""
    tiles, patches, channels = features[0].shape
    slots = _slots(tiles, grid, window, keep, grad.device)
    x = _gather(features, slots, pad_embed, mask)
    d_out = grad.reshape(len(x), grad.shape[-1])
    d_x, of_weights = (attend_bwd or _attend_bwd)(d_out, x, w_q, b_q, w_kv, b_kv, w_o, num_heads)

    # zero slots beyond the grid belong to no patch
    d_x = d_x.masked_fill_(~slots.inside.unsqueeze(-1), 0).flatten(0, 1)
    index = slots.patch.flatten()
    per_patch = d_x.new_zeros(tiles * patches, x.shape[-1]).index_put_((index,), d_x, accumulate=True)
    per_patch = per_patch.to(x.dtype)

    grads: list[Tensor] = list(per_patch.view(tiles, patches, x.shape[-1]).split(channels, dim=-1))
    grads += [*of_weights, d_out.sum(0)]
    if pad_embed is not None:
        assert mask is not None
        zero, partial = (chosen.flatten().to(x.dtype) for chosen in pad_rows(mask))
        grads.append(torch.stack([zero @ per_patch, partial @ per_patch]))
    return [g.contiguous() for g, want in zip(grads, wanted, strict=False) if want]


def _attend_bwd(
    d_out: Tensor,
    x: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    num_heads: int,
) -> tuple[Tensor, list[Tensor]]:
    """d_out [W, Co], slots x [W, J, L*C] -> gradients by x, which the caller may write to, and by
    (w_q, b_q, w_kv, b_kv, w_o)."""
    a = _attend(x, w_q, b_q, w_kv, b_kv, num_heads)
    windows, size, width = x.shape

    d_ctx = (d_out @ w_o).unflatten(-1, (num_heads, -1)).unsqueeze(1).to(a.p.dtype)
    d_v = a.p.unsqueeze(-1) * d_ctx
    d_p = (d_ctx * a.v).sum(-1)
    d_scores = a.p * (d_p - (a.p * d_p).sum(1, keepdim=True)) * a.scale
    d_k = d_scores.unsqueeze(-1) * a.q
    d_q = (d_scores.unsqueeze(-1) * a.k).sum(1).flatten(1).to(x.dtype)
    d_kv = torch.cat([d_k.flatten(2), d_v.flatten(2)], dim=-1).to(x.dtype).flatten(0, 1)

    # the mean gives every slot of a window the same share of the query's gradient
    d_x = (d_kv @ w_kv).view(windows, size, width) + (d_q @ w_q / size).unsqueeze(1)
    return d_x, [d_q.T @ x.mean(1), d_q.sum(0), d_kv.T @ x.flatten(0, 1), d_kv.sum(0), d_out.T @ a.context]


class _Slots(NamedTuple):
    patch: Tensor  # [W, J] index into the T * N patches of each window's slots; 0 where outside
    inside: Tensor  # [W, J] whether the slot lies on the grid


class _Attended(NamedTuple):
    q: Tensor  # [W, 1, H, Dk]
    k: Tensor  # [W, J, H, Dk]
    v: Tensor  # [W, J, H, Dv]
    p: Tensor  # [W, J, H]
    scale: float
    context: Tensor  # [W, H * Dv]


def _slots(tiles: int, grid: list[int], window: list[int], keep: Tensor | None, device: torch.device) -> _Slots:
    (rows, cols), (height, width) = grid, window
    windows_across = -(-cols // width)
    windows_down = windows_per_tile(grid, window) // windows_across
    count = tiles * windows_down * windows_across
    # unchecked indices (on GPUs) must not reach outside the tensors
    flat = torch.arange(count, device=device) if keep is None else keep.clamp(0, max(count - 1, 0))
    flat = flat.view(-1, 1)
    across, down = flat % windows_across, flat // windows_across % windows_down
    tile = flat // (windows_down * windows_across)
    slot = torch.arange(height * width, device=device)
    row, col = down * height + slot // width, across * width + slot % width
    inside = (row < rows) & (col < cols)
    return _Slots(torch.where(inside, (tile * rows + row) * cols + col, 0), inside)


def windows_per_tile(grid: Sequence[int], window: Sequence[int]) -> int:
    """Windows that cover a grid, the last row and column padded: M."""
    return -(-grid[0] // window[0]) * -(-grid[1] // window[1])


def _gather(features: list[Tensor], slots: _Slots, pad_embed: Tensor | None, mask: Tensor | None) -> Tensor:
    """The slots of all windows, [W, J, L*C]: pad embeddings added first, zeros outside the grid."""
    x = torch.cat([f.flatten(0, 1)[slots.patch] for f in features], dim=-1)
    if pad_embed is not None:
        assert mask is not None
        for row, chosen in zip(pad_embed, pad_rows(mask), strict=True):
            x = x + torch.where(chosen.flatten()[slots.patch].unsqueeze(-1), row, 0)
    return torch.where(slots.inside.unsqueeze(-1), x, 0)


def pad_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where pad_embed[0] and pad_embed[1] are added, compared in the mask's own dtype."""
    return mask == 0, (mask < 1) & (mask != 0)


def pad_kind(mask: Tensor) -> Tensor:
    """uint8 like `mask`, dense: 0, or 1 + the row of pad_embed that is added to a patch. What kernels take."""
    zero, partial = pad_rows(mask)
    return (zero.to(torch.uint8) + 2 * partial.to(torch.uint8)).contiguous()


def _attend(
    x: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    num_heads: int,
) -> _Attended:
    accumulator = torch.promote_types(x.dtype, torch.float32)
    kv = F.linear(x, w_kv, b_kv)
    q = F.linear(x.mean(1), w_q, b_q).unflatten(-1, (num_heads, -1)).unsqueeze(1).to(accumulator)
    k, v = (
        t.unflatten(-1, (num_heads, -1)).to(accumulator)
        for t in kv.split([w_q.shape[0], w_kv.shape[0] - w_q.shape[0]], dim=-1)
    )
    scale = q.shape[-1] ** -0.5
    p = ((q * k).sum(-1) * scale).softmax(1)
    context = (p.unsqueeze(-1) * v).sum(1).flatten(1).to(x.dtype)
    return _Attended(q, k, v, p, scale, context)
