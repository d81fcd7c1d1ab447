"""jina-vlm: overlap-and-resize tiling, a SigLIP2 tower, 2x2 attention pooling, a Qwen3 decoder."""

from .cache import KVCache
from .checkpoint import CheckpointError
from .config import ConfigError, ConnectorConfig, JinaVLMConfig, TextConfig, VisionConfig
from .image_processor import ImageInputs, JinaVLMImageProcessor
from .model import JinaVLM
from .processor import JinaVLMProcessor
from .vision import VisionPath

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConnectorConfig",
    "ImageInputs",
    "JinaVLM",
    "JinaVLMConfig",
    "JinaVLMImageProcessor",
    "JinaVLMProcessor",
    "KVCache",
    "TextConfig",
    "VisionConfig",
    "VisionPath",
]
