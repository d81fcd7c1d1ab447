"""Rotary position embedding, what ops that apply it share. Su et al., "RoFormer" (2021), eq. 34."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import checks

Tables = tuple[Tensor, Tensor]
"""Cosines and sines."""


def pair(name: str, tables: Tables | None) -> tuple[Tensor | None, Tensor | None]:
    """The two tables of an argument that may be None. Raises where it is anything else, or wants a gradient."""
    if tables is None:
        return None, None
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        raise ValueError(f"{name}: got {type(tables).__name__}, expected (cos, sin)")
    for table, part in zip(tables, ("cos", "sin"), strict=True):
        checks.tensor(f"{name}: {part}", table)
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got a {part} that requires a gradient, expected .detach(): tables get none")
    return tuple(tables)


def check(name: str, cos: Tensor, sin: Tensor, x_name: str, x: Tensor) -> None:
    """Raises where tables do not turn x [..., N, H, D]: they are float32 (or float64 for float64) [N, D / 2], or [N, D]
    with equal halves, or have all leading dimensions of x."""
    head_dim = x.shape[-1]
    checks.value(head_dim % 2 == 0, lambda: f"{name}: got a head dimension of {head_dim}, expected an even one")
    for part, table in (("cos", cos), ("sin", sin)):
        named = f"{name}: {part}"
        checks.tensor(named, table)
        if table.dtype != torch.float32 and not table.dtype == x.dtype == torch.float64:
            raise TypeError(f"{named}: got dtype {table.dtype}, expected torch.float32")
        checks.same_device(named, table, x_name, x)
        width = table.shape[-1] if table.dim() and table.shape[-1] == head_dim // 2 else head_dim
        leading = x.shape[:-3] if table.dim() == x.dim() - 1 else ()
        checks.shape(named, table, (*leading, x.shape[-3], width), "[tokens, D], or [tokens, D / 2]")
        checks.unit_last_stride(named, table)
    checks.shape(f"{name}: sin", sin, cos.shape, "that of cos")


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, back: bool = False) -> Tensor:
    """x [..., N, H, D] with each pair of channels turned by its token's angle, or turned back, in float32 (float64 for
    float64), in its own dtype. Pairs are D / 2 apart, or neighbours."""
    half = x.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (t[..., None, :half].to(wide.dtype) for t in (cos, sin))
    if back:
        sin = -sin
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    parts = (first * cos - second * sin, second * cos + first * sin)
    return (torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)).to(x.dtype)
