"""`vlmkern.ops.attention` under every vision tower in vLLM that uses its encoder attention (SigLIP among them)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

from ... import ops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_logger = logging.getLogger("vllm.vlmkern")


class VlmkernEncoderAttention(MMEncoderAttention):
    """Dense attention through `vlmkern.ops.attention`; the class it replaces does the rest: packed sequences, grouped
    heads, fp8, keys of another length than the queries, other dtypes."""

    def forward_native(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        """query, key and value [B, N, H * D] or [B, N, H, D] -> the same shape."""
        return self._ours(query, key, value, args, kwargs, super().forward_native)

    def forward_cpu(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        """As `forward_native`."""
        return self._ours(query, key, value, args, kwargs, super().forward_cpu)

    def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        """As `forward_native`."""
        return self._ours(query, key, value, args, kwargs, super().forward_cuda)

    def _ours(self, query, key, value, args, kwargs, theirs) -> Tensor:
        packed = (args and args[0] is not None) or kwargs.get("cu_seqlens") is not None
        if packed or not self._fits(query, key, value):
            return theirs(query, key, value, *args, **kwargs)
        q, k, v = (t.view(*t.shape[:2], self.num_heads, self.head_size) for t in (query, key, value))
        return ops.attention(q, k, v, scale=self.scale).view(query.shape)

    def _fits(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        return (
            self.num_heads == self.num_kv_heads
            and not self.fp8_enabled
            and query.dim() in (3, 4)
            and query.shape == key.shape == value.shape
            and query.dtype in _DTYPES
            and query.dtype == key.dtype == value.dtype
            and all(t.stride(-1) == 1 for t in (query, key, value))
        )


def install() -> None:
    """Puts `VlmkernEncoderAttention` in the place of vLLM's encoder attention, in models built from now on. Once is
    enough, more does no harm. Where another plugin was first, it stays, with a warning."""
    name = MMEncoderAttention.__name__
    present = op_registry_oot.get(name)
    if present is None:
        MMEncoderAttention.register_oot(VlmkernEncoderAttention, name=name)
    elif present is not VlmkernEncoderAttention:
        _logger.warning(
            "VLMKERN_VLLM_ATTENTION: %s is replaced by %s.%s already, which is kept",
            name,
            present.__module__,
            present.__qualname__,
        )
