"""Attention pooling on CPU: torch's projections around the C++ kernels of csrc/cpu/attention_pool/heads.h.

Keys are never made, and values are pooled before they are projected: reference.py has the plain form, the C++ source
the algebra.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...dispatch.extension import dtype_code, extension, extents, lacks
from ...dispatch.targets import Target
from ...packing import packed
from .._cpu_products import linear, product
from .problem import AttentionPool, AttentionPoolGradient
from .windows import find_slots, gather, pad_kind, pad_rows, scatter


def supports(p: AttentionPool, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    if p.features[0].shape[2] == 0:
        return "it has no kernel for features without channels"
    return lacks(p.features[0].dtype)


def supports_bwd(p: AttentionPoolGradient, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    return lacks(p.grad.dtype)


def kernel(p: AttentionPool) -> str:
    """Which of them runs."""
    return "attention_pool_slots" if _of_one_head(p) else "attention_pool_context"


def attention_pool(p: AttentionPool) -> Tensor:
    """See reference.py."""
    features, w_q, b_q, w_kv, b_kv, w_o, b_o, grid, num_heads, window, pad_embed, mask, keep = p
    first, shape, width = features[0], p.windows_shape, p.width
    tiles, _, channels = first.shape
    windows = math.prod(shape)
    if windows == 0:
        return first.new_empty((*shape, len(w_o)))
    w_k, w_v = w_kv.contiguous().split([len(w_q), w_o.shape[1]])
    b_v = None if b_kv is None else b_kv.contiguous()[len(w_q) :]
    pad = None if mask is None else pad_kind(mask)
    pad_embed = None if pad_embed is None else pad_embed.contiguous()
    keep = None if keep is None else keep.contiguous()
    threads = torch.get_num_threads()
    problem = extension().AttentionPool(
        dtype_code(first.dtype),
        [(f.data_ptr(), f.stride(0), f.stride(1)) for f in features],
        tiles,
        channels,
        grid,
        window,
        _address(pad),
        _address(pad_embed),
        _address(keep),
        windows,
        extents(*features, pad, pad_embed, keep),
    )

    mean = first.new_empty((windows, width))
    problem.mean(mean.data_ptr(), threads, extents(mean))
    key_dim = len(w_q) // num_heads
    if _of_one_head(p):
        folded = _folded(w_q, b_q, w_kv, b_kv, w_o, b_o)
        # both products of the one head are as wide as the library likes them; the result takes the means' place
        if folded is None:
            q = linear(mean, w_q, _with_key_bias(b_q, b_kv, key_dim))
            absorbed = linear(q, w_k.T, None)
        else:
            absorbed = linear(mean, *folded[:2])
        problem.slots(absorbed.data_ptr(), mean.data_ptr(), p.scale, threads, extents(absorbed, mean))
        if folded is not None:
            return linear(mean, *folded[2:]).view(*shape, len(w_o))
        context = linear(mean, w_v, b_v)
    else:
        q = linear(mean, w_q, _with_key_bias(b_q, b_kv, len(w_q)))
        context = first.new_empty((windows, len(w_v)))
        problem.context(
            q.data_ptr(),
            w_k.data_ptr(),
            w_v.data_ptr(),
            _address(b_v),
            context.data_ptr(),
            num_heads,
            key_dim,
            len(w_v) // num_heads,
            key_dim**-0.5,
            threads,
            extents(q, w_k, w_v, b_v, context),
        )
    return linear(context, w_o, b_o).view(*shape, len(w_o))


def _of_one_head(p: AttentionPool) -> bool:
    # a query among the slots may be too large for float16 where the keys are not: the other kernel has it in float32
    return p.num_heads == 1 and p.features[0].dtype != torch.float16


def attention_pool_bwd(p: AttentionPoolGradient) -> list[Tensor]:
    """See reference.py."""
    grad, features, w_q, b_q, w_kv, b_kv, w_o, grid, num_heads, window, pad_embed, mask, keep, wanted = p
    tiles, patches, channels = features[0].shape
    slots = find_slots(tiles, grid, window, keep, grad.device)
    x = gather(features, slots, pad_embed, mask)
    d_out = grad.reshape(len(x), len(w_o))
    tensors = (d_out, x, w_q, b_q, w_kv, b_kv, w_o)
    if x.dtype == torch.float16:
        # vectors of the algebra may be too large for float16 where keys and values are not
        tensors = tuple(None if t is None else t.float() for t in tensors)
    d_x, of_weights = _attend_bwd(*tensors, num_heads)
    per_patch = scatter(d_x, slots, tiles * patches).to(x.dtype)
    grads = [d.contiguous() for d in per_patch.view(tiles, patches, len(features), channels).unbind(2)]
    grads += [*(gradient.to(x.dtype) for gradient in of_weights), d_out.sum(0)]
    if mask is not None:
        # chosen, not multiplied by zeros: gradients of other patches may be NaN
        chosen = (row.flatten().unsqueeze(-1) for row in pad_rows(mask))
        grads.append(torch.stack([torch.where(row, per_patch, 0).sum(0) for row in chosen]))
    return [g for g, want in zip(grads, wanted, strict=False) if want]


# bytes of the vectors that are held for a few heads at once
_VECTORS = 1 << 24


def _attend_bwd(
    d_out: Tensor,
    x: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    num_heads: int,
) -> tuple[Tensor, list[Tensor]]:
    """d_out [W, Co], slots x [W, J, L*C] -> gradients by x, in float32, and by (w_q, b_q, w_kv, b_kv, w_o).

    With neither keys nor values: csrc/cpu/attention_pool/backward.cpp has the algebra. A third of the products' work at
    four slots a window, a few heads at a time."""
    b_q = _with_key_bias(b_q, b_kv, len(w_q))
    x = x.contiguous()
    windows, size, width = x.shape
    key_dim, value_dim = len(w_q) // num_heads, w_o.shape[1] // num_heads
    w_k, w_v = w_kv.contiguous().split([len(w_q), w_o.shape[1]])
    mean = x.mean(1)
    q, d_ctx = product(mean, w_q, b_q), product(d_out, w_o.T, None)
    context, d_q = torch.empty_like(d_ctx), torch.empty_like(q)
    d_w_kv = torch.empty_like(w_kv, memory_format=torch.contiguous_format)
    d_w_k, d_w_v = d_w_kv.split([len(w_q), w_o.shape[1]])
    d_x = x.new_zeros(x.shape, dtype=torch.float32)
    d_b_v = d_ctx.sum(0)
    group = max(1, _VECTORS // max(1, 2 * windows * width * x.element_size()))
    for first in range(0, num_heads, group):
        heads = range(first, min(first + group, num_heads))
        keys = [slice(h * key_dim, (h + 1) * key_dim) for h in heads]
        values = [slice(h * value_dim, (h + 1) * value_dim) for h in heads]
        vectors = [
            (product(q[:, key], w_k[key].T, None), product(d_ctx[:, value], w_v[value].T, None))
            for key, value in zip(keys, values, strict=True)
        ]
        extension().attention_pool_slots_bwd(
            dtype_code(x.dtype),
            x.data_ptr(),
            [(a.data_ptr(), b.data_ptr()) for a, b in vectors],
            d_x.data_ptr(),
            windows,
            size,
            width,
            key_dim**-0.5,
            torch.get_num_threads(),
            extents(x, d_x, *(vector for pair in vectors for vector in pair)),
        )
        for key, value, (by_score, pooled) in zip(keys, values, vectors, strict=True):
            d_q[:, key] = product(by_score, w_k[key], None)
            d_w_k[key] = product(q[:, key].T, by_score.T, None)
            d_w_v[value] = product(d_ctx[:, value].T, pooled.T, None)
            context[:, value] = product(pooled, w_v[value], None if b_kv is None else b_kv[len(w_q) :][value])
            # the values' weights add up to one, so their bias gets all of the gradient, unless they are NaN
            d_b_v[value] += (0 * pooled).sum()
    # the mean gives every slot of a window the same share of the query's gradient
    d_x += (product(d_q, w_q.T, None) / size).unsqueeze(1)
    d_b_q = d_q.sum(0)
    return d_x, [
        product(d_q.T, mean.T, None),
        d_b_q,
        d_w_kv,
        # a bias of the keys adds the same to all scores of a softmax, and one of the values itself to the result
        torch.cat([0 * d_b_q, d_b_v]),
        product(d_out.T, context.T, None),
    ]


def _folded(
    w_q: Tensor, b_q: Tensor | None, w_kv: Tensor, b_kv: Tensor | None, w_o: Tensor, b_o: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None:
    """One head's W_K^T W_Q and W_O W_V with their biases: two products in the place of four, where that is less work
    (14 to 3 units of width * key_dim at the paper's sizes, keys included)."""
    keys, (out, values), width = len(w_q), w_o.shape, w_q.shape[1]
    if width * (width + out) >= 2 * width * keys + values * (width + out):
        return None

    def fold() -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        dtype = w_q.dtype
        q, kv, o = (w.detach().float() for w in (w_q, w_kv, w_o))
        k, v = kv.split([keys, values])
        query_bias = _with_key_bias(b_q, b_kv, keys)
        score_bias = None if query_bias is None else (query_bias.detach().float() @ k).to(dtype)
        out_bias = None if b_o is None else b_o.detach().float()
        if b_kv is not None:
            out_bias = (0 if out_bias is None else out_bias) + o @ b_kv.detach().float()[keys:]
        return (k.T @ q).to(dtype), score_bias, (o @ v).to(dtype), None if out_bias is None else out_bias.to(dtype)

    return packed("folded", tuple(t for t in (w_q, w_kv, w_o, b_q, b_kv, b_o) if t is not None), fold)


def _with_key_bias(b_q: Tensor | None, b_kv: Tensor | None, keys: int) -> Tensor | None:
    """The queries' bias. A bias of the keys adds the same to all scores of a softmax, so it is left out of the algebra,
    but where it is not finite nothing is: that is put into the queries."""
    if b_kv is None:
        return b_q
    nothing = 0 * b_kv[:keys]
    return nothing if b_q is None else b_q + nothing


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
