"""`attn_implementation="vlmkern"`: attention of towers and decoders on `vlmkern.ops.attention`, the rest as before."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ... import ops
from . import masks

NAME = "vlmkern"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Makes `attn_implementation="vlmkern"` work in `from_pretrained`, `from_config` and `set_attn_implementation`.

    Towers and decoders run on `vlmkern.ops.attention`: with or without causal masks, windows, soft caps, fewer heads of
    keys, padding, and caches that grow or have room left. What else a model asks for (masks of other shapes, numbers
    added to scores, dropout in training) runs on transformers' sdpa, or eager where there is a cap, with one warning
    for each kind of module that says why. Calling it again does nothing.
    """
    AttentionInterface.register(NAME, attention_forward)
    # the masks of sdpa, which says "none" where nothing but what is behind is masked
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
    """transformers' interface: query [B, H, N, D], key, value [B, H_kv, M, D] -> [B, N, H, D] and no weights."""
    reason = _unsupported(query, key, value, dropout, kwargs)
    visible = None
    if reason is None and attention_mask is not None:
        if torch.compiler.is_compiling():
            reason = "it has a mask, whose values compiled code does not know"
        else:
            visible = masks.read(attention_mask, kwargs.get("sliding_window"))
            reason = "it has a mask of another shape" if visible is None else None
    if is_causal is None:
        # transformers' convention: a module that does not say is causal
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and is_causal and query.shape[2] > 1
    if reason is None and causal and query.shape[2] > key.shape[2]:
        reason = "it has more queries than keys"
    if reason is not None:
        if not torch.compiler.is_compiling():
            _warn_once(type(module).__name__, reason)
        if kwargs.get("softcap") is None:
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
        # which adds masks to scores
        if attention_mask is not None and attention_mask.dtype is torch.bool:
            hidden = query.new_full((), torch.finfo(query.dtype).min)
            attention_mask = torch.where(attention_mask, query.new_zeros(()), hidden)
        attended, _ = _eager(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended, None
    q, k, v = (_tokens_first(t) for t in (query, key, value))
    options = {"scale": scaling, "softcap": kwargs.get("softcap") or 0.0}
    if causal:
        # as sdpa has it: without a mask, what is behind the queries is room that a cache has left
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    if visible is None:
        return ops.attention(q, k, v, causal=causal, **options), None
    options |= {"causal": visible.causal, "window": (visible.window, -1)}
    if visible.padded:
        return _packed(q, k, v, visible, options), None
    seen = slice(visible.first[0], visible.last[0])
    return ops.attention(q, k[:, seen], v[:, seen], **options), None


def _packed(q: Tensor, k: Tensor, v: Tensor, visible: masks.Visible, options: dict[str, Any]) -> Tensor:
    """Sequences without their padding, one after the other; queries of padding get 0."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    spans_k = list(zip(visible.first, visible.last, strict=True))
    spans = [(max(0, queries - (b - a)) if visible.causal else 0, queries) for a, b in spans_k]
    rows, rows_k = (
        torch.cat([torch.arange(n * size + a, n * size + b, device=q.device) for n, (a, b) in enumerate(of)])
        for of, size in ((spans, queries), (spans_k, keys))
    )
    lengths, lengths_k = ([b - a for a, b in of] for of in (spans, spans_k))
    bounds, bounds_k = (
        torch.tensor([0, *n], device=q.device).cumsum(0, dtype=torch.int32) for n in (lengths, lengths_k)
    )
    packed = ops.attention(
        q.flatten(0, 1)[rows],
        k.flatten(0, 1)[rows_k],
        v.flatten(0, 1)[rows_k],
        cu_seqlens=bounds,
        max_seqlen=max(lengths),
        cu_seqlens_k=bounds_k,
        max_seqlen_k=max(lengths_k),
        **options,
    )
    return q.new_zeros(batch * queries, *q.shape[2:]).index_copy(0, rows, packed).unflatten(0, (batch, queries))


def _tokens_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _eager(module: nn.Module) -> Any:
    """The function that a model computes attention with itself."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _unsupported(query: Tensor, key: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why the op cannot do this call, whatever its mask, or None when it can."""
    if dropout:
        return "it drops out attention weights"
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        return "its queries, keys and values differ in their head dimension"
    if query.dtype not in _DTYPES or query.device.type not in ("cpu", "cuda"):
        return f"its tensors are {query.dtype} on {query.device.type}"
    for name in ("position_bias", "s_aux", "cache", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            return f"it asks for {name}"
    return "it asks for attention weights" if kwargs.get("output_attentions") else None


@functools.cache
def _warn_once(module: str, reason: str) -> None:
    warnings.warn(f"attn_implementation='vlmkern': {module} does not run on the op, as {reason}", stacklevel=4)
