"""Forwards for the modules of others, in the form that Hugging Face's `kernels` library takes.

A layer has no constructor and no state: `kernelize` gives its `forward` to a module that has the parameters. Which
layer fits which module is the user's to say, with `use_kernel_mapping`; `vlmkern.patch` finds
out by itself.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .nn import functional


class SelfAttention(nn.Module):
    """Non-causal self-attention of vision towers: SigLIP, SigLIP2, CLIP, Idefics.

    Of its module: linear layers `q_proj`, `k_proj`, `v_proj`, `out_proj`; `num_heads`; `scale` where it has one.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [B, N, C] -> [B, N, C] and no weights. With a mask, as SDPA takes it, SDPA attends."""
        qkv = [(p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj)]
        scale, out = getattr(self, "scale", None), (self.out_proj.weight, self.out_proj.bias)
        if attention_mask is None:
            return functional.self_attention(hidden_states, qkv, out, self.num_heads, scale=scale), None
        q, k, v = (F.linear(hidden_states, *p).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=scale)
        return F.linear(attended.transpose(1, 2).flatten(2), *out), None


class GeluTanhMLP(nn.Module):
    """MLP of vision towers: fc2(gelu_tanh(fc1(x))).

    Of its module: linear layers `fc1` and `fc2`. Its activation is not looked at.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        up, down = ((layer.weight, layer.bias) for layer in (self.fc1, self.fc2))
        return functional.mlp(hidden_states, up, down, "gelu_tanh")


class SwiGLUMLP(nn.Module):
    """Gated MLP of language models and projectors: down_proj(silu(gate_proj(x)) * up_proj(x)).

    Of its module: linear layers `gate_proj`, `up_proj`, `down_proj`. Its activation is not looked at.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., E]."""
        return functional.gated_mlp(
            x, *((layer.weight, layer.bias) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        )


class RMSNorm(nn.Module):
    """RMSNorm of language models, and of their queries and keys: Llama, Qwen; not of Gemma, whose weights lack 1.

    Of its module: `weight` [C] and `variance_epsilon`. Rounds once, behind the weight, where those round before it too.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return ops.rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
