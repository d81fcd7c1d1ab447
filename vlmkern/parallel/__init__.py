"""More than one device over torch.distributed: heads and hidden columns of a layer, or crops of a picture, by rank.

Data parallelism needs nothing from here: `DistributedDataParallel` and FSDP2's `fully_shard` take the models as they
are.
"""

from .tensor import AttentionPoolParallel, MLPParallel, SwiGLUParallel, TileAttentionParallel, tensor_parallel
from .tiles import encode_images_tile_parallel, sum_gradients

__all__ = [
    "AttentionPoolParallel",
    "MLPParallel",
    "SwiGLUParallel",
    "TileAttentionParallel",
    "encode_images_tile_parallel",
    "sum_gradients",
    "tensor_parallel",
]
