"""`vlmkern::attention`: non-causal multi-head attention over images, dense or packed. The maths is in
reference.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...dispatch import checks, choice, library
from .._algebra import lse_shape
from . import native, reference
from .problem import Attention, AttentionGradient


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Non-causal attention, softmax(scale * q k^T) v, for every image (or packed segment) and head.

    Args:
        q, k, v: dense [B, N, H, D] or packed [T, H, D]. Any strides with a last stride of 1, so views into
            one fused qkv projection need no copy. float32, bfloat16, float16 or float64.
        scale: factor on the scores; D ** -0.5 when None.
        cu_seqlens: int32 [S + 1], packed only: segment s holds tokens cu_seqlens[s] to cu_seqlens[s + 1],
            which attend to each other only. Starts at 0, ends at T, never decreases. On GPUs, where bounds are
            trusted, tokens of no segment, or beyond a segment's first max_seqlen, give 0.
        max_seqlen: packed only: the longest segment's length, or more, as a host integer.

    Returns:
        Same shape and dtype as `q`, dense.

    Raises:
        ValueError: shapes, strides, devices or segment bounds that do not fit; `cu_seqlens` without
            `max_seqlen` or the reverse. Bounds are read on CPU; on GPUs only when VLMKERN_CHECK=1.
        TypeError: dtypes that differ or are not floating point; `cu_seqlens` that is not int32.

    Results and, on CPU, gradients are right for scores of any size. On GPUs gradients recompute the weights from a
    float32 log-sum-exp, whose rounding they inherit: 0.3 % at scores of 1e4.

    Source: Vaswani et al. (2017), eq. 1.
    """
    checks.tensor("q", q)
    if scale is None:
        # without a head dimension there is no such scale; the op's own checks say what is wrong
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    return _op(q, k, v, scale, cu_seqlens, max_seqlen, choice.requested())[0]


def _check(p: Attention) -> None:
    q, k, v, _scale, cu_seqlens, max_seqlen = p
    checks.float_tensor("q", q)
    packed = cu_seqlens is not None
    checks.rank("q", q, "[T, H, D] with cu_seqlens" if packed else "[B, N, H, D] without cu_seqlens")
    for name, tensor in (("k", k), ("v", v)):
        checks.same_as(name, tensor, "q", q, "[T, H, D]" if packed else "[B, N, H, D]")
    checks.value(q.shape[-1] > 0, lambda: f"q: got shape {list(q.shape)}, expected a head dimension of at least 1")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.unit_last_stride(name, tensor)
    if not packed:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen: got {max_seqlen}, expected None without cu_seqlens")
        return
    if max_seqlen is None:
        raise ValueError("max_seqlen: got None, expected the longest segment's length with cu_seqlens")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected torch.int32")
    checks.rank("cu_seqlens", cu_seqlens, "[S + 1]")
    checks.value(
        cu_seqlens.shape[0] >= 1, lambda: "cu_seqlens: got shape [0], expected [S + 1] with at least one bound"
    )
    checks.same_device("cu_seqlens", cu_seqlens, "q", q)
    checks.value(max_seqlen >= 0, lambda: f"max_seqlen: got {max_seqlen}, expected at least 0")


def _check_values(p: Attention) -> None:
    q, _k, _v, _scale, cu_seqlens, max_seqlen = p
    if cu_seqlens is None:
        return
    tokens, first, last = q.shape[0], int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        raise ValueError(f"cu_seqlens: got bounds from {first} to {last}, expected from 0 to T = {tokens}")
    lengths = cu_seqlens.diff()
    if len(lengths) == 0:
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 0:
        raise ValueError(f"cu_seqlens: got a segment of length {shortest}, expected bounds that never decrease")
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: got {max_seqlen}, expected at least the longest segment's length, {longest}")


def _check_bwd(p: AttentionGradient) -> None:
    _check(p.forward)
    q = p.q
    for name, tensor in (("grad", p.grad), ("out", p.out)):
        checks.same_as(name, tensor, "q", q, "the result's shape")
    checks.unit_last_stride("out", p.out)
    checks.shape("lse", p.lse, lse_shape(q), "[B, H, N] or packed [H, T]")
    if p.lse.dtype != _lse_dtype(q):
        raise TypeError(f"lse: got dtype {p.lse.dtype}, expected {_lse_dtype(q)}")
    checks.same_device("lse", p.lse, "q", q)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _fake(p: Attention) -> tuple[Tensor, Tensor]:
    return p.q.new_empty(p.q.shape), p.q.new_empty(lse_shape(p.q), dtype=_lse_dtype(p.q))


def _fake_bwd(p: AttentionGradient) -> tuple[Tensor, Tensor, Tensor]:
    return p.q.new_empty(p.q.shape), p.k.new_empty(p.k.shape), p.v.new_empty(p.v.shape)


def _setup_context(ctx: Any, p: Attention, output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.scale, ctx.max_seqlen = p.scale, p.max_seqlen
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(p.q, p.k, p.v, out, lse, p.cu_seqlens)


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = _op_bwd(grad, q, k, v, out, lse, ctx.scale, cu_seqlens, ctx.max_seqlen, ctx.backend)
    return *grads, None, None, None


def _triton() -> ModuleType:
    from . import triton

    return triton


_op, _op_bwd = library.define_with_gradient(
    "attention",
    library.Form(Attention, "(Tensor out, Tensor lse)", _check, _fake),
    library.Form(AttentionGradient, "(Tensor, Tensor, Tensor)", _check_bwd, _fake_bwd),
    providers={"reference": reference, "native": native, "triton": _triton},
    setup_context=_setup_context,
    backward=_backward,
    check_values=_check_values,
)
