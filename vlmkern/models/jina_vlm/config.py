"""Sizes of a jina-vlm model, and the released config.json layout they are read from and written to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._files import read_json_object, reason
from ...ops.attention_pool.windows import windows_per_tile
from .._shared.section import LARGEST_SIZE, ConfigError, Section, shown


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP2-so400m/14 tower at 378 px. `feature_layers` index the list of block outputs followed by the
    post-norm's output; negative values count from its end."""

    hidden_size: int = 1152
    num_layers: int = 27
    image_size: tuple[int, int] = (378, 378)
    patch_size: int = 14
    num_channels: int = 3
    num_heads: int = 16
    head_dim: int = 72
    mlp_size: int = 4304
    norm_eps: float = 1e-6
    feature_layers: tuple[int, ...] = (-4, -10)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of one crop."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one crop, N."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.patch_size**2 * self.num_channels

    @property
    def feature_slots(self) -> tuple[int, ...]:
        """`feature_layers` as non-negative indices; `num_layers` means the post-norm's output."""
        return tuple(i % (self.num_layers + 1) for i in self.feature_layers)


@dataclass(frozen=True)
class ConnectorConfig:
    """Attention pooling over windows of patches, then a SwiGLU projector."""

    num_heads: int = 16
    head_dim: int = 72
    window: tuple[int, int] = (2, 2)
    mlp_size: int = 6144
    output_size: int = 2048


@dataclass(frozen=True)
class TextConfig:
    """The Qwen3-1.7B decoder with extra embeddings for image tokens and an untied head."""

    hidden_size: int = 2048
    num_layers: int = 28
    vocab_size: int = 151936
    additional_vocab_size: int = 128
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_size: int = 6144
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_length: int = 40960


