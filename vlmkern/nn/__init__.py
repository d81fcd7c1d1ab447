"""Modules over the ops, with the state-dict names of the released jina-vlm checkpoint."""

from . import functional
from .attention import TileAttention
from .attention_pool import AttentionPool
from .connector import VisionLanguageConnector
from .swiglu_mlp import SwiGLUMLP

__all__ = ["AttentionPool", "SwiGLUMLP", "TileAttention", "VisionLanguageConnector", "functional"]
