"""`vlmkern::attention_pool`: attention pooling of concatenated hidden states over windows of a patch grid.
The maths is in `vlmkern.reference.attention_pool`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ..reference import attention_pool as reference
from . import _checks, _library
from ._windows import windows_per_tile


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
        _backends.requested(),
    )


def _check(
    features: list[Tensor],
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    w_o: Tensor,
    b_o: Tensor | None,
    grid: list[int],
    num_heads: int,
    window: list[int],
    pad_embed: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
) -> None:
    if not features:
        raise ValueError("features: got no tensors, expected at least one")
    for name, pair in (("grid", grid), ("window", window)):
        if len(pair) != 2 or pair[0] < 1 or pair[1] < 1:
            raise ValueError(f"{name}: got {tuple(pair)}, expected two positive integers (rows, columns)")
    if num_heads < 1:
        raise ValueError(f"num_heads: got {num_heads}, expected at least 1")
    first = features[0]
    _checks.float_tensor("features[0]", first)
    _checks.rank("features[0]", first, "[T, N, C]")
    tiles, patches, channels = first.shape
    _checks.value(
        patches == grid[0] * grid[1],
        lambda: (
            f"features[0]: got shape {list(first.shape)}, expected N = grid[0] * grid[1] = {grid[0] * grid[1]} patches"
        ),
    )
    for i, feature in enumerate(features):
        _checks.shape(f"features[{i}]", feature, first.shape, "[T, N, C] like features[0]")
        _checks.like(f"features[{i}]", feature, "features[0]", first)
        _checks.unit_last_stride(f"features[{i}]", feature)

    width = channels * len(features)
    _checks.rank("w_q", w_q, "[H*Dk, L*C]")
    _checks.shape("w_q", w_q, (w_q.shape[0], width), "[H*Dk, L*C]")
    _checks.rank("w_o", w_o, "[Co, H*Dv]")
    for name, inner in (("w_q", w_q.shape[0]), ("w_o", w_o.shape[1])):
        _checks.value(
            inner > 0 and inner % num_heads == 0,
            lambda name=name, inner=inner: (
                f"{name}: got an inner size of {inner}, expected a multiple of num_heads = {num_heads}"
            ),
        )
    kv_rows = w_q.shape[0] + w_o.shape[1]
    _checks.shape("w_kv", w_kv, (kv_rows, width), "[H*Dk + H*Dv, L*C]")
    for name, bias, size, layout in (
        ("b_q", b_q, w_q.shape[0], "[H*Dk]"),
        ("b_kv", b_kv, kv_rows, "[H*Dk + H*Dv]"),
        ("b_o", b_o, w_o.shape[0], "[Co]"),
    ):
        if bias is not None:
            _checks.shape(name, bias, (size,), layout)
    if (pad_embed is None) != (mask is None):
        given, missing = ("mask", "pad_embed") if pad_embed is None else ("pad_embed", "mask")
        raise ValueError(f"{missing}: got None, expected a tensor, as {given} is given")
    if pad_embed is not None:
        _checks.shape("pad_embed", pad_embed, (2, width), "[2, L*C]")
        _checks.shape("mask", mask, (tiles, patches), "[T, N]")
        if mask.is_complex():
            raise TypeError(f"mask: got dtype {mask.dtype}, expected a real dtype")
        _checks.same_device("mask", mask, "features[0]", first)
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
            _checks.like(name, tensor, "features[0]", first)
    if keep is not None:
        if keep.dtype != torch.int64:
            raise TypeError(f"keep: got dtype {keep.dtype}, expected torch.int64")
        _checks.rank("keep", keep, "[K]")
        _checks.same_device("keep", keep, "features[0]", first)


def _check_values(features: list[Tensor], *args: Any) -> None:
    *_, grid, _num_heads, window, _pad_embed, _mask, keep = args
    if keep is None or keep.numel() == 0:
        return
    count = features[0].shape[0] * windows_per_tile(grid, window)
    low, high = (int(bound) for bound in keep.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"keep: got indices from {low} to {high}, expected 0 to {count - 1} (T * M = {count} windows)")


def _check_bwd(grad: Tensor, features: list[Tensor], *args: Any) -> None:
    *inputs, wanted = args
    w_q, b_q, w_kv, b_kv, w_o, *rest = inputs
    _check(features, w_q, b_q, w_kv, b_kv, w_o, None, *rest)
    _checks.shape("grad", grad, _result_shape(features, w_o, *rest), "the result's shape")
    _checks.like("grad", grad, "features[0]", features[0])
    _checks.wanted(wanted, len(features) + 7)


def _check_values_bwd(grad: Tensor, features: list[Tensor], *args: Any) -> None:
    _check_values(features, *args[:-1])


def _fake(features: list[Tensor], *args: Any) -> Tensor:
    *_, w_o, _b_o, grid, num_heads, window, pad_embed, mask, keep = args
    return features[0].new_empty(_result_shape(features, w_o, grid, num_heads, window, pad_embed, mask, keep))


def _result_shape(
    features: list[Tensor],
    w_o: Tensor,
    grid: list[int],
    _num_heads: int,
    window: list[int],
    _pad_embed: Tensor | None,
    _mask: Tensor | None,
    keep: Tensor | None,
) -> tuple[Any, ...]:
    if keep is not None:
        return keep.shape[0], w_o.shape[0]
    return features[0].shape[0], windows_per_tile(grid, window), w_o.shape[0]


def _fake_bwd(grad: Tensor, features: list[Tensor], *args: Any) -> list[Tensor]:
    w_q, _b_q, w_kv, _b_kv, w_o, *_, wanted = args
    width = features[0].shape[2] * len(features)
    shapes = [f.shape for f in features]
    shapes += [w_q.shape, w_q.shape[:1], w_kv.shape, w_kv.shape[:1], w_o.shape, w_o.shape[:1], (2, width)]
    return [grad.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, w_q, b_q, w_kv, b_kv, w_o, _b_o, ctx.grid, ctx.num_heads, ctx.window, pad_embed, mask, keep = inputs
    ctx.save_for_backward(w_q, b_q, w_kv, b_kv, w_o, pad_embed, mask, keep, *features)


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
    w_q, b_q, w_kv, b_kv, w_o, pad_embed, mask, keep, *features = ctx.saved_tensors
    count = len(features) + 6
    # grid, num_heads and window stand between the weights and pad_embed
    wanted = [*needed[:count], needed[count + 3]]
    grads = iter(
        _op_bwd(
            grad,
            features,
            w_q,
            b_q,
            w_kv,
            b_kv,
            w_o,
            ctx.grid,
            ctx.num_heads,
            ctx.window,
            pad_embed,
            mask,
            keep,
            wanted,
            ctx.backend,
        )
    )
    *of_inputs, d_pad_embed = (next(grads) if want else None for want in wanted)
    return *of_inputs, None, None, None, d_pad_embed, None, None


_op = _library.define(
    "attention_pool",
    "(Tensor[] features, Tensor w_q, Tensor? b_q, Tensor w_kv, Tensor? b_kv, Tensor w_o, Tensor? b_o,"
    " int[] grid, int num_heads, int[] window, Tensor? pad_embed, Tensor? mask, Tensor? keep) -> Tensor",
    check=_check,
    check_values=_check_values,
    fake=_fake,
    implementations={
        "reference": reference.attention_pool,
        "native": _library.lazy("native.attention_pool", "attention_pool"),
        "triton": _library.lazy("gpu.attention_pool", "attention_pool"),
    },
)
_op_bwd = _library.define(
    "attention_pool_bwd",
    "(Tensor grad, Tensor[] features, Tensor w_q, Tensor? b_q, Tensor w_kv, Tensor? b_kv, Tensor w_o,"
    " int[] grid, int num_heads, int[] window, Tensor? pad_embed, Tensor? mask, Tensor? keep, bool[] wanted)"
    " -> Tensor[]",
    check=_check_bwd,
    check_values=_check_values_bwd,
    fake=_fake_bwd,
    backward=True,
    implementations={
        "reference": reference.attention_pool_bwd,
        "native": _library.lazy("native.attention_pool", "attention_pool_bwd"),
        "triton": _library.lazy("gpu.attention_pool", "attention_pool_bwd"),
    },
)
_library.differentiable(_op, setup_context=_setup_context, backward=_backward)
_library.not_differentiable(_op_bwd)
_library.autocast(_op, keep=("mask",))
