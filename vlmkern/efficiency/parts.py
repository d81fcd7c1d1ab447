"""FLOPs of the parts that vision-language models are made of: encoder, connectors of each kind, decoder.

One multiply-add counts as two FLOPs. Softmax, norms, activations, biases, rotations and resizings are left out.
``views`` is the number of patches of each view: no view's patches see another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

__all__ = ["AttentionPooling", "Connector", "Decoder", "Encoder", "Projector", "Resampler", "linear"]


def linear(rows: int, inputs: int, outputs: int) -> int:
    """FLOPs of one linear layer over ``rows`` rows."""
    return 2 * rows * inputs * outputs


class Encoder(NamedTuple):
    """A vision transformer: patch embedding, then blocks of full attention and an MLP of two layers.

    Attributes:
        layers: blocks that are run.
        patch_inputs: values of a patch.
        extra_tokens: tokens of each view beside its patches, as a class token.
    """

    layers: int
    width: int
    heads: int
    head_dim: int
    mlp: int
    patch_inputs: int = 588
    extra_tokens: int = 0

    def patch_embed(self, views: Sequence[int]) -> int:
        """The linear layer that makes patches tokens."""
        return linear(sum(views), self.patch_inputs, self.width)

    def projections(self, views: Sequence[int]) -> int:
        """Query, key, value and output layers of all blocks."""
        return self.layers * linear(self._tokens(views), self.width, 4 * self.heads * self.head_dim)

    def attention(self, views: Sequence[int]) -> int:
        """Both products of attention in all blocks: 4 * N * N * H * D a view of N tokens."""
        pairs = sum((patches + self.extra_tokens) ** 2 for patches in views)
        return self.layers * 4 * pairs * self.heads * self.head_dim

    def mlps(self, views: Sequence[int]) -> int:
        """Both layers of all MLPs."""
        return self.layers * linear(self._tokens(views), self.width, 2 * self.mlp)

    def _tokens(self, views: Sequence[int]) -> int:
        return sum(views) + self.extra_tokens * len(views)


class Decoder(NamedTuple):
    """A language model of grouped-query attention and gated MLPs; its embedding table computes nothing.

    Attributes:
        vocabulary: rows of the head.
        window: tokens that a token sees at most in ``windowed_layers`` of the layers; None: all before it.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    window: int | None = None
    windowed_layers: int = 0

    @property
    def projection_weights(self) -> int:
        """Weights of the query, key, value and output layers of one block."""
        return 2 * self.width * (self.heads + self.kv_heads) * self.head_dim

    @property
    def mlp_weights(self) -> int:
        """Weights of the MLP of one block: gate, value and down."""
        return 3 * self.width * self.mlp

    def projections(self, tokens: int) -> int:
        """Query, key, value and output layers over a prompt of ``tokens`` tokens."""
        return 2 * self.layers * self.projection_weights * tokens

    def attention(self, tokens: int) -> int:
        """Both products of causal attention: half of the square, 2 * S * S * H * D a layer, less what windows hide."""
        hidden = 0 if self.window is None else self.windowed_layers * max(0, tokens - self.window) ** 2
        return 2 * (self.layers * tokens**2 - hidden) * self.heads * self.head_dim

    def mlps(self, tokens: int) -> int:
        """All three layers of all MLPs."""
        return 2 * self.layers * self.mlp_weights * tokens

    def head(self, tokens: int = 1) -> int:
        """Logits of ``tokens`` tokens; a prompt's last one is all that generation asks for."""
        return linear(tokens, self.width, self.vocabulary)

    def kv_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Keys and values of ``tokens`` tokens in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value * tokens


class Connector(Protocol):
    """What stands between encoder and decoder."""

    def flops(self, views: Sequence[int]) -> int:
        """Of connecting views of so many patches each."""


class Projector(NamedTuple):
    """Linear layers one after the other, on each patch or on ``merge`` x ``merge`` patches side by side.

    Attributes:
        widths: of the first layer's input, of what is between layers, and of the last layer's output.
    """

    widths: tuple[int, ...]
    merge: int = 1

    def flops(self, views: Sequence[int]) -> int:
        rows = sum(views) // self.merge**2
        return sum(linear(rows, inputs, outputs) for inputs, outputs in pairwise(self.widths))


class Resampler(NamedTuple):
    """Idefics2's connector: a gated projection of every patch, then a perceiver of ``latents`` queries a view.

    Each of its layers computes keys and values of the projected patches and of the latents, whose MLP is gated too.
    """

    encoder_width: int
    projection_mlp: int
    width: int
    latents: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    def flops(self, views: Sequence[int]) -> int:
        patches, latents = sum(views), self.latents * len(views)
        projection = linear(patches, self.encoder_width, 2 * self.projection_mlp)
        projection += linear(patches, self.projection_mlp, self.width)
        queries_and_out = linear(latents, self.width, 2 * self.heads * self.head_dim)
        keys_and_values = linear(patches + latents, self.width, 2 * self.kv_heads * self.head_dim)
        pairs = sum(self.latents * (count + self.latents) for count in views)
        mlp = linear(latents, self.width, 3 * self.mlp)
        return projection + self.layers * (
            queries_and_out + keys_and_values + 4 * pairs * self.heads * self.head_dim + mlp
        )


class AttentionPooling(NamedTuple):
    """jina-vlm's connector: windows of patches pooled to one token each (paper Eq. 3), then a gated projector (Eq. 4).

    Attributes:
        features: values of a slot, of all hidden states that are read side by side.
        inner: width of all heads together.
        window: slots along one side of a window; those beyond a view's last patch are zeros, and computed.
    """

    features: int
    inner: int
    width: int
    projector_mlp: int
    out: int
    window: int = 2

    def flops(self, views: Sequence[int]) -> int:
        """Of pooling every window of square views."""
        windows = sum((-(-math.isqrt(patches) // self.window)) ** 2 for patches in views)
        return self.pooling(windows, windows * self.window**2) + self.projector(windows)

    def pooling(self, windows: int, slots: int) -> int:
        """The naive form: keys and values of each slot, query and output of each window.

        Scores inside a window (4 slots each) are left out; at 2,366 windows they come to 4e-5 TFLOP.
        """
        keys_and_values = linear(slots, self.features, 2 * self.inner)
        return keys_and_values + linear(windows, self.features, self.inner) + linear(windows, self.inner, self.width)

    def projector(self, tokens: int) -> int:
        """The gated projector into the decoder's width."""
        return linear(tokens, self.width, 2 * self.projector_mlp) + linear(tokens, self.projector_mlp, self.out)
