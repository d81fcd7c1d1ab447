"""What a mask of transformers says: which of its arguments `vlmkern.ops.attention` would need to do without it.

transformers hands attention a boolean [B, 1, N, M] (or numbers to be added, 0 where a query sees a key), the same for
all layers of a kind. Most are causal, perhaps in a window, over sequences that begin behind padding on the left and end
before room that a static cache has left; or they leave out padding for all queries alike, as in encoders.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """Keys from `first` to `last` of each sequence are seen: by all queries, or by those behind them.

    Attributes:
        first, last: of each sequence in the batch.
        causal: queries are the last ones before `last`, which is the same for all, and see what is not behind them.
        window: keys before its own place that a query sees, -1 for all.
    """

    first: list[int]
    last: list[int]
    causal: bool
    window: int

    @property
    def padded(self) -> bool:
        """Whether sequences differ."""
        return len(set(self.first)) > 1 or len(set(self.last)) > 1


def read(mask: Tensor, window: int | None) -> Visible | None:
    """What a mask says, None where no `Visible` does.

    Args:
        mask: [B, 1, N, M], or one that is equal for all heads; true, or 0, where a query sees a key.
        window: keys that a query may see at most, itself among them, if the layer has such a window.
    """
    if mask.dim() != 4 or (mask.shape[1] > 1 and mask.stride(1) != 0) or mask.numel() == 0:
        return None
    key = (id(mask), window)
    known = _known.get(key)
    if known is not None and known[0]() is mask and known[1] == _version(mask):
        return known[2]
    if len(_known) >= _KEPT:
        _known.clear()
    result = _read(mask[:, 0], window)
    _known[key] = (weakref.ref(mask), _version(mask), result)
    return result


# a model has one mask a kind of layer, and to read one takes as long as a layer's scores
_known: dict[tuple[int, int | None], tuple[weakref.ref, int, Visible | None]] = {}
_KEPT = 8


def _version(mask: Tensor) -> int:
    return -1 if mask.is_inference() else mask._version


def _read(mask: Tensor, window: int | None) -> Visible | None:
    seen = mask
    if mask.dtype is not torch.bool:
        if not ((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all():
            return None  # numbers that change scores
        seen = mask == 0
    queries, keys = seen.shape[1:]
    places = torch.arange(keys, device=seen.device)
    sees = seen.any(-1)
    # the first and the last key that each sequence's queries see; of rows that see none, `keys` and -1
    first = torch.where(seen, places, keys).amin((1, 2))
    last = torch.where(seen, places, -1).amax((1, 2)) + 1
    if not sees.any(1).all():
        return None
    spans = (places >= first[:, None]) & (places < last[:, None])
    if torch.equal(seen, spans[:, None].expand_as(seen)):
        return Visible(first.tolist(), last.tolist(), False, -1)
    end = int(last.max())
    own = torch.arange(end - queries, end, device=seen.device)
    if end < queries or int(last.min()) != end:
        return None
    behind = places - own[:, None]
    expected = (behind <= 0) & (places >= first[:, None, None])
    left = -1 if window is None else window - 1
    if left >= 0:
        expected = expected & (behind >= -left)
    # a query of padding has no key to see: what it is told does not matter
    real = own >= first[:, None]
    if not torch.equal(seen & real[..., None], expected & real[..., None]):
        return None
    return Visible(first.tolist(), last.tolist(), True, left)