@dataclass(frozen=True)
class JinaVLMConfig:
    """All sizes of a jina-vlm; the defaults are the released model's."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    bos_token_id: int = 151643
    eos_token_id: int | tuple[int, ...] = 151643

    def __post_init__(self) -> None:
        self._check_sizes()
        v, t = self.vision, self.text
        if v.image_size[0] % v.patch_size or v.image_size[1] % v.patch_size:
            raise ConfigError(
                f"vision_config.input_size: got {v.image_size}, expected multiples of patch_size {v.patch_size}"
            )
        for layer in v.feature_layers:
            if not -(v.num_layers + 1) <= layer <= v.num_layers:
                raise ConfigError(
                    f"vision_config.vit_layers: got {layer}, expected an index into {v.num_layers + 1} outputs"
                )
        if self.connector.output_size != t.hidden_size:
            raise ConfigError(
                f"vision_config.output_size: got {self.connector.output_size}, "
                f"expected the decoder's hidden_size {t.hidden_size}"
            )
        if t.num_heads % t.num_kv_heads:
            raise ConfigError(
                f"text_config n_heads: got {t.num_heads}, expected a multiple of n_kv_heads {t.num_kv_heads}"
            )
        if t.head_dim % 2:
            raise ConfigError(f"text_config head_dim: got {t.head_dim}, expected an even number (pairs rotate)")
        for side, window, patches in zip("hw", self.connector.window, v.grid, strict=True):
            if window > patches:
                raise ConfigError(
                    f"vl_connector_config.pooling_{side}: got {window}, expected at most the crop's {patches} patches"
                )

    def _check_sizes(self) -> None:
        """Sizes, and the products that are sizes of tensors, are positive and leave room for arithmetic on them."""
        v, c, t = self.vision, self.connector, self.text
        sizes: dict[str, int] = {
            "vision_config.hidden_size": v.hidden_size,
            "vision_config.n_layers": v.num_layers,
            "vision_config.input_size[0]": v.image_size[0],
            "vision_config.input_size[1]": v.image_size[1],
            "vision_config.patch_size": v.patch_size,
            "vision_config.n_channels": v.num_channels,
            "vision_config n_heads": v.num_heads,
            "vision_config head_dim": v.head_dim,
            "vision_config ffn size": v.mlp_size,
            "vision_config.output_size": c.output_size,
            "vl_connector_config n_heads": c.num_heads,
            "vl_connector_config head_dim": c.head_dim,
            "vl_connector_config.pooling_h": c.window[0],
            "vl_connector_config.pooling_w": c.window[1],
            "vl_connector_config projector size": c.mlp_size,
            "text_config.hidden_size": t.hidden_size,
            "text_config.n_layers": t.num_layers,
            "text_config.vocab_size": t.vocab_size,
            "text_config.additional_vocab_size": t.additional_vocab_size,
            "text_config n_heads": t.num_heads,
            "text_config n_kv_heads": t.num_kv_heads,
            "text_config head_dim": t.head_dim,
            "text_config ffn size": t.mlp_size,
            "text_config.max_sequence_length": t.max_length,
        }
        products: dict[str, tuple[int, ...]] = {
            "vision_config n_heads * head_dim": (v.num_heads, v.head_dim),
            "vision_config.patch_size ** 2 * n_channels": (v.patch_size, v.patch_size, v.num_channels),
            "vision_config hidden_size * vit_layers": (v.hidden_size, len(v.feature_layers)),
            "vl_connector_config n_heads * head_dim": (c.num_heads, c.head_dim),
            "text_config n_heads * head_dim": (t.num_heads, t.head_dim),
        }
        for name, size in (sizes | {name: math.prod(factors) for name, factors in products.items()}).items():
            if not 1 <= size <= LARGEST_SIZE:
                raise ConfigError(f"{name}: got {shown(size)}, expected a size from 1 to {LARGEST_SIZE}")
        if v.num_patches > LARGEST_SIZE:
            raise ConfigError(
                f"vision_config.input_size: got {v.image_size}, which is {v.num_patches} patches, "
                f"expected at most {LARGEST_SIZE}"
            )

    @property
    def windows_per_crop(self) -> int:
        """Pooled windows of one crop, M (14 * 14 = 196 as released)."""
        return windows_per_tile(self.vision.grid, self.connector.window)

    @classmethod
    def tiny(cls) -> JinaVLMConfig:
        """A model of the released geometry (378 px crops, 27x27 patches, head dimension 72) and few weights."""
        return cls(
            vision=VisionConfig(hidden_size=144, num_layers=12, num_heads=2, mlp_size=288),
            connector=ConnectorConfig(num_heads=2, mlp_size=384, output_size=128),
            text=TextConfig(
                hidden_size=128,
                num_layers=2,
                vocab_size=512,
                additional_vocab_size=16,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                mlp_size=384,
            ),
            bos_token_id=0,
            eos_token_id=0,
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> JinaVLMConfig:
        """Reads `config.json` of a checkpoint directory.

        Raises:
            ConfigError: the file is missing, is not JSON, or does not describe a jina-vlm; it names the file.
        """
        directory = Path(directory)
        path = directory / "config.json"
        try:
            layout = read_json_object(path)
        except FileNotFoundError:
            raise ConfigError(f"{directory}: no config.json there, expected a jina-vlm checkpoint directory") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({reason(error)})") from None
        try:
            return cls.from_dict(layout)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, layout: Mapping[str, Any]) -> JinaVLMConfig:
        """Reads the released config.json layout.

        Raises:
            ConfigError: a key is missing, has the wrong type, or asks for a variant that this
                implementation does not have (it names the key, its value and what is expected).
        """
        root = Section("", layout)
        root.require("model_type", "jvlm", default="jvlm")
        root.require("tie_word_embeddings", False, default=False)
        return cls(
            vision=_read_vision(root.section("vision_config")),
            connector=_read_connector(root.section("vision_config")),
            text=_read_text(root.section("text_config")),
            bos_token_id=root.token_id("bos_token_id", cls.bos_token_id),
            eos_token_id=root.token_ids("eos_token_id", cls.eos_token_id),
        )

    def to_dict(self) -> dict[str, Any]:
        """The released config.json layout, readable by `from_dict`."""
        v, c, t = self.vision, self.connector, self.text
        layer_norm = {"type": "default", "with_affine": True, "eps": v.norm_eps, "bias": True}
        rms_norm = {"type": "rms", "with_affine": True, "eps": t.norm_eps, "bias": False}
        biases = {"q_bias": True, "k_bias": True, "v_bias": True, "o_bias": True}
        no_qk_norm = {"q_lnorm": False, "k_lnorm": False}
        eos = self.eos_token_id
        return {
            "model_type": "jvlm",
            "architectures": ["JinaVLMForConditionalGeneration"],
            "tie_word_embeddings": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "vision_config": {
                "hidden_size": v.hidden_size,
                "n_layers": v.num_layers,
                "input_size": list(v.image_size),
                "patch_size": v.patch_size,
                "n_channels": v.num_channels,
                "linear_patch_embedding": True,
                "patch_embedding_bias": True,
                "use_absolute_positional_embeddings": True,
                "use_cls_token": False,
                "pre_lnorm": False,
                "post_lnorm": True,
                "vit_layers": list(v.feature_layers),
                "output_size": c.output_size,
                "block_config": {
                    "attn_config": {
                        "n_heads": v.num_heads,
                        "n_kv_heads": None,
                        "head_dim": v.head_dim,
                        **biases,
                        **no_qk_norm,
                    },
                    "lnorm_config": layer_norm,
                    "ffn_config": {
                        "activation_type": "gelu_pytorch_tanh",
                        "size": v.mlp_size,
                        "bias": True,
                        "gated_activation": False,
                    },
                },
                "vl_connector_config": {
                    "pooling_type": "attention_meanq",
                    "padding_embed_type": "pad_and_partial_pad",
                    "projector_type": "mlp",
                    "pooling_h": c.window[0],
                    "pooling_w": c.window[1],
                    "attn_pooling_config": {
                        "n_heads": c.num_heads,
                        "n_kv_heads": None,
                        "head_dim": c.head_dim,
                        **biases,
                        **no_qk_norm,
                    },
                    "mlp_projector_config": {
                        "activation_type": "silu",
                        "size": c.mlp_size,
                        "bias": False,
                        "gated_activation": True,
                    },
                },
            },
            "text_config": {
                "hidden_size": t.hidden_size,
                "n_layers": t.num_layers,
                "vocab_size": t.vocab_size,
                "embedding_size": t.vocab_size,
                "additional_vocab_size": t.additional_vocab_size,
                "rope": True,
                "rope_theta": t.rope_theta,
                "rope_scaling": None,
                "partial_rotary_factor": 1.0,
                "max_sequence_length": t.max_length,
                "block_config": {
                    "lnorm_config": rms_norm,
                    "attn_config": {
                        "n_heads": t.num_heads,
                        "n_kv_heads": t.num_kv_heads,
                        "head_dim": t.head_dim,
                        "q_lnorm": True,
                        "k_lnorm": True,
                        "qkv_lnorm_on_heads": True,
                        "lnorm_config": dict(rms_norm),
                    },
                    "ffn_config": {
                        "activation_type": "silu",
                        "size": t.mlp_size,
                        "bias": False,
                        "gated_activation": True,
                    },
                },
            },
        }


def _read_vision(section: Section) -> VisionConfig:
    for key, expected in (
        ("linear_patch_embedding", True),
        ("patch_embedding_bias", True),
        ("use_absolute_positional_embeddings", True),
        ("use_cls_token", False),
        ("pre_lnorm", False),
        ("post_lnorm", True),
    ):
        section.require(key, expected, default=expected)
    image_size = section.integers("input_size")
    if len(image_size) != 2:
        raise ConfigError(f"vision_config.input_size: got {list(image_size)}, expected [height, width]")
    block = section.section("block_config")
    attention, mlp, norm = (
        block.section("attn_config"),
        block.section("ffn_config"),
        block.section("lnorm_config"),
    )
    _require_plain_attention(attention)
    for key, expected in (("type", "default"), ("with_affine", True), ("bias", True)):
        norm.require(key, expected, default=expected)
    mlp.require("activation_type", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    mlp.require("gated_activation", False, default=False)
    mlp.require("bias", True, default=True)
    hidden_size = section.integer("hidden_size")
    return VisionConfig(
        hidden_size=hidden_size,
        num_layers=section.integer("n_layers"),
        image_size=image_size,
        patch_size=section.integer("patch_size"),
        num_channels=section.integer("n_channels", 3),
        num_heads=attention.integer("n_heads"),
        head_dim=attention.integer("head_dim"),
        mlp_size=mlp.mlp_size(hidden_size),
        norm_eps=norm.eps(),
        feature_layers=section.integers("vit_layers"),
    )


def _read_connector(vision: Section) -> ConnectorConfig:
    section = vision.section("vl_connector_config")
    section.require("pooling_type", "attention_meanq", default="attention_meanq")
    section.require("padding_embed_type", "pad_and_partial_pad", default="pad_and_partial_pad")
    section.require("projector_type", "mlp", default="mlp")
    attention, mlp = section.section("attn_pooling_config"), section.section("mlp_projector_config")
    _require_plain_attention(attention)
    mlp.require("activation_type", "silu", default="silu")
    mlp.require("gated_activation", True, default=True)
    mlp.require("bias", False, default=False)
    return ConnectorConfig(
        num_heads=attention.integer("n_heads"),
        head_dim=attention.integer("head_dim"),
        window=(section.integer("pooling_h", 2), section.integer("pooling_w", 2)),
        mlp_size=mlp.integer("size"),
        output_size=vision.integer("output_size"),
    )


def _require_plain_attention(section: Section) -> None:
    for key in ("q_bias", "k_bias", "v_bias", "o_bias"):
        section.require(key, True, default=True)
    for key in ("q_lnorm", "k_lnorm"):
        section.require(key, False, default=False)
    section.require("sliding_window", -1, default=-1)
    heads = section.integer("n_heads")
    section.require("n_kv_heads", heads, default=heads)


def _read_rms_norm(section: Section) -> float:
    for key, expected in (("type", "rms"), ("with_affine", True), ("bias", False)):
        section.require(key, expected, default=expected)
    return section.eps()


def _read_text(section: Section) -> TextConfig:
    section.require("rope", True, default=True)
    section.require("rope_scaling", None, default=None)
    section.require("partial_rotary_factor", 1.0, default=1.0)
    section.require("tie_word_embeddings", False, default=False)
    block = section.section("block_config")
    attention, mlp, norm = (
        block.section("attn_config"),
        block.section("ffn_config"),
        block.section("lnorm_config"),
    )
    for key in ("q_lnorm", "k_lnorm", "qkv_lnorm_on_heads"):
        attention.require(key, True, default=True)
    attention.require("sliding_window", -1, default=-1)
    eps = _read_rms_norm(norm)
    if attention.get("lnorm_config", None) is not None:
        # queries and keys are normalised as the block's input is
        head_norm = attention.section("lnorm_config")
        if _read_rms_norm(head_norm) != eps:
            head_norm.require("eps", eps, default=1e-6)
    mlp.require("activation_type", "silu", default="silu")
    mlp.require("gated_activation", True, default=True)
    mlp.require("bias", False, default=False)
    hidden_size, vocab_size = section.integer("hidden_size"), section.integer("vocab_size")
    section.require("embedding_size", vocab_size, default=vocab_size)
    heads = attention.integer("n_heads")
    return TextConfig(
        hidden_size=hidden_size,
        num_layers=section.integer("n_layers"),
        vocab_size=vocab_size,
        additional_vocab_size=section.integer("additional_vocab_size", 128),
        num_heads=heads,
        num_kv_heads=attention.integer("n_kv_heads", heads),
        head_dim=attention.integer("head_dim"),
        mlp_size=mlp.mlp_size(hidden_size),
        norm_eps=eps,
        rope_theta=section.number("rope_theta"),
        max_length=section.integer("max_sequence_length", 40960),
    )
