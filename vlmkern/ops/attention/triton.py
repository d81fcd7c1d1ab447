"""Attention on GPUs: the Triton kernels of `vlmkern.kernels.attention`."""

from __future__ import annotations

from torch import Tensor

from ...dispatch.targets import Target
from ...kernels.attention import backward, forward
from .problem import Attention, AttentionGradient


def supports(p: Attention, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    if p.q.dtype in forward.DTYPES and p.q.shape[-1] <= forward.MAX_HEAD_DIM:
        return None
    return (
        f"it has no kernel for head dimension {p.q.shape[-1]} in {p.q.dtype}; it takes up to {forward.MAX_HEAD_DIM} in"
        " float32, bfloat16 and float16"
    )


def supports_bwd(p: AttentionGradient, target: Target) -> str | None:
    """The same of its gradients."""
    return supports(p.forward, target)


def attention(p: Attention) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    return forward.attention_fwd(*p)


def attention_bwd(p: AttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.py."""
    return backward.attention_bwd(*p)
