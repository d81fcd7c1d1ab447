"""Sizes of a jina-vlm model, and the released config.json layout they are read from and written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...ops._windows import windows_per_tile


class ConfigError(ValueError):
    """A configuration is missing a key, or asks for something this implementation does not do."""


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
            ConfigError: the file is missing, is not JSON, or does not describe a jina-vlm.
        """
        path = Path(directory) / "config.json"
        try:
            layout = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{directory}: no config.json there, expected a jina-vlm checkpoint directory") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
        return cls.from_dict(layout)

    @classmethod
    def from_dict(cls, layout: Mapping[str, Any]) -> JinaVLMConfig:
        """Reads the released config.json layout.

        Raises:
            ConfigError: a key is missing, has the wrong type, or asks for a variant that this
                implementation does not have (it names the key, its value and what is expected).
        """
        root = _Section("", layout)
        root.require("model_type", "jvlm", default="jvlm")
        root.require("tie_word_embeddings", False, default=False)
        eos = root.get("eos_token_id", cls.eos_token_id)
        return cls(
            vision=_read_vision(root.section("vision_config")),
            connector=_read_connector(root.section("vision_config")),
            text=_read_text(root.section("text_config")),
            bos_token_id=root.get("bos_token_id", cls.bos_token_id),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
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
                        "lnorm_config": rms_norm,
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


_MISSING = object()


class _Section:
    """One level of the layout; errors carry the dotted path of the key."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path or 'config'}: got {type(values).__name__}, expected an object")
        self._path, self._values = path, values

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def section(self, key: str) -> _Section:
        return _Section(self._name(key), self.get(key))

    def get(self, key: str, default: Any = _MISSING) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConfigError(f"{self._name(key)}: missing from the config")
        return default

    def integer(self, key: str, default: Any = _MISSING) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self._name(key)}: got {value!r}, expected a positive integer")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self._name(key)}: got {value!r}, expected a positive number")
        return float(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        if not isinstance(value, (list, tuple)) or not value or not all(type(i) is int for i in value):
            raise ConfigError(f"{self._name(key)}: got {value!r}, expected a list of integers")
        return tuple(value)

    def require(self, key: str, *expected: Any, default: Any) -> None:
        """The key, or its default where absent, must have one of the values that are implemented."""
        value = self.get(key, default)
        if value not in expected:
            raise ConfigError(f"{self._name(key)}: got {value!r}, expected {' or '.join(map(repr, expected))}")

    def mlp_size(self, hidden_size: int) -> int:
        return self.integer("size", default=int(self.get("ratio", 4) * hidden_size))


def _read_vision(section: _Section) -> VisionConfig:
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
    norm.require("type", "default", default="default")
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
        norm_eps=norm.number("eps", 1e-6),
        feature_layers=section.integers("vit_layers"),
    )


def _read_connector(vision: _Section) -> ConnectorConfig:
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


def _require_plain_attention(section: _Section) -> None:
    for key in ("q_bias", "k_bias", "v_bias", "o_bias"):
        section.require(key, True, default=True)
    for key in ("q_lnorm", "k_lnorm"):
        section.require(key, False, default=False)
    section.require("sliding_window", -1, default=-1)
    heads = section.integer("n_heads")
    section.require("n_kv_heads", heads, default=heads)


def _read_text(section: _Section) -> TextConfig:
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
    norm.require("type", "rms", default="rms")
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
        norm_eps=norm.number("eps", 1e-6),
        rope_theta=section.number("rope_theta"),
        max_length=section.integer("max_sequence_length", 40960),
    )
