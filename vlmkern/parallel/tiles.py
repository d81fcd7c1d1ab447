"""Crops of pictures by rank: they do not see each other before the decoder, so tower and connector exchange nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..models.jina_vlm import JinaVLM
from ._group import gather, group_of


def encode_images_tile_parallel(
    model: JinaVLM, crops: Tensor, image_masks: Tensor, image_input_idx: Tensor | None = None, *, mesh: DeviceMesh
) -> Tensor:
    """`model.encode_images` with each rank running tower and connector on its share of the crops.

    Args:
        model: with the same weights on all ranks.
        crops, image_masks, image_input_idx: as in `JinaVLM.encode_images`, the same on all ranks. Any number of crops:
            shares differ by at most one, and ranks may get none.
        mesh: of one dimension.

    Returns:
        [B, T, M, hidden_size], the same on all ranks.

    `model(input_ids, image_features=..., image_input_idx=...)` goes on from there.

    With gradients, what follows is to be the same on all ranks too. Then those of tower and connector are each rank's
    part: `sum_gradients(model.model.vision_model.parameters(), mesh)` after the backward makes them what one process
    would have.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a mesh of several dimensions; shapes that do not fit together.
    """
    group = group_of(mesh)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, tiles = crops.shape[:2]
    # all ranks see wrong shapes and raise, before any of them waits for another
    model.check_images(crops, image_masks, image_input_idx)
    shares = [len(share) for share in torch.arange(batch * tiles).tensor_split(ranks)]
    first = sum(shares[:rank])
    own = slice(first, first + shares[rank])
    flat = [None if t is None else t.flatten(0, 1)[own].unsqueeze(0) for t in (crops, image_masks, image_input_idx)]
    rows = model.encode_images(*flat).squeeze(0)
    return gather(rows, shares, group).unflatten(0, (batch, tiles))


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sums gradients over a mesh's ranks, in place. A rank without a gradient where another has one counts as zero.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a mesh of several dimensions.
    """
    group = group_of(mesh)
    parameters = list(parameters)
    if not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(has, group=group)
    for parameter, count in zip(parameters, has.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
