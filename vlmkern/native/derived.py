"""Tensors derived from weights, kept for as long as the weights live and stay as they are: packed or folded copies.

A copy is made when its weights are asked for the second time, so that a single pass pays neither time nor memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# values of a weight that are compared before a copy derived from it is used
_FINGERPRINT = 64


@dataclass
class _Seen:
    state: list[Any]
    values: list[Tensor]
    made: Any | None = None


_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def derived(name: str, weights: tuple[Tensor, ...], make: Callable[[], Any]) -> Any | None:
    """`make()`, kept under `name` with the first of the weights; None as long as they have not come back unchanged.

    Changes in place are noticed by the version counter and, as changes made through `.data` are not counted, by a
    sample of each weight's values. VLMKERN_PREPACK=0 switches all copies off.
    """
    if os.environ.get("VLMKERN_PREPACK") == "0" or any(w.is_inference() or not w.is_contiguous() for w in weights):
        return None
    state = [(w._version, w.data_ptr(), w.shape) for w in weights]
    samples = [w.view(-1)[:: max(1, w.numel() // _FINGERPRINT)] for w in weights]
    with _lock:
        kept = _seen.setdefault(weights[0], {})
        seen = kept.get(name)
        if (
            seen is None
            or seen.state != state
            or not all(torch.equal(old, new) for old, new in zip(seen.values, samples, strict=True))
        ):
            kept[name] = _Seen(state, [sample.detach().clone() for sample in samples])
            return None
        if seen.made is None:
            seen.made = make()
        return seen.made
