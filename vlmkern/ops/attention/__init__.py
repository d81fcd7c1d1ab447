"""`vlmkern::attention`: multi-head attention over images or sequences, dense or packed. The maths is in
reference.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...dispatch import checks, choice, library
from .. import _rotary
from .._algebra import lse_shape
from . import native, reference
from .problem import Attention, AttentionGradient

_DENSE, _PACKED = "[B, N, H, D]", "[T, H, D]"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_k: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """softmax(scale * q k^T) v for every image, sequence or packed segment, and every head.

    Args:
        q: dense [B, N, H, D] or packed [T, H, D]. Any strides with a last stride of 1, so views into one fused qkv
            projection need no copy. float32, bfloat16, float16 or float64.
        k, v: [B, M, H_kv, D] or packed [T_k, H_kv, D], of q's dtype. H is a multiple of H_kv: H / H_kv neighbouring
            heads of q share one of k and v.
        scale: factor on the scores; D ** -0.5 when None.
        cu_seqlens: int32 [S + 1], packed only: segment s holds tokens cu_seqlens[s] to cu_seqlens[s + 1],
            which attend to each other only. Starts at 0, ends at T, never decreases. On GPUs, where bounds are
            trusted, tokens of no segment, or beyond a segment's first max_seqlen, give 0.
        max_seqlen: packed only: the longest segment's length, or more, as a host integer.
        cu_seqlens_k, max_seqlen_k: those of k and v, as many segments; those of q when None.
        causal: a query sees no key behind its own place. The last query's place is that of the last key, so that
            queries may be the end of a longer sequence.
        window: (left, right), how many keys before and behind its own place a query sees; -1 for all of them.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        rotary: (cos, sin), float32 [N, D / 2], or [N, D] with equal halves, [B, N, ..] where images differ, packed
            [T, ..]: q and k are turned by them as `rotate_half` of transformers does, in float32, and rounded to their
            dtype. Tables get no gradient; float64 tensors may have float64 ones.
        rotary_k: those of k, needed where it has other lengths; those of q when None.
        interleaved: rotary pairs are neighbouring channels, in place of those D / 2 apart.

    Returns:
        Same shape and dtype as `q`, dense. A query that sees no key gets 0.

    Raises:
        ValueError: shapes, strides, devices, values or segment bounds that do not fit; arguments that need others which
            are not there, or contradict them. Bounds are read on CPU; on GPUs only when VLMKERN_CHECK=1.
        TypeError: dtypes that differ or are not floating point; bounds that are not int32, tables that are not float32.

    Results and, on CPU, gradients are right for scores of any size. On GPUs gradients recompute the weights from a
    float32 log-sum-exp, whose rounding they inherit: 0.3 % at scores of 1e4.

    Source: Vaswani et al. (2017), eq. 1; Ainslie et al. (2023) for fewer heads of keys; Su et al. (2021), eq. 34, for
    the rotation; Gemma Team (2024), section 2, for the cap.
    """
    checks.tensor("q", q)
    if scale is None:
        # without a head dimension there is no such scale; the op's own checks say what is wrong
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    if not (causal or softcap or rotary is not None or rotary_k is not None or cu_seqlens_k is not None) and (
        window == (-1, -1) and max_seqlen_k is None
    ):
        # the plain case: torch takes a microsecond for every four arguments
        return _op(q, k, v, scale, cu_seqlens, max_seqlen, backend=choice.requested())[0]
    left, right = _window(window, causal)
    cos, sin = _rotary.pair("rotary", rotary)
    cos_k, sin_k = _rotary.pair("rotary_k", rotary_k)
    return _op(
        q,
        k,
        v,
        scale,
        cu_seqlens,
        max_seqlen,
        cu_seqlens_k,
        max_seqlen_k,
        left,
        right,
        softcap,
        cos,
        sin,
        cos_k,
        sin_k,
        interleaved,
        choice.requested(),
    )[0]


def _window(window: tuple[int, int], causal: bool) -> tuple[int, int]:
    """Keys before and behind a query's place; causal allows none behind."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise ValueError(f"window: got {window!r}, expected (left, right)") from None
    for keys in (left, right):
        if not isinstance(keys, (int, torch.SymInt)):
            raise TypeError(f"window: got {window!r}, expected two integers")
    if not causal:
        return left, right
    if right > 0:
        raise ValueError(f"window: got {window!r} with causal=True, expected at most 0 keys to the right")
    return left, 0


def _check(p: Attention) -> None:
    q, k, v = p.q, p.k, p.v
    checks.float_tensor("q", q)
    packed = p.cu_seqlens is not None
    layout = _PACKED if packed else _DENSE
    checks.rank("q", q, f"{layout} {'with' if packed else 'without'} cu_seqlens")
    for name, tensor in (("k", k), ("v", v)):
        checks.rank(name, tensor, layout)
    if p.extra is None:
        for name, tensor in (("k", k), ("v", v)):
            checks.same_as(name, tensor, "q", q, layout)
    else:
        _check_keys(p, layout)
    checks.value(q.shape[-1] > 0, lambda: f"q: got shape {list(q.shape)}, expected a head dimension of at least 1")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.unit_last_stride(name, tensor)
    if packed:
        _check_bounds(p, "cu_seqlens", p.cu_seqlens, "max_seqlen", p.max_seqlen)
    elif p.max_seqlen is not None:
        raise ValueError(f"max_seqlen: got {p.max_seqlen}, expected None without cu_seqlens")
    _check_scores(p)


