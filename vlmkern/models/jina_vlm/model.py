"""jina-vlm assembled: tower, connector, additive image merge, decoder, greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint
from .cache import KVCache
from .config import JinaVLMConfig
from .decoder import Decoder, LanguageHead
from .vision import VisionModel, encode_crops


class _Body(nn.Module):
    """The level of the checkpoint's names between the model and its two halves."""

    def __init__(self, config: JinaVLMConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)
        self.language_model = Decoder(config.text)


class JinaVLM(nn.Module):
    """jina-vlm (`model_type` "jvlm"): images are tiled into crops, each crop goes through the vision tower, two of
    its hidden states are pooled 2x2 and projected, and the rows are added to the embeddings of the prompt's
    image tokens.

    Args:
        config: sizes; the released model's when left out.

    State-dict names are those of the released checkpoint.
    """

    def __init__(self, config: JinaVLMConfig | None = None) -> None:
        super().__init__()
        self.config = config or JinaVLMConfig()
        self.model = _Body(self.config)
        self.lm_head = LanguageHead(self.config.text)

    @classmethod
    def random(
        cls,
        config: JinaVLMConfig | None = None,
        seed: int = 0,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> JinaVLM:
        """A model of random weights: for one seed the same on every machine and device, rounded to `dtype`, which is
        float32, bfloat16, float16 or float64, or the name of one.

        Raises:
            TypeError, ValueError: another `dtype`.
        """
        return checkpoint.random(cls, config or JinaVLMConfig(), seed, dtype, device)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
    ) -> JinaVLM:
        """Loads config.json and *.safetensors (single file or with an index) of a checkpoint directory.

        Args:
            dtype: of the weights in memory, float32, bfloat16, float16 or float64 or the name of one; the
                checkpoint's own when None.

        Raises:
            ConfigError: config.json is missing or does not describe a jina-vlm.
            CheckpointError: files are missing, cut short, not regular files or not safetensors, or tensors are
                missing, unknown or of another shape (the first of them are listed), which their headers show
                before memory is taken. NaN or infinite weights load, with a warning.
            TypeError, ValueError: another `dtype`.
        """
        return checkpoint.load(cls, Path(directory), dtype, device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, readable by `from_pretrained`."""
        checkpoint.save(self, self.config, Path(directory))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.lm_head.weight.device

    def encode_images(self, crops: Tensor, image_masks: Tensor, image_input_idx: Tensor | None = None) -> Tensor:
        """Crops to rows for the decoder.

        Args:
            crops: [B, T, N, patch_dim] in [-1, 1]; -1 throughout for padding.
            image_masks: [B, T, N], any real dtype; see `VisionLanguageConnector`.
            image_input_idx: [B, T, M]; windows with a negative index are not computed.

        Returns:
            [B, T, M, hidden_size]; zeros where not computed.

        Raises:
            ValueError: shapes that do not fit together.
        """
        batch, tiles = self.check_images(crops, image_masks, image_input_idx)
        windows = self.config.windows_per_crop
        keep = None if image_input_idx is None else _kept(image_input_idx)
        rows = self._encode(crops, image_masks, keep)
        if keep is not None:
            rows = rows.new_zeros(batch * tiles * windows, rows.shape[-1]).index_copy(0, keep, rows)
        return rows.view(batch, tiles, windows, rows.shape[-1])

    def forward(
        self,
        input_ids: Tensor,
        crops: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Logits over the base vocabulary for every token.

        Args:
            input_ids: [B, S]; -1 is padding.
            crops: [B, T, N, patch_dim], with `image_masks` [B, T, N] and `image_input_idx` [B, T, M], as
                `JinaVLMProcessor` gives them. Row (b, t, m) is added to the embedding of token
                `image_input_idx[b, t, m]` of sequence b; rows with a negative index are dropped.
            attention_mask: [B, S] (with a cache also [B, cached + S]), 0 for padding; `input_ids != -1` when None.
            cache: tokens are appended to it and attend to what it holds.
            image_features: [B, T, M, hidden_size] of `encode_images`, in the place of crops and masks, with
                `image_input_idx`.

        Returns:
            [B, S, vocab_size]. At padded positions the values are finite and mean nothing.

        Raises:
            ValueError: shapes, ids or indices that do not fit; a cache that is full.
        """
        hidden = self._hidden(
            input_ids, crops, image_masks, image_input_idx, attention_mask, cache, image_features=image_features
        )
        return self.lm_head(hidden)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        crops: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 512,
        eos_token_id: int | Sequence[int] | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Greedy decoding with a key-value cache.

        Args:
            input_ids and the rest: as in `forward`; sequences of different lengths are padded on the left.
            max_new_tokens: new tokens at most.
            eos_token_id: ends a sequence; the rest of its row is filled with it (the first, if several). None
                never stops early.

        Returns:
            New ids [B, n], n <= max_new_tokens; the prompt is not repeated.

        Raises:
            ValueError: as in `forward`; padding that is not on the left; an empty prompt; a prompt that with the
                new tokens is longer than the model's maximum.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 0")
        mask = self._token_mask(input_ids, attention_mask, past=0)
        batch, tokens = input_ids.shape
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError(
                "attention_mask: got padding to the right of or between tokens, expected it on the left only"
            )
        if batch and (tokens == 0 or not bool(mask[:, -1].all())):
            raise ValueError("input_ids: got a sequence without tokens, expected at least one token in each")
        limit = self.config.text.max_length
        if tokens + max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens: got {tokens} prompt + {max_new_tokens} new tokens, expected at most {limit}"
            )

        stops = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        stop_ids = torch.tensor(stops, dtype=torch.int64, device=input_ids.device)
        done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        new_ids: list[Tensor] = []
        if batch == 0 or max_new_tokens == 0:
            return input_ids.new_empty(batch, 0)
        cache = self.new_cache(batch, tokens + max_new_tokens)
        hidden = self._hidden(
            input_ids, crops, image_masks, image_input_idx, mask, cache, image_features=image_features
        )
        while True:
            ids = self.lm_head(hidden[:, -1]).argmax(-1)
            if stops:
                ids = torch.where(done, stops[0], ids)
                done |= torch.isin(ids, stop_ids)
            new_ids.append(ids)
            if len(new_ids) == max_new_tokens or (stops and bool(done.all())):
                return torch.stack(new_ids, dim=1)
            hidden = self._hidden(ids.unsqueeze(1), cache=cache)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty key-value cache for `batch` sequences of up to `max_len` tokens, in the model's dtype."""
        return KVCache(self.config.text, batch, max_len, self.dtype, self.device)

    def _hidden(
        self,
        input_ids: Tensor,
        crops: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_input_idx: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        mask = self._token_mask(input_ids, attention_mask, 0 if cache is None else cache.length)
        embeds = self.model.language_model.embedding(input_ids.clamp(min=0))
        if image_features is not None and crops is not None:
            raise ValueError("image_features: got a tensor beside crops, expected one of the two")
        if image_features is not None:
            images = {"image_features": image_features, "image_input_idx": image_input_idx}
        else:
            images = {"crops": crops, "image_masks": image_masks, "image_input_idx": image_input_idx}
        absent = [name for name, value in images.items() if value is None]
        if 0 < len(absent) < len(images):
            raise ValueError(f"{absent[0]}: got None, expected a tensor, as other image inputs are given")
        if not absent:
            embeds = self._merge(embeds, **images)
        return self.model.language_model(embeds, mask, cache)

    def _merge(
        self,
        embeds: Tensor,
        image_input_idx: Tensor,
        crops: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Adds image rows to the embeddings [B, S, C] of their tokens."""
        tokens, name = embeds.shape[1], "crops"
        if image_features is None:
            batch, _ = self.check_images(crops, image_masks, image_input_idx)
        else:
            expected = (*image_input_idx.shape, embeds.shape[2])
            if tuple(image_features.shape) != expected:
                raise ValueError(f"image_features: got shape {list(image_features.shape)}, expected {list(expected)}")
            batch, name = len(image_features), "image_features"
        if batch != embeds.shape[0]:
            raise ValueError(f"{name}: got a batch of {batch}, expected {embeds.shape[0]} as in input_ids")
        keep = _kept(image_input_idx)
        target = image_input_idx.flatten(1)
        if keep.numel() and int(target.max()) >= tokens:
            raise ValueError(
                f"image_input_idx: got an index of {int(target.max())}, expected below the prompt's length, {tokens}"
            )
        row = torch.arange(batch, device=target.device).unsqueeze(1)
        flat_target = (target + row * tokens).flatten()[keep]
        given = image_features is not None
        rows = image_features.flatten(0, 2)[keep] if given else self._encode(crops, image_masks, keep)
        # under autocast the connector's rows are of the lower precision, embeddings of the weights'
        return embeds.flatten(0, 1).index_add(0, flat_target, rows.to(embeds.dtype)).view_as(embeds)

    def _encode(self, crops: Tensor, image_masks: Tensor, keep: Tensor | None) -> Tensor:
        """Rows of the kept windows [K, C], or of all [B * T, M, C]."""
        return encode_crops(self.model.vision_model, crops.flatten(0, 1), image_masks.flatten(0, 1), keep)

    def check_images(self, crops: Tensor, image_masks: Tensor, image_input_idx: Tensor | None) -> tuple[int, int]:
        """Batch and tiles of image inputs; ValueError unless their shapes fit together and the model."""
        vision = self.config.vision
        if crops.dim() != 4 or crops.shape[2:] != (vision.num_patches, vision.patch_dim):
            raise ValueError(
                f"crops: got shape {list(crops.shape)}, expected [B, T, {vision.num_patches}, {vision.patch_dim}]"
            )
        batch, tiles = crops.shape[:2]
        expected = {
            "image_masks": (image_masks, vision.num_patches),
            "image_input_idx": (image_input_idx, self.config.windows_per_crop),
        }
        for name, (tensor, last) in expected.items():
            if tensor is not None and tuple(tensor.shape) != (batch, tiles, last):
                raise ValueError(
                    f"{name}: got shape {list(tensor.shape)}, expected [{batch}, {tiles}, {last}] to go with crops"
                )
        return batch, tiles

    def _token_mask(self, input_ids: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
        """Which of the new tokens are real, bool [B, S]."""
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(
                f"input_ids: got {input_ids.dtype} of shape {list(input_ids.shape)}, expected integers of shape [B, S]"
            )
        limit = self.config.text.vocab_size + self.config.text.additional_vocab_size
        if input_ids.numel():
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < -1 or high >= limit:
                raise ValueError(f"input_ids: got ids from {low} to {high}, expected -1 (padding) to {limit - 1}")
        if attention_mask is None:
            return input_ids != -1
        batch, tokens = input_ids.shape
        if tuple(attention_mask.shape) == (batch, past + tokens):
            attention_mask = attention_mask[:, past:]
        if tuple(attention_mask.shape) != (batch, tokens):
            raise ValueError(f"attention_mask: got shape {list(attention_mask.shape)}, expected [{batch}, {tokens}]")
        return attention_mask != 0


def _kept(image_input_idx: Tensor) -> Tensor:
    """Flat indices of the windows with a non-negative index."""
    return (image_input_idx.flatten() >= 0).nonzero().squeeze(1)
