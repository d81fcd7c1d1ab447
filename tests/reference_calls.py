"""The references of the ops, each called with what its problem holds, one after the other."""

from __future__ import annotations

from vlmkern.ops.attention import reference as _attention
from vlmkern.ops.attention.problem import Attention, AttentionGradient
from vlmkern.ops.attention_pool import reference as _attention_pool
from vlmkern.ops.attention_pool.problem import AttentionPoolGradient


def attention(*args):
    return _attention.attention(Attention(*args))


def attention_bwd(*args):
    return _attention.attention_bwd(AttentionGradient(*args))


def attention_pool_bwd(*args):
    return _attention_pool.attention_pool_bwd(AttentionPoolGradient(*args))
