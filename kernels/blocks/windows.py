"""Windows of a patch grid, and which patch and feature is which."""

import triton
import triton.language as tl

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
def slot_patch(
    i_window,
    i_slot,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLS: tl.constexpr,
):
    """Tile and patch of a window's slot, and whether it lies on the grid."""
    ACROSS: tl.constexpr = (COLS + WINDOW_COLS - 1) // WINDOW_COLS
    DOWN: tl.constexpr = (ROWS + WINDOW_ROWS - 1) // WINDOW_ROWS
    i_tile = i_window // (ACROSS * DOWN)
    i_row = i_window // ACROSS % DOWN * WINDOW_ROWS + i_slot // WINDOW_COLS
    i_col = i_window % ACROSS * WINDOW_COLS + i_slot % WINDOW_COLS
    return i_tile, i_row * COLS + i_col, (i_row < ROWS) & (i_col < COLS)


@triton.jit
def feature_at(p_0, p_1, p_2, p_3, i_feature):
    """The i_feature-th of the pointers."""
    p = p_0
    if i_feature == 1:
        p = p_1
    if i_feature == 2:
        p = p_2
    if i_feature == 3:
        p = p_3
    return p


@triton.jit
def stride_at(stride_0, stride_1, stride_2, stride_3, i_feature, UNIT: tl.constexpr):
    """The i_feature-th of the strides, in elements."""
    low = tl.where(i_feature == 0, stride_0, stride_1)
    return in_elements(tl.where(i_feature < 2, low, tl.where(i_feature == 2, stride_2, stride_3)), UNIT)
