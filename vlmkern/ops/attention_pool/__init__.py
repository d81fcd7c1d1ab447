"""`vlmkern::attention_pool`: attention pooling of concatenated hidden states over windows of a patch grid.
The maths is in reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...dispatch import checks, choice, library
from . import native, reference
from .problem import AttentionPool, AttentionPoolGradient
from .windows import windows_per_tile


def attention_pool(
    features: Sequence[Tensor],
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    *,
    grid: tuple[int, int],
    num_heads: int,
    window: tuple[int, int] = (2, 2),
    pad_embed: Tensor | None = None,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Pools each window of patches into one vector by attention: the query is the mean of the window's
    slots, keys and values are the slots themselves.

    Args:
        features: L tensors [T, N, C] (tiles, patches, channels) with N = grid[0] * grid[1], read as if
            concatenated along C. Any strides with a last stride of 1.
        w_q, b_q: [H*Dk, L*C] and [H*Dk] or None.
        w_kv, b_kv: [H*Dk + H*Dv, L*C] and [H*Dk + H*Dv] or None; keys first.
        w_o, b_o: [Co, H*Dv] and [Co] or None.
        grid: patch rows and columns. Zero slots are added at the bottom and right up to whole windows; they
            count in the mean and are attended to.
        num_heads: H. 16 with Dk = Dv = 72 is the released jina-vlm; 1 with Dk = 1152, Dv = 2304 its eq. 3.
        window: slot rows and columns of a window.
        pad_embed: [2, L*C], with `mask`: row 0 is added to patches whose mask is 0, row 1 to those whose mask
            is below 1 and not 0 (so also negative), before the zero slots are added.
        mask: [T, N], any real dtype; compared in that dtype, whatever the features' is.
        keep: int64 [K], flat indices into the T*M windows: compute only these, in this order. Repeats are fine.

    Returns:
        [T, M, Co] with windows row-major, M = ceil(grid[0] / window[0]) * ceil(grid[1] / window[1]);
        [K, Co] with `keep`. Dense, dtype of the features.

    Raises:
        ValueError: shapes, strides, devices that do not fit, `mask` without `pad_embed` or the reverse,
            indices in `keep` out of range (read on CPU; on GPUs only when VLMKERN_CHECK=1).
        TypeError: dtypes that differ or are not floating point, a complex `mask`, `keep` that is not int64.

    Source: jina-vlm, eq. 2-3.
    """
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features: got {type(features).__name__}, expected a sequence of tensors")
    for name, pair in (("grid", grid), ("window", window)):
        if not isinstance(pair, Sequence):
            raise TypeError(f"{name}: got {type(pair).__name__}, expected two integers (rows, columns)")
    return _op(
        list(features),
        w_q,
        b_q,
        w_kv,
        b_kv,
        w_o,
        b_o,
        list(grid),
        num_heads,
        list(window),
        pad_embed,
        mask,
        keep,
        choice.requested(),
    )


