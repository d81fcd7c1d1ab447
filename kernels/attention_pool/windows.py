"""Windows of patch grids, as attention pooling's kernels are told of them."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._launch import Config
from ..blocks.strides import in_units

MAX_FEATURES = 4

# what calls of one model differ by, for which kernels are not to be compiled again
PER_CALL = (
    "windows",
    "all_windows",
    *(f"stride_{feature}{dimension}" for feature in range(MAX_FEATURES) for dimension in "tn"),
)


class Windows(NamedTuple):
    """Windows of the patch grids of L features [T, N, C]: all of them, or those in `keep`.

    `kind` [T, N] is uint8: 0, or 1 + the row of `pad_embed` [2, L*C] that is added to a patch; None without either.
    """

    features: list[Tensor]
    grid: list[int]
    window: list[int]
    keep: Tensor | None
    kind: Tensor | None
    pad_embed: Tensor | None

    @property
    def slots(self) -> int:
        """J, of one window."""
        return self.window[0] * self.window[1]

    @property
    def of_all_tiles(self) -> int:
        """T * M."""
        across, down = (-(-size // step) for size, step in zip(self.grid, self.window, strict=True))
        return self.features[0].shape[0] * across * down

    @property
    def count(self) -> int:
        """W."""
        return self.of_all_tiles if self.keep is None else len(self.keep)

    @property
    def width(self) -> int:
        """L*C."""
        return self.features[0].shape[2] * len(self.features)

    @property
    def sources(self) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
        """Features and their strides, as many as kernels have arguments for, and what these are in units of."""
        padded = [*self.features, *self.features[:1] * (MAX_FEATURES - len(self.features))]
        unit, strides = in_units(padded[0].dtype, *(stride for x in padded for stride in x.stride()[:2]))
        return tuple(padded), strides, unit

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "ROWS": self.grid[0],
            "COLS": self.grid[1],
            "WINDOW_ROWS": self.window[0],
            "WINDOW_COLS": self.window[1],
            "HAS_PAD": self.kind is not None,
        }


def tiled(config: Config, columns: str, slots: int) -> Config:
    """A configuration, which is for windows of four slots, for windows of `slots`: tiles of as many elements."""
    padded = triton.next_power_of_2(slots)
    elements = config["BLOCK_W"] * 4 * config[columns]
    width = min(config[columns], max(16, elements // padded))
    return config | {"BLOCK_W": max(1, elements // (padded * width)), columns: width}


def blocks(name: str, *sizes: int) -> tuple[dict[str, int], ...]:
    """Candidates: blocks of windows and of columns, and warps."""
    return tuple(
        {"BLOCK_W": rows, name: size, "num_warps": warps} for rows in (2, 4, 8) for size in sizes for warps in (4, 8)
    )


def example_windows(dtype: torch.dtype, device: str, windows: int, kept: bool, padded: bool) -> Windows:
    """About that many windows of the released model's crops, two hidden states of 1,152."""
    tiles, width = max(1, round(windows / 196)), 2 * 1152
    features = list(torch.randn(2, tiles, 729, 1152, dtype=dtype, device=device).unbind(0))
    keep = torch.arange(windows, device=device) % (196 * tiles) if kept else None
    kind = torch.zeros(tiles, 729, dtype=torch.uint8, device=device) if padded else None
    pad_embed = torch.randn(2, width, dtype=dtype, device=device) if padded else None
    return Windows(features, [27, 27], [2, 2], keep, kind, pad_embed)
