"""Released models by name: which system each is of, and the sizes that FLOPs and bytes follow from.

Sources: the public configurations and the papers. The layers and heads of Gemma 2 9B, Qwen2.5 0.5B and 72B, and the
vocabularies of InternVL 2.5, are as commonly reported; they are not in the papers of the systems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..models._shared.views import ViewPlan
from ..models.towervision.tiling import plan_frames
from .formulas import Sizes
from .parts import Connector, Decoder, Encoder, Projector, Resampler

__all__ = ["ARCHITECTURES", "Architecture"]


class Architecture(NamedTuple):
    """A model's system, which says how it sees a picture, and its parts.

    Attributes:
        plan: what plans the views, where not the system's own rule for pictures.
    """

    system: str
    encoder: Encoder
    connector: Connector
    decoder: Decoder
    plan: Callable[..., ViewPlan] | None = None


_JINA = Sizes()

# all blocks, as transformers computes them, though LLaVA uses no output of the last
_SIGLIP = Encoder(layers=27, width=1152, heads=16, head_dim=72, mlp=4304)
# a patch is of two frames, also where they are the same picture
_QWEN2_VIT = Encoder(layers=32, width=1280, heads=16, head_dim=80, mlp=5120, patch_inputs=1176)
_INTERNVIT_300M = Encoder(layers=24, width=1024, heads=16, head_dim=64, mlp=4096, extra_tokens=1)
_INTERNVIT_6B = Encoder(layers=45, width=3200, heads=25, head_dim=128, mlp=12800, extra_tokens=1)

# every second layer of Gemma 2 sees a window; vocabularies are with the tokens that the systems add
_GEMMA2_2B = Decoder(
    26, 2304, heads=8, kv_heads=4, head_dim=256, mlp=9216, vocabulary=256_000, window=4096, windowed_layers=13
)
_GEMMA2_9B = Decoder(
    42, 3584, heads=16, kv_heads=8, head_dim=256, mlp=14336, vocabulary=256_000, window=4096, windowed_layers=21
)
_MISTRAL_7B = Decoder(
    32, 4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocabulary=32_002, window=4096, windowed_layers=32
)
_QWEN2_1_5B = Decoder(28, 1536, heads=12, kv_heads=2, head_dim=128, mlp=8960, vocabulary=151_936)
_QWEN2_7B = Decoder(28, 3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocabulary=152_064)
_QWEN2_5_0_5B = Decoder(24, 896, heads=14, kv_heads=2, head_dim=64, mlp=4864, vocabulary=151_674)
_QWEN2_5_72B = Decoder(80, 8192, heads=64, kv_heads=8, head_dim=128, mlp=29568, vocabulary=151_674)
_INTERNLM2_5_7B = Decoder(32, 4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocabulary=92_553)
_INTERNLM2_5_20B = Decoder(48, 6144, heads=48, kv_heads=8, head_dim=128, mlp=16384, vocabulary=92_553)


def _towervision(encoder: Encoder, decoder: Decoder, plan: Callable[..., ViewPlan] | None = None) -> Architecture:
    # a video's frames are pooled after both of its layers
    projector = Projector((encoder.width, decoder.width, decoder.width))
    return Architecture("towervision", encoder, projector, decoder, plan)


def _qwen2_vl(decoder: Decoder) -> Architecture:
    merged = 4 * _QWEN2_VIT.width
    return Architecture("qwen2-vl", _QWEN2_VIT, Projector((merged, merged, decoder.width), merge=2), decoder)


def _internvl(encoder: Encoder, decoder: Decoder) -> Architecture:
    projector = Projector((4 * encoder.width, decoder.width, decoder.width), merge=2)
    return Architecture("internvl2.5", encoder, projector, decoder)


ARCHITECTURES: dict[str, Architecture] = {
    "jina-vlm": Architecture("jina-vlm", _JINA.encoder, _JINA.connector, _JINA.decoder),
    "towervision-2b": _towervision(_SIGLIP, _GEMMA2_2B),
    "towervision-9b": _towervision(_SIGLIP, _GEMMA2_9B),
    # LLaVA-OneVision's configurations leave the unused block out
    "towervideo-2b": _towervision(_SIGLIP._replace(layers=26), _GEMMA2_2B, plan_frames),
    "idefics2-8b": Architecture(
        "idefics2",
        _SIGLIP,
        Resampler(
            encoder_width=1152,
            projection_mlp=14336,
            width=4096,
            latents=64,
            layers=3,
            heads=16,
            kv_heads=4,
            head_dim=96,
            mlp=16384,
        ),
        _MISTRAL_7B,
    ),
    "qwen2-vl-2b": _qwen2_vl(_QWEN2_1_5B),
    "qwen2-vl-7b": _qwen2_vl(_QWEN2_7B),
    "internvl2.5-1b": _internvl(_INTERNVIT_300M, _QWEN2_5_0_5B),
    "internvl2.5-8b": _internvl(_INTERNVIT_300M, _INTERNLM2_5_7B),
    "internvl2.5-26b": _internvl(_INTERNVIT_6B, _INTERNLM2_5_20B),
    "internvl2.5-78b": _internvl(_INTERNVIT_6B, _QWEN2_5_72B),
}