def _check(p: AttentionPool) -> None:
    features, w_q, b_q, w_kv, b_kv, w_o, b_o, grid, num_heads, window, pad_embed, mask, keep = p
    if not features:
        raise ValueError("features: got no tensors, expected at least one")
    for name, pair in (("grid", grid), ("window", window)):
        if len(pair) != 2 or pair[0] < 1 or pair[1] < 1:
            raise ValueError(f"{name}: got {tuple(pair)}, expected two positive integers (rows, columns)")
    if num_heads < 1:
        raise ValueError(f"num_heads: got {num_heads}, expected at least 1")
    first = features[0]
    checks.float_tensor("features[0]", first)
    checks.rank("features[0]", first, "[T, N, C]")
    tiles, patches, channels = first.shape
    checks.value(
        patches == grid[0] * grid[1],
        lambda: (
            f"features[0]: got shape {list(first.shape)}, expected N = grid[0] * grid[1] = {grid[0] * grid[1]} patches"
        ),
    )
    for i, feature in enumerate(features):
        checks.shape(f"features[{i}]", feature, first.shape, "[T, N, C] like features[0]")
        checks.like(f"features[{i}]", feature, "features[0]", first)
        checks.unit_last_stride(f"features[{i}]", feature)

    width = channels * len(features)
    checks.rank("w_q", w_q, "[H*Dk, L*C]")
    checks.shape("w_q", w_q, (w_q.shape[0], width), "[H*Dk, L*C]")
    checks.rank("w_o", w_o, "[Co, H*Dv]")
    for name, inner in (("w_q", w_q.shape[0]), ("w_o", w_o.shape[1])):
        checks.value(
            inner > 0 and inner % num_heads == 0,
            lambda name=name, inner=inner: (
                f"{name}: got an inner size of {inner}, expected a multiple of num_heads = {num_heads}"
            ),
        )
    kv_rows = w_q.shape[0] + w_o.shape[1]
    checks.shape("w_kv", w_kv, (kv_rows, width), "[H*Dk + H*Dv, L*C]")
    for name, bias, size, layout in (
        ("b_q", b_q, w_q.shape[0], "[H*Dk]"),
        ("b_kv", b_kv, kv_rows, "[H*Dk + H*Dv]"),
        ("b_o", b_o, w_o.shape[0], "[Co]"),
    ):
        if bias is not None:
            checks.shape(name, bias, (size,), layout)
    if (pad_embed is None) != (mask is None):
        given, missing = ("mask", "pad_embed") if pad_embed is None else ("pad_embed", "mask")
        raise ValueError(f"{missing}: got None, expected a tensor, as {given} is given")
    if pad_embed is not None:
        checks.shape("pad_embed", pad_embed, (2, width), "[2, L*C]")
        checks.shape("mask", mask, (tiles, patches), "[T, N]")
        if mask.is_complex():
            raise TypeError(f"mask: got dtype {mask.dtype}, expected a real dtype")
        checks.same_device("mask", mask, "features[0]", first)
    for name, tensor in (
        ("w_q", w_q),
        ("b_q", b_q),
        ("w_kv", w_kv),
        ("b_kv", b_kv),
        ("w_o", w_o),
        ("b_o", b_o),
        ("pad_embed", pad_embed),
    ):
        if tensor is not None:
            checks.like(name, tensor, "features[0]", first)
    if keep is not None:
        if keep.dtype != torch.int64:
            raise TypeError(f"keep: got dtype {keep.dtype}, expected torch.int64")
        checks.rank("keep", keep, "[K]")
        checks.same_device("keep", keep, "features[0]", first)


def _check_values(p: AttentionPool) -> None:
    keep = p.keep
    if keep is None or keep.numel() == 0:
        return
    count = p.features[0].shape[0] * windows_per_tile(p.grid, p.window)
    low, high = (int(bound) for bound in keep.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"keep: got indices from {low} to {high}, expected 0 to {count - 1} (T * M = {count} windows)")


def _check_bwd(p: AttentionPoolGradient) -> None:
    forward = p.forward
    _check(forward)
    checks.shape("grad", p.grad, (*forward.windows_shape, p.w_o.shape[0]), "the result's shape")
    checks.like("grad", p.grad, "features[0]", p.features[0])
    checks.wanted(p.wanted, len(p.features) + 7)


def _fake(p: AttentionPool) -> Tensor:
    return p.features[0].new_empty((*p.windows_shape, p.w_o.shape[0]))


def _fake_bwd(p: AttentionPoolGradient) -> list[Tensor]:
    return [p.grad.new_empty(shape) for shape, want in zip(p.shapes, p.wanted, strict=True) if want]


def _setup_context(ctx: Any, p: AttentionPool, output: Tensor) -> None:
    ctx.sizes = p.grid, p.num_heads, p.window
    ctx.save_for_backward(p.w_q, p.b_q, p.w_kv, p.b_kv, p.w_o, p.pad_embed, p.mask, p.keep, *p.features)


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
    w_q, b_q, w_kv, b_kv, w_o, pad_embed, mask, keep, *features = ctx.saved_tensors
    count = len(features) + 6
    # grid, num_heads and window stand between the weights and pad_embed
    wanted = [*needed[:count], needed[count + 3]]
    p = AttentionPoolGradient(grad, features, w_q, b_q, w_kv, b_kv, w_o, *ctx.sizes, pad_embed, mask, keep, wanted)
    grads = iter(_op_bwd(*p, ctx.backend))
    *of_inputs, d_pad_embed = (next(grads) if want else None for want in wanted)
    return *of_inputs, None, None, None, d_pad_embed, None, None


def _triton() -> ModuleType:
    from . import triton

    return triton


_op, _op_bwd = library.define_with_gradient(
    "attention_pool",
    library.Form(AttentionPool, "Tensor", _check, _fake),
    library.Form(AttentionPoolGradient, "Tensor[]", _check_bwd, _fake_bwd),
    providers={"reference": reference, "native": native, "triton": _triton},
    setup_context=_setup_context,
    backward=_backward,
    check_values=_check_values,
    keep=("mask",),
)
