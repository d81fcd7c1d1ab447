"""The native kernels below their ops, each called with what its problem holds, one after the other."""

from __future__ import annotations

from vlmkern.ops.attention import native as _attention
from vlmkern.ops.attention.problem import Attention, AttentionGradient
from vlmkern.ops.attention_pool import native as _attention_pool
from vlmkern.ops.attention_pool.problem import AttentionPool, AttentionPoolGradient
from vlmkern.ops.linear import native as _linear
from vlmkern.ops.linear.problem import Linear
from vlmkern.ops.swiglu_mlp.native import silu_mul, silu_mul_bwd

__all__ = [
    "attention",
    "attention_bwd",
    "attention_pool",
    "attention_pool_bwd",
    "linear",
    "raw_attention",
    "raw_attention_bwd",
    "silu_mul",
    "silu_mul_bwd",
]


def attention(*args):
    return _attention.attention(Attention(*args))


def attention_bwd(*args):
    return _attention.attention_bwd(AttentionGradient(*args))


def attention_pool(*args):
    return _attention_pool.attention_pool(AttentionPool(*args))


def attention_pool_bwd(*args):
    return _attention_pool.attention_pool_bwd(AttentionPoolGradient(*args))


def linear(*args):
    return _linear.linear(Linear(*args))


def raw_attention(**changes):
    """Arguments of the extension's own function, by name: two tokens of three heads of eight, at no real address."""
    tensors = dict.fromkeys("qkv", (64, (48, 24, 8)))
    return {"dtype": 0, **tensors, "out": 64, "lse": 64, **_asked(), **changes}


def raw_attention_bwd(**changes):
    """The same of its gradients."""
    tensors = dict.fromkeys(("grad", "q", "k", "v", "out"), (64, (48, 24, 8)))
    return {"dtype": 0, **tensors, "lse": 64, "dq": 64, "dk": 64, "dv": 64, **_asked(), **changes}


def _asked():
    return {
        "sizes": (1, 2, 2, 3, 3, 8),
        "bounds": (0, 0, 0),
        "scoring": (1.0, 0.0, -1, -1),
        "tables": ([], False),
        "threads": 1,
    }
