"""All kinds of module that are swapped, in the order in which they are tried."""

from __future__ import annotations

from .attention import JinaSelfAttention, PackedSelfAttention, SelfAttention, TorchAttention
from .blocks import Block
from .connectors import Connector
from .encoders import Encoder
from .mlp import MLP, FusedSwiGLU, GatedMLP, NormedMLP
from .norms import RMSNorm
from .perceivers import PerceiverConnector
from .swap import Swap

KINDS: tuple[Swap, ...] = (
    RMSNorm(),
    SelfAttention(("q_proj", "k_proj", "v_proj"), "out_proj"),  # SigLIP, CLIP, Idefics
    SelfAttention(("q_proj", "k_proj", "v_proj"), "o_proj"),  # DINOv2, ViT; what decoders have is told by its forward
    SelfAttention(("q_proj", "k_proj", "v_proj"), "projection_layer"),  # InternVL
    SelfAttention(("qkv",), "proj"),  # timm
    PackedSelfAttention(("qkv",), "proj"),  # Qwen2-VL, 2.5-VL, 3-VL
    TorchAttention(),  # open_clip
    JinaSelfAttention(),
    NormedMLP("norm", "linear_fc1", "linear_fc2"),  # Qwen3-VL's mergers
    NormedMLP("layer_norm", "linear_1", "linear_2"),  # InternVL's projector
    MLP("fc1", "fc2"),
    MLP("up", "down"),
    MLP("linear_fc1", "linear_fc2"),  # Qwen3-VL
    MLP("linear_1", "linear_2"),  # LLaVA's projectors
    MLP("c_fc", "c_proj"),  # open_clip
    MLP("0", "2"),  # Qwen2-VL's merger
    GatedMLP(),
    FusedSwiGLU(),
    Block("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    Block("attn_lnorm", "attn", "ffn_lnorm", "ffn"),
    Block("norm1", "attn", "norm2", "mlp", ("ls1", "ls2")),  # Qwen2-VL; timm
    Block("norm1", "attention", "norm2", "mlp", ("layer_scale1", "layer_scale2")),  # DINOv2
    Block("layernorm_before", "attention", "layernorm_after", "mlp", ("lambda_1", "lambda_2")),  # InternVL, ViT
    Block("ln_1", "attn", "ln_2", "mlp", ("ls_1", "ls_2")),  # open_clip
    Encoder(),
    PerceiverConnector(),
    Connector(),
)
