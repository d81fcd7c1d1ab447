"""How far the memory behind tensors reaches, by which the extension checks what it is told of them."""

from __future__ import annotations

from torch import Tensor


def extents(*tensors: Tensor | None) -> list[int]:
    """For each tensor the elements from its address to the end of its storage; 0 for None."""
    return [0 if t is None else t.untyped_storage().nbytes() // t.element_size() - t.storage_offset() for t in tensors]
