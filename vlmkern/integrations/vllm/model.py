"""jina-vlm as a vLLM model: this package's tower and connector, vLLM's Qwen3."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.model_executor.models.vision import run_dp_sharded_vision_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ...models.jina_vlm import JinaVLMConfig
from ...models.jina_vlm.vision import VisionModel, encode_crops, run_tower
from . import weights as checkpoint
from .processing import (
    IMAGE_MARKER,
    JinaVLMDummyInputsBuilder,
    JinaVLMMultiModalProcessor,
    JinaVLMProcessingInfo,
)


@MULTIMODAL_REGISTRY.register_processor(
    JinaVLMMultiModalProcessor, info=JinaVLMProcessingInfo, dummy_inputs=JinaVLMDummyInputsBuilder
)
class JinaVLMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """Tower and connector of `vlmkern.models.jina_vlm` in front of vLLM's Qwen3.

    The decoder is split by tensor and pipeline parallelism, quantised and adapted as any Qwen3 is. Tower and connector
    are whole on every rank; with `mm_encoder_tp_mode="data"` the ranks share out the crops.
    """

    supports_encoder_tp_data = True

    packed_modules_mapping = {  # noqa: RUF012 (vLLM reads a plain class attribute)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # of adapters and of quantisation's lists; the weights themselves take the way through `load_weights`
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.vision_model.": "vision_model.",
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a picture in a prompt.

        Raises:
            ValueError: a modality other than image.
        """
        if modality.startswith("image"):
            return IMAGE_MARKER
        raise ValueError(f"modality: got {modality!r}, expected 'image'")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        self.sizes = self.config.sizes()
        self.shares_out_crops = model_config.get_multimodal_config().mm_encoder_tp_mode == "data"
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_model = _vision_model(self.sizes)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["Qwen3ForCausalLM"],
            )
            body = self.language_model.model
            if not isinstance(body.embed_tokens, PPMissingLayer):
                text = self.sizes.text
                body.embed_tokens = VocabParallelEmbedding(
                    text.vocab_size + text.additional_vocab_size, text.hidden_size
                )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self,
        crops: Tensor | None = None,
        image_masks: Tensor | None = None,
        keep: Tensor | None = None,
        num_crops: Tensor | None = None,
        num_rows: Tensor | None = None,
        **_: object,
    ) -> MultiModalEmbeddings:
        """Rows of all pictures of a batch, for their `<im_patch>` tokens in order.

        Args:
            crops: [T, N, patch_dim] of all pictures, uint8 levels or floats in [-1, 1].
            image_masks: [T, N].
            keep: [K], flat indices into each picture's own T * M windows.
            num_crops, num_rows: for each picture its share of T and of K.

        Returns:
            One tensor [rows, hidden_size] for each picture; nothing without pictures.
        """
        if crops is None:
            return []
        shares, rows = num_crops.flatten().tolist(), num_rows.flatten().tolist()
        windows = self.sizes.windows_per_crop
        first = [sum(shares[:index]) * windows for index in range(len(shares))]
        keep = torch.cat([part + start for part, start in zip(keep.split(rows), first, strict=True)])
        if not crops.is_floating_point():
            crops = crops.float().div_(255).mul_(2).sub_(1)
        tower = _shared_tower if self.shares_out_crops else run_tower
        return encode_crops(self.vision_model, crops, image_masks, keep, tower).split(rows)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """input_ids [S] -> [S, hidden_size]. Picture rows are added to the embeddings of their tokens, which is how
        the model was trained; vLLM's own way would replace them."""
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        rows = torch.cat(tuple(multimodal_embeddings)).to(embeds.dtype)
        target = is_multimodal.nonzero().squeeze(1).to(embeds.device, non_blocking=True)
        return embeds.index_add(0, target, rows)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor | IntermediateTensors:
        """Hidden states [S, hidden_size], or on all but the last pipeline rank what the next one needs."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits over the base vocabulary."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a released checkpoint; see `weights.served` for what is refused."""
        return AutoWeightsLoader(self).load_weights(checkpoint.served(self.sizes, weights))

    def get_mm_mapping(self) -> MultiModelKeys:
        """Names of the parts, for adapters."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="vision_model.vl_connector",
            tower_model="vision_model",
        )


def _vision_model(sizes: JinaVLMConfig) -> VisionModel:
    """The tower without the blocks after the last feature that is used."""
    vision = VisionModel(sizes)
    del vision.layers[checkpoint.last_block(sizes) + 1 :]
    if not checkpoint.uses_post_norm(sizes):
        vision.post_lnorm = None
    return vision


def _shared_tower(vision: VisionModel, crops: Tensor) -> list[Tensor]:
    """`run_tower` with the crops shared out among the ranks of tensor parallelism."""
    wide = run_dp_sharded_vision_model(crops, lambda part: torch.cat(run_tower(vision, part), dim=-1))
    return list(wide.chunk(len(vision.config.feature_slots), dim=-1))
