"""`attn_implementation="vlmkern"`: non-causal vision attention on `vlmkern.ops.attention`, the rest on sdpa."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ... import ops

NAME = "vlmkern"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Makes `attn_implementation="vlmkern"` work in `from_pretrained`, `from_config` and `set_attn_implementation`.

    Non-causal self-attention without a mask runs on `vlmkern.ops.attention`; whatever else a model asks for (causal
    attention, masks, dropout in training, grouped heads, soft caps) runs on transformers' sdpa as before, with one
    warning for each kind of module that says why. Calling it again does nothing.
    """
    AttentionInterface.register(NAME, attention_forward)
    # the masks of sdpa, which says "none" where nothing is masked, for the calls that fall through to it
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query, key, value [B, H, N, D] -> [B, N, H, D] and no weights."""
    reason = _unsupported(module, query, key, value, attention_mask, dropout, is_causal, kwargs)
    if reason is not None:
        if not torch.compiler.is_compiling():
            _warn_once(type(module).__name__, reason)
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    return ops.attention(*(_tokens_first(t) for t in (query, key, value)), scale=scaling), None


def _tokens_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _unsupported(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why the op cannot do this call, or None when it can."""
    if is_causal is None:
        # transformers' convention: a module that does not say is causal
        is_causal = getattr(module, "is_causal", True)
    if is_causal:
        return "it is causal"
    if attention_mask is not None:
        return "it has a mask"
    if dropout:
        return "it drops out attention weights"
    if query.shape != key.shape or query.shape != value.shape:
        return "its queries, keys and values differ in shape"
    if query.dtype not in _DTYPES or query.device.type not in ("cpu", "cuda"):
        return f"its tensors are {query.dtype} on {query.device.type}"
    for name in ("softcap", "position_bias", "s_aux", "sliding_window", "cache", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            return f"it asks for {name}"
    return "it asks for attention weights" if kwargs.get("output_attentions") else None


@functools.cache
def _warn_once(module: str, reason: str) -> None:
    warnings.warn(f"attn_implementation='vlmkern': {module} runs on sdpa, as {reason}", stacklevel=4)
