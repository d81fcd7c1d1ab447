"""Windows of a patch grid, and which patch and feature is which."""

import triton
import triton.language as tl

from . import operands
from .strides import in_elements


@triton.jit
def window_number(p_keep, o_window, windows, all_windows, HAS_KEEP: tl.constexpr):
    """Which of all windows the o_window-th is."""
    if HAS_KEEP:
        i_window = tl.load(p_keep + o_window, mask=o_window < windows, other=0)
        # untrusted indices reach no patch outside the tensors
        return tl.minimum(tl.maximum(i_window, 0), all_windows - 1)
    else:
        return tl.minimum(o_window, windows - 1).to(tl.int64)


@triton.jit
def slot_patch(i_window, i_slot, GRID: tl.constexpr):
    """Tile and patch of a window's slot, and whether it lies on the grid."""
    ACROSS: tl.constexpr = (GRID.COLS + GRID.WINDOW_COLS - 1) // GRID.WINDOW_COLS
    DOWN: tl.constexpr = (GRID.ROWS + GRID.WINDOW_ROWS - 1) // GRID.WINDOW_ROWS
    i_tile = i_window // (ACROSS * DOWN)
    i_row = i_window // ACROSS % DOWN * GRID.WINDOW_ROWS + i_slot // GRID.WINDOW_COLS
    i_col = i_window % ACROSS * GRID.WINDOW_COLS + i_slot % GRID.WINDOW_COLS
    return i_tile, i_row * GRID.COLS + i_col, (i_row < GRID.ROWS) & (i_col < GRID.COLS)


@triton.jit
def patch_slot(i_patch, GRID: tl.constexpr):
    """The reverse, of patches counted through all tiles: window and slot."""
    ACROSS: tl.constexpr = (GRID.COLS + GRID.WINDOW_COLS - 1) // GRID.WINDOW_COLS
    DOWN: tl.constexpr = (GRID.ROWS + GRID.WINDOW_ROWS - 1) // GRID.WINDOW_ROWS
    i_row = i_patch // GRID.COLS % GRID.ROWS
    i_col = i_patch % GRID.COLS
    i_tile = i_patch // (GRID.ROWS * GRID.COLS)
    i_window = (i_tile * DOWN + i_row // GRID.WINDOW_ROWS) * ACROSS + i_col // GRID.WINDOW_COLS
    return i_window, i_row % GRID.WINDOW_ROWS * GRID.WINDOW_COLS + i_col % GRID.WINDOW_COLS


@triton.jit
def feature_at(features, i_feature, UNIT: tl.constexpr):
    """The i_feature-th of `operands.Features`."""
    p = features.pointers[0]
    for i in tl.static_range(1, len(features.pointers)):
        if i_feature == i:
            p = features.pointers[i]
    tile_stride = _stride_at(features.tile_strides, i_feature, UNIT)
    return operands.Feature(p, tile_stride, _stride_at(features.patch_strides, i_feature, UNIT))


@triton.jit
def _stride_at(strides, i_feature, UNIT: tl.constexpr):
    low = tl.where(i_feature == 0, strides[0], strides[1])
    high = tl.where(i_feature == 2, strides[2], strides[3])
    return in_elements(tl.where(i_feature < 2, low, high), UNIT)
