"""What kernels hand to their helpers in one piece: tuples with names, made and passed inside kernels at no cost.

Kernels refer to them as operands.Rows, and to numbers as constants.LN_2: what is imported by its own name Triton
compares at every launch with what it was, for 0.05 us each, and 0.6 us for a constant (AMD EPYC, Zen 4).
"""

from typing import Any, NamedTuple


class Columns(NamedTuple):
    """How D columns are held, all constants: as LO + HI, powers of two, HI being 0 where LO are enough.

    With pointers the HI columns are those that end at D, though some are in LO too, as to read them takes no mask. With
    TMA they are those from LO on, and descriptors fill them with zeros from D on.
    """

    D: Any
    LO: Any
    HI: Any
    TMA: Any


class Rows(NamedTuple):
    """Rows of a matrix: a pointer to the first, what is from one to the next, in elements, and how many there are."""

    first: Any
    stride: Any
    count: Any


class Stream(NamedTuple):
    """Rows that a loop goes through: `Rows` of which `lo` and `hi` are the pointer, or with TMA descriptors of
    [B, H, N, D] in blocks of LO and of HI columns, with the image and the head that are meant."""

    lo: Any
    hi: Any
    stride: Any
    count: Any
    i_batch: Any
    i_head: Any


class Strides(NamedTuple):
    """Elements from one image, token and head of a tensor to the next."""

    image: Any
    token: Any
    head: Any


class Dense(NamedTuple):
    """The sizes of dense tensors [B, N, H, D] or, packed, [T, H, D]: N or T, H, and H * D."""

    tokens: Any
    heads: Any
    stride: Any


class Segments(NamedTuple):
    """Where segments are packed: a pointer to their bounds, None if nothing is packed, the tokens that there are, and
    how many of a segment's count, for which the grid was made."""

    p_bounds: Any
    tokens: Any
    longest: Any


class Head(NamedTuple):
    """One head of an image: which, and its tokens: the first, which is 0 unless segments are packed, and how many."""

    i_batch: Any
    i_head: Any
    start: Any
    tokens: Any


class Window(NamedTuple):
    """Which columns of a head's scores a row sees: how many rows and columns there are, the last row's place being that
    of the last column, and how many columns before and after its own place a row sees, None for all."""

    rows: Any
    columns: Any
    before: Any
    after: Any


class Scores(NamedTuple):
    """What becomes of products of queries and keys: their factor for powers of two, the steepness of the cap that they
    get before it, None for no cap, and their `Window`."""

    scale: Any
    steepness: Any
    window: Any


class Span(NamedTuple):
    """The columns that a block of rows sees. Those from `whole` to `whole_end` each of the rows sees; the others are
    counted from `edges` to `end`, see `scores.edge_column`."""

    whole: Any
    whole_end: Any
    edges: Any
    end: Any


class Grid(NamedTuple):
    """The patches of a tile and the windows over them, all constants."""

    ROWS: Any
    COLS: Any
    WINDOW_ROWS: Any
    WINDOW_COLS: Any


class Features(NamedTuple):
    """What attention pooling takes, up to four tensors [T, N, C]: tuples of pointers and of strides, in units, from one
    tile and patch to the next."""

    pointers: Any
    tile_strides: Any
    patch_strides: Any


class Feature(NamedTuple):
    """One of them: a pointer, and strides in elements."""

    first: Any
    tile_stride: Any
    patch_stride: Any


class Tile(NamedTuple):
    """Of a matrix product, all constants: rows, columns and terms of a block, and how many blocks of rows take turns at
    the same columns."""

    M: Any
    N: Any
    K: Any
    GROUP: Any
