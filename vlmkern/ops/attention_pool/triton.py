"""Attention pooling on GPUs: library products with the Triton kernels of `vlmkern.kernels.attention_pool` around them.

The forms and what they cost are in that module; reference.py has the plain one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch.targets import Target
from ...kernels.attention_pool import backward, forward
from ...kernels.attention_pool.absorbed import absorbed
from ...kernels.attention_pool.windows import MAX_FEATURES, Windows
from .problem import AttentionPool, AttentionPoolGradient
from .windows import pad_kind, pad_rows

# of an H200: TFLOP/s of matrix products over the 4.3 TB/s of its copies, by the bytes of an element
_FLOPS_PER_BYTE = {2: 790 / 4.3, 4: 60 / 4.3}
# writing the kept slots side by side costs a tenth of what projecting a patch does
_WORTH_GATHERING = 0.9


def supports(p: AttentionPool, target: Target) -> str | None:
    """None, or why the call is not for these kernels."""
    first = p.features[0]
    if first.dtype in forward.DTYPES and len(p.features) <= MAX_FEATURES and first.shape[2] > 0:
        return None
    return (
        f"it has no kernel for {len(p.features)} features of {first.dtype}, {first.shape[2]} wide; it takes up to"
        f" {MAX_FEATURES} in float32, bfloat16 and float16"
    )


supports_bwd = supports


def attention_pool(p: AttentionPool) -> Tensor:
    """See reference.py."""
    features, w_q, b_q, w_kv, b_kv, w_o, b_o, _grid, num_heads, _window, _pad_embed, _mask, keep = p
    windows, shape, scale = _windows(p), p.windows_shape, p.scale
    if windows.count == 0 or windows.of_all_tiles == 0:
        # windows of no tile, which only unchecked indices name, are zeros
        return features[0].new_zeros((*shape, len(w_o)))
    keys, (outputs, values) = len(w_q), w_o.shape
    b_kv = None if b_kv is None else b_kv.contiguous()
    b_k, b_v = (None, None) if b_kv is None else b_kv.split([keys, values])
    if _absorbs(windows, keys, values, num_heads, features[0].element_size()):
        mean, _ = forward.slots(windows, write=False)
        w_k, w_v = (w.unflatten(0, (num_heads, -1)) for w in w_kv.split([keys, values]))
        queries = F.linear(mean, w_q, b_q).unflatten(1, (num_heads, -1))
        pooled = absorbed(_per_head(queries, w_k), b_k, windows, scale)
        context = _per_head(pooled, w_v.mT).flatten(1)
        context = context if b_v is None else context.add_(b_v)
    else:
        gathered = keep is not None and windows.count * windows.slots < _WORTH_GATHERING * features[0].shape[:2].numel()
        mean, slots = forward.slots(windows, write=gathered)
        kv = F.linear(slots, w_kv) if slots is not None else _project_patches(features, w_kv)
        pad_kv = None if gathered or windows.pad_embed is None else F.linear(windows.pad_embed, w_kv)
        q = F.linear(mean, w_q, b_q)
        context = forward.context(q, kv, b_kv, pad_kv, windows, num_heads, scale, gathered=gathered)
    return F.linear(context, w_o, b_o).view(*shape, outputs)


def attention_pool_bwd(p: AttentionPoolGradient) -> list[Tensor]:
    """See reference.py."""
    grad, features, w_q, b_q, w_kv, b_kv, w_o, _grid, num_heads, _window, _pad_embed, mask, _keep, wanted = p
    windows = _windows(p)
    of_features, of_weights = wanted[: len(features)], wanted[len(features) :]
    of_q, of_b_q, of_kv, of_b_kv, of_o, of_b_o, of_pad = of_weights
    if windows.count == 0 or windows.of_all_tiles == 0:
        return [grad.new_zeros(shape) for shape, want in zip(p.shapes, wanted, strict=True) if want]
    keys = len(w_q)
    d_out = grad.reshape(windows.count, len(w_o))
    if not any((*of_features, *of_weights[:5], of_pad)):
        return [d_out.sum(0)] if of_b_o else []
    mean, slots = forward.slots(windows, write=True)
    context, d_q, d_kv = backward.context_bwd(
        F.linear(mean, w_q, b_q),
        F.linear(slots, w_kv),
        None if b_kv is None else b_kv.contiguous(),
        d_out @ w_o,
        windows.slots,
        num_heads,
        (keys // num_heads) ** -0.5,
    )
    grads: list[Tensor] = []
    if any(of_features) or of_pad:
        d_slots, d_mean = d_kv @ w_kv, d_q @ w_q
        kept, order = backward.sorted_windows(windows)
        by_feature = [
            backward.scatter(d_slots, d_mean, windows, kept, order, index) if want or of_pad else None
            for index, want in enumerate(of_features)
        ]
        grads += [d for d, want in zip(by_feature, of_features, strict=True) if want]
    for want, make in (
        (of_q, lambda: d_q.T @ mean),
        (of_b_q, lambda: d_q.sum(0)),
        (of_kv, lambda: d_kv.T @ slots),
        (of_b_kv, lambda: d_kv.sum(0)),
        (of_o, lambda: d_out.T @ context),
        (of_b_o, lambda: d_out.sum(0)),
    ):
        if want:
            grads.append(make())
    if of_pad:
        # chosen, not multiplied by zeros: gradients of other patches may be NaN
        rows = [row.unsqueeze(-1) for row in pad_rows(mask)]
        chosen = (torch.stack([torch.where(row, d, 0).sum((0, 1)) for row in rows]) for d in by_feature)
        grads.append(torch.cat(list(chosen), dim=1))
    return grads


def _windows(p: AttentionPool | AttentionPoolGradient) -> Windows:
    kind = None if p.mask is None else pad_kind(p.mask)
    pad_embed = None if p.pad_embed is None else p.pad_embed.contiguous()
    keep = None if p.keep is None else p.keep.contiguous()
    return Windows(p.features, p.grid, p.window, keep, kind, pad_embed)


def _absorbs(windows: Windows, keys: int, values: int, heads: int, size: int) -> bool:
    """Whether W_K goes into the queries and W_V behind the pooling, by what both forms compute and move: every slot's
    keys and values, or a row as wide as the features for each head of a window, written and read on both ways."""
    width, slots = windows.width, windows.slots
    byte = _FLOPS_PER_BYTE[size] * size
    projected = 2 * slots * width * (keys + values) + byte * 2 * slots * (keys + values)
    without = 2 * width * (keys + values) + byte * (4 * heads + slots) * width
    return without < projected


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """[W, H, A] by [H, A, B] -> [W, H, B], dense."""
    if x.shape[1] == 1:
        return (x[:, 0] @ weight[0]).unsqueeze(1)
    return (x.transpose(0, 1) @ weight).transpose(0, 1).contiguous()


def _project_patches(features: list[Tensor], w_kv: Tensor) -> Tensor:
    """Keys and values of every patch, [T * N, H*(Dk+Dv)], a product for each feature added to those before: nothing is
    laid side by side."""
    weights = w_kv.split(features[0].shape[2], dim=1)
    kv = features[0].flatten(0, 1) @ weights[0].T
    for feature, weight in zip(features[1:], weights[1:], strict=True):
        kv.addmm_(feature.flatten(0, 1), weight.T)
    return kv
