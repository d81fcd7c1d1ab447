"""The ops, as plain functions over torch custom ops (`torch.ops.vlmkern.*`)."""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .attention_pool import attention_pool
from .linear import linear
from .rms_norm import rms_norm
from .swiglu_mlp import swiglu_mlp

__all__ = ["add_layer_norm", "attention", "attention_pool", "linear", "rms_norm", "swiglu_mlp"]
