"""Pictures and prompts of a request as the served model takes them, over the package's own image processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from ...models.jina_vlm import ImageInputs, JinaVLMConfig, JinaVLMImageProcessor
from ...models.jina_vlm.processor import TOKEN_NAMES
from ...models.jina_vlm.tiling import TilePlan, candidate_tilings
from .config import JvlmConfig

IMAGE_MARKER = TOKEN_NAMES["image_token_id"]


class JinaVLMProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a model's pictures before it sees one."""

    def get_hf_config(self) -> JvlmConfig:
        """The model's configuration."""
        return self.ctx.get_hf_config(JvlmConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of pictures; `--limit-mm-per-prompt` narrows it."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Embeddings of the largest tiling (1,932 as released; its block is 2,074 tokens long)."""
        return {"image": self.largest_tiling.patch_tokens}

    @cached_property
    def image_processor(self) -> JinaVLMImageProcessor:
        """Built from preprocessor_config.json and `--mm-processor-kwargs`. Special ids are those that the files give,
        else those that the tokenizer knows by name, else the rows after the base vocabulary, in order.

        Raises:
            ValueError: settings that do not go with config.json.
        """
        return self._build()

    def _build(self, **overrides: Any) -> JinaVLMImageProcessor:
        settings = dict(self.ctx.get_hf_image_processor_config())
        config = self.get_hf_config()
        known = self.get_tokenizer().get_vocab()
        for offset, (key, name) in enumerate(TOKEN_NAMES.items()):
            if settings.get(key) is None:
                settings[key] = known.get(name, config.text_config.vocab_size + offset)
        settings["bos_token_id"] = config.bos_token_id
        processor = JinaVLMImageProcessor.from_dict(settings, **{**self._engine_kwargs, **overrides})
        _check_fit(processor, config.sizes())
        return processor

    def image_processor_for(self, request_kwargs: Mapping[str, object]) -> JinaVLMImageProcessor:
        """The image processor of one request.

        Args:
            request_kwargs: the request's `mm_processor_kwargs`. `max_crops` may be lowered; nothing else may differ
                from the server's, since memory was planned with that.

        Raises:
            ValueError: another change.
        """
        overrides = {key: value for key, value in request_kwargs.items() if self._engine_kwargs.get(key) != value}
        if not overrides:
            return self.image_processor
        max_crops, limit = overrides.pop("max_crops", 1), self.image_processor.max_crops
        if overrides or not isinstance(max_crops, int) or not 1 <= max_crops <= limit:
            raise ValueError(
                f"mm_processor_kwargs: got {dict(request_kwargs)}, expected at most a max_crops of 1 to {limit}"
            )
        return self._build(max_crops=max_crops)

    @property
    def _engine_kwargs(self) -> Mapping[str, Any]:
        return self.ctx.get_mm_config().mm_processor_kwargs or {}

    @cached_property
    def largest_tiling(self) -> TilePlan:
        """The tiling with the most embeddings, as the plan of a picture that leads to it."""
        processor = self.image_processor
        geometry = processor.geometry
        sizes = [
            (geometry.stride * cols + geometry.margin, geometry.stride * rows + geometry.margin)
            for rows, cols in candidate_tilings(geometry.max_crops)
        ]
        if processor.do_resize:
            # with the longer side kept and the other as short as it takes not to be shrunk first
            limit = processor.max_pixels
            sizes = [(min(w, limit // h), h) if h >= w else (w, min(h, limit // w)) for w, h in sizes]
        return max((processor.plan(*size) for size in sizes), key=lambda plan: plan.patch_tokens)


class JinaVLMDummyInputsBuilder(BaseDummyInputsBuilder[JinaVLMProcessingInfo]):
    """The largest inputs, with which vLLM plans memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One marker a picture."""
        return IMAGE_MARKER * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        """Pictures of the largest tiling, white: a black one would look like padding."""
        largest = self.info.largest_tiling
        images = self._get_dummy_images(
            width=largest.width,
            height=largest.height,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class JinaVLMMultiModalProcessor(BaseMultiModalProcessor[JinaVLMProcessingInfo]):
    """Pictures to crops, and each picture's marker in the prompt to its block of tokens."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor = self.info.image_processor_for(hf_kwargs)
        pictures = [processor.preprocess(image) for image in hf_data["images"]]
        return BatchFeature(
            {
                "crops": torch.cat([_levels(picture.crops, processor) for picture in pictures]),
                "image_masks": torch.cat([picture.image_masks for picture in pictures]),
                "keep": torch.cat([_kept_in_token_order(picture) for picture in pictures]),
                "block": torch.cat([picture.tokens for picture in pictures]),
                "num_crops": torch.tensor([len(picture.crops) for picture in pictures]),
                "num_rows": torch.tensor([int((picture.image_input_idx >= 0).sum()) for picture in pictures]),
                "num_tokens": torch.tensor([len(picture.tokens) for picture in pictures]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if not hf_inputs:
            return {}
        if "num_crops" not in hf_inputs:
            raise ValueError(f"image: got {', '.join(hf_inputs)}, expected pictures; embeddings are not taken")
        counts = {key: hf_inputs[key] for key in ("num_crops", "num_rows", "num_tokens")}
        return {
            "crops": MultiModalFieldConfig.flat_from_sizes("image", counts["num_crops"]),
            "image_masks": MultiModalFieldConfig.flat_from_sizes("image", counts["num_crops"]),
            "keep": MultiModalFieldConfig.flat_from_sizes("image", counts["num_rows"]),
            "block": MultiModalFieldConfig.flat_from_sizes("image", counts["num_tokens"], keep_on_cpu=True),
            **{key: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for key in counts},
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.image_processor

        def block(index: int) -> PromptUpdateDetails[list[int]]:
            tokens = out_mm_kwargs["image"][index]["block"].data.tolist()
            return PromptUpdateDetails.select_token_id(tokens, embed_token_id=processor.im_patch_token_id)

        return [PromptReplacement("image", target=[processor.image_token_id], replacement=block)]

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        # prompts of ids, and those of another tokenizer mode, have not been through JinaVLMRenderer
        bos = self.info.image_processor.bos_token_id
        return prompt if prompt[:1] == [bos] else [bos, *prompt]

    def _maybe_apply_prompt_updates(self, mm_items: MultiModalDataItems, mm_res: Any) -> Any:
        # vLLM fills markers from the left and leaves the rest: one in a user's text would shift every picture
        markers = mm_res.prompt_ids.count(self.info.image_processor.image_token_id)
        images = mm_items.get_all_counts().get("image", 0)
        if markers != images:
            raise ValueError(f"prompt has {markers} {IMAGE_MARKER} marker(s), but {images} image(s) were given")
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)


def _check_fit(processor: JinaVLMImageProcessor, sizes: JinaVLMConfig) -> None:
    """What does not fit would only show in the engine, which a request must not bring down."""
    geometry, vision, window = processor.geometry, sizes.vision, sizes.connector.window
    made = (geometry.base_size, geometry.base_size), geometry.patch_size, geometry.pooling
    if made != (tuple(vision.image_size), vision.patch_size, tuple(window)):
        raise ValueError(
            f"preprocessor_config.json: got crops, patches and pooling of {made}, "
            f"expected {(vision.image_size, vision.patch_size, window)} as in config.json"
        )
    rows = sizes.text.vocab_size + sizes.text.additional_vocab_size
    if max(processor.image_token_ids) >= rows:
        raise ValueError(
            f"special ids: got {processor.image_token_ids}, expected ids below {rows}, the embedding's rows"
        )


def _levels(crops: torch.Tensor, processor: JinaVLMImageProcessor) -> torch.Tensor:
    """Crops as uint8, a quarter of the bytes to send. Exact, as they are whole levels: except with `do_resize`, where
    they stay floats."""
    return crops if processor.do_resize else ((crops + 1) * 127.5).round_().to(torch.uint8)


def _kept_in_token_order(picture: ImageInputs) -> torch.Tensor:
    """Flat indices [K] into the picture's windows T * M, in the order of the tokens that they are added to."""
    positions = picture.image_input_idx.flatten()
    kept = (positions >= 0).nonzero().squeeze(1)
    return kept[positions[kept].argsort()]
