"""jina-vlm's config.json as transformers and vLLM read it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from ...models.jina_vlm.config import JinaVLMConfig
from . import MODEL_TYPE


class JvlmConfig(PretrainedConfig):
    """The released layout, kept as it is in `layout`, with the decoder as the `Qwen3Config` that vLLM builds from.

    Attributes:
        layout: config.json in the released layout; `JinaVLMConfig.from_dict` reads it.
        text_config: the decoder. Its `vocab_size` is the head's: the rows added for image tokens are not in it.

    Raises:
        ConfigError: the layout does not describe a jina-vlm that this package implements.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        layout: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if layout is None:
            # transformers makes an instance without arguments to find out the defaults
            default = JinaVLMConfig().to_dict()
            layout = {
                "model_type": MODEL_TYPE,
                "vision_config": vision_config or default["vision_config"],
                "text_config": text_config or default["text_config"],
            }
            for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id"):
                if kwargs.get(key) is not None:
                    layout[key] = kwargs[key]
        sizes = JinaVLMConfig.from_dict(layout)
        eos = sizes.eos_token_id
        ids = {"bos_token_id": sizes.bos_token_id, "eos_token_id": list(eos) if isinstance(eos, tuple) else eos}
        for key in (*ids, "tie_word_embeddings"):
            kwargs.pop(key, None)
        # first, because the base class looks at the decoder when it checks the rest
        self.layout = layout
        self.text_config = _decoder(sizes, ids)
        super().__init__(tie_word_embeddings=False, **ids, **kwargs)

    def sizes(self) -> JinaVLMConfig:
        """What the package's own modules are built from."""
        return JinaVLMConfig.from_dict(self.layout)


def _decoder(sizes: JinaVLMConfig, ids: dict[str, Any]) -> Qwen3Config:
    text = sizes.text
    return Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.mlp_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        hidden_act="silu",
        max_position_embeddings=text.max_length,
        rms_norm_eps=text.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        attention_bias=False,
        tie_word_embeddings=False,
        **ids,
    )


class TokenizerMode:
    """vLLM asks this what a model wants changed in its own configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Text is tokenised by `JinaVLMRenderer` unless the user chose another way."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = MODEL_TYPE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Nothing to change."""
