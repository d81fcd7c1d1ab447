"""Windows of a patch grid, as the backends of `ops.attention_pool` share them: their number, their slots side by side,
and the way of gradients back to the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where the slots of the asked-for windows lie."""

    patch: Tensor  # [W, J] index into the T * N patches of each window's slots; 0 where outside
    inside: Tensor  # [W, J] whether the slot lies on the grid


def windows_per_tile(grid: Sequence[int], window: Sequence[int]) -> int:
    """Windows that cover a grid, the last row and column padded: M."""
    return -(-grid[0] // window[0]) * -(-grid[1] // window[1])


def find_slots(
    tiles: int, grid: Sequence[int], window: Sequence[int], keep: Tensor | None, device: torch.device
) -> Slots:
    """The slots of all windows, or of those in `keep`."""
    (rows, cols), (height, width) = grid, window
    windows_across = -(-cols // width)
    windows_down = windows_per_tile(grid, window) // windows_across
    flat = torch.arange(tiles * windows_down * windows_across, device=device) if keep is None else keep
    flat = flat.view(-1, 1)
    across, down = flat % windows_across, flat // windows_across % windows_down
    tile = flat // (windows_down * windows_across)
    slot = torch.arange(height * width, device=device)
    row, col = down * height + slot // width, across * width + slot % width
    inside = (row < rows) & (col < cols)
    return Slots(torch.where(inside, (tile * rows + row) * cols + col, 0), inside)


def gather(features: Sequence[Tensor], slots: Slots, pad_embed: Tensor | None, mask: Tensor | None) -> Tensor:
    """The slots of all windows, [W, J, L*C]: pad embeddings added first, zeros outside the grid."""
    x = torch.cat([f.flatten(0, 1)[slots.patch] for f in features], dim=-1)
    if pad_embed is not None:
        assert mask is not None
        for row, chosen in zip(pad_embed, pad_rows(mask), strict=True):
            x = x + torch.where(chosen.flatten()[slots.patch].unsqueeze(-1), row, 0)
    return torch.where(slots.inside.unsqueeze(-1), x, 0)


def scatter(d_x: Tensor, slots: Slots, patches: int) -> Tensor:
    """The sums of the slots' gradients [W, J, L*C] by patch, [patches, L*C]. Overwrites `d_x`."""
    # zero slots beyond the grid belong to no patch
    d_x = d_x.masked_fill_(~slots.inside.unsqueeze(-1), 0).flatten(0, 1)
    per_patch = d_x.new_zeros(patches, d_x.shape[-1])
    return per_patch.index_put_((slots.patch.flatten(),), d_x, accumulate=True)


def pad_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where pad_embed[0] and pad_embed[1] are added, compared in the mask's own dtype."""
    return mask == 0, (mask < 1) & (mask != 0)


def pad_kind(mask: Tensor) -> Tensor:
    """uint8 like `mask`, dense: 0, or 1 + the row of pad_embed that is added to a patch. What kernels take."""
    zero, partial = pad_rows(mask)
    return (zero.to(torch.uint8) + 2 * partial.to(torch.uint8)).contiguous()