def _check_bounds(p: Attention, name: str, bounds: Tensor, longest_name: str, longest: int | None) -> None:
    if longest is None:
        raise ValueError(f"{longest_name}: got None, expected the longest segment's length with {name}")
    if bounds.dtype != torch.int32:
        raise TypeError(f"{name}: got dtype {bounds.dtype}, expected torch.int32")
    checks.rank(name, bounds, "[S + 1]")
    checks.value(bounds.shape[0] >= 1, lambda: f"{name}: got shape [0], expected [S + 1] with at least one bound")
    checks.same_device(name, bounds, "q", p.q)
    checks.value(longest >= 0, lambda: f"{longest_name}: got {longest}, expected at least 0")


def _check_keys(p: Attention, layout: str) -> None:
    """Keys of other lengths, or fewer heads, than queries."""
    q, k = p.q, p.k
    packed = p.cu_seqlens is not None
    expected = "[T_k, H_kv, D]" if packed else "[B, M, H_kv, D]"
    own_length = not packed or p.cu_seqlens_k is not None
    length = k.shape[-3] if own_length else q.shape[-3]
    checks.shape("k", k, (*q.shape[:-3], length, k.shape[-2], q.shape[-1]), f"{expected} for q of {layout}")
    heads, heads_k = q.shape[-2], k.shape[-2]
    if heads != heads_k:
        checks.value(
            heads_k > 0 and heads % heads_k == 0,
            lambda: f"k: got {heads_k} heads, expected a divisor of q's {heads}",
        )
    checks.like("k", k, "q", q)
    checks.same_as("v", p.v, "k", k, expected)


def _check_scores(p: Attention) -> None:
    """What comes between scores and softmax."""
    if p.cu_seqlens_k is not None:
        if p.cu_seqlens is None:
            raise ValueError("cu_seqlens_k: got a tensor, expected None without cu_seqlens")
        _check_bounds(p, "cu_seqlens_k", p.cu_seqlens_k, "max_seqlen_k", p.max_seqlen_k)
        checks.shape("cu_seqlens_k", p.cu_seqlens_k, p.cu_seqlens.shape, "as many bounds as cu_seqlens")
    elif p.max_seqlen_k is not None:
        raise ValueError(f"max_seqlen_k: got {p.max_seqlen_k}, expected None without cu_seqlens_k")
    for name, count in (("left", p.window_left), ("right", p.window_right)):
        if count < -1:
            raise ValueError(f"window: got {count} keys to the {name}, expected at least 0, or -1 for all")
    if not 0 <= p.softcap < float("inf"):
        raise ValueError(f"softcap: got {p.softcap}, expected a finite cap above 0, or 0 for none")
    if p.cos is not None or p.sin is not None or p.cos_k is not None or p.sin_k is not None:
        _check_tables(p)


def _check_tables(p: Attention) -> None:
    if p.cos is None or p.sin is None:
        raise ValueError("rotary: got None, expected (cos, sin) of q with those of k")
    _rotary.check("rotary", p.cos, p.sin, "q", p.q)
    if p.cos_k is not None or p.sin_k is not None:
        _rotary.check("rotary_k", p.cos_k, p.sin_k, "k", p.k)
    elif p.cu_seqlens_k is not None or p.k.shape[-3] != p.q.shape[-3]:
        raise ValueError("rotary_k: got None, expected (cos, sin) of k, whose lengths differ from q's")


def _check_values(p: Attention) -> None:
    if p.cu_seqlens is None:
        return
    _check_bound_values("cu_seqlens", p.cu_seqlens, "max_seqlen", p.max_seqlen, "T", p.q.shape[0])
    if p.cu_seqlens_k is not None:
        _check_bound_values("cu_seqlens_k", p.cu_seqlens_k, "max_seqlen_k", p.max_seqlen_k, "T_k", p.k.shape[0])


def _check_bound_values(name: str, bounds: Tensor, longest_name: str, at_most: int, end: str, tokens: int) -> None:
    first, last = int(bounds[0]), int(bounds[-1])
    if first != 0 or last != tokens:
        raise ValueError(f"{name}: got bounds from {first} to {last}, expected from 0 to {end} = {tokens}")
    lengths = bounds.diff()
    if len(lengths) == 0:
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 0:
        raise ValueError(f"{name}: got a segment of length {shortest}, expected bounds that never decrease")
    if longest > at_most:
        raise ValueError(f"{longest_name}: got {at_most}, expected at least the longest segment's length, {longest}")


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
    ctx.mark_non_differentiable(lse)
    # tensors go where autograd sees them change; everything else is kept as it is
    tensors = tuple(x if isinstance(x, Tensor) else None for x in p)
    ctx.rest = tuple(None if isinstance(x, Tensor) else x for x in p)
    ctx.save_for_backward(out, lse, *tensors)


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    q, k, v, *options = (x if t is None else t for t, x in zip(tensors, ctx.rest, strict=True))
    grads = _op_bwd(grad, q, k, v, out, lse, *options, ctx.backend)
    return *grads, *(None for _ in options)


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
    keep=("cos", "sin", "cos_k", "sin_k"),
)
