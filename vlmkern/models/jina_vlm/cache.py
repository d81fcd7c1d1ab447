"""The key-value cache: preallocated, grouped-query heads only."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TextConfig


class KVCache:
    """Keys and values of all layers for a batch of sequences that grow together.

    Attributes:
        length: tokens stored so far (padding included), the same for all rows of the batch.
        max_len: tokens there is room for.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 0 or max_len < 0:
            raise ValueError(f"batch, max_len: got {batch}, {max_len}, expected sizes of at least 0")
        # a head's tokens are neighbours, as decoding reads them
        shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._mask = torch.zeros(batch, max_len, dtype=torch.bool, device=device)
        self._padded = False
        self.max_len = max_len
        self.length = 0

    @property
    def batch(self) -> int:
        """Sequences in the cache."""
        return self._mask.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def mask(self) -> Tensor | None:
        """Which stored tokens are real, [B, length]; None when all of them are."""
        return self._mask[:, : self.length] if self._padded else None

    @property
    def real_tokens(self) -> Tensor:
        """Tokens stored so far without padding, [B]."""
        return self._mask[:, : self.length].sum(1)

    def begin(self, batch: int, tokens: int, mask: Tensor | None = None) -> None:
        """Makes room for S = `tokens` tokens of each sequence, which `update` then fills in, layer by layer; `mask`
        [B, S] is true where they are real, None if all are.

        Raises:
            ValueError: another batch size, or more tokens than there is room for.
        """
        if batch != self.batch:
            raise ValueError(f"input_ids: got a batch of {batch}, expected {self.batch} as in the cache")
        if self.length + tokens > self.max_len:
            raise ValueError(f"cache: got {self.length} + {tokens} tokens, expected at most max_len = {self.max_len}")
        self._mask[:, self.length : self.length + tokens] = True if mask is None else mask
        self._padded = self._padded or not (mask is None or bool(mask.all()))
        self.length += tokens

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the newest keys and values [B, S, H, D] of a layer; returns all of them, [B, length, H, D]."""
        start = self.length - keys.shape[1]
        all_keys, all_values = (t[layer, :, :, : self.length].transpose(1, 2) for t in (self._keys, self._values))
        all_keys[:, start:] = keys
        all_values[:, start:] = values
        return all_keys, all_values
