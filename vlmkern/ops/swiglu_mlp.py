"""`vlmkern::swiglu_mlp`: gated MLP, down(silu(gate) * value). The maths is in `vlmkern.reference.swiglu_mlp`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _backends
from ..reference import swiglu_mlp as reference
from . import _checks, _library


def swiglu_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, *, b_up: Tensor | None = None, b_down: Tensor | None = None
) -> Tensor:
    """SwiGLU MLP with one fused up-projection: `(silu(gate) * value) @ w_down.T + b_down`, where
    `[value | gate] = x @ w_up.T + b_up`.

    Args:
        x: [..., C], any strides. float32, bfloat16, float16 or float64.
        w_up: [2F, C], the rows of `value` first, then those of `gate`.
        w_down: [E, F].
        b_up: [2F] or None.
        b_down: [E] or None.

    Returns:
        [..., E], dense, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or tensors on different devices.
        TypeError: dtypes that differ from that of `x`, or are not floating point.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6; jina-vlm eq. 4 (projector).
    """
    return _op(x, w_up, w_down, b_up, b_down, _backends.requested())


def _check(x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None) -> None:
    _checks.float_tensor("x", x)
    _checks.value(x.dim() >= 1, lambda: f"x: got shape {list(x.shape)}, expected [..., C]")
    _checks.rank("w_up", w_up, "[2F, C]")
    _checks.rank("w_down", w_down, "[E, F]")
    up_rows, features = w_up.shape[0], w_down.shape[1]
    _checks.value(
        up_rows % 2 == 0,
        lambda: f"w_up: got shape {list(w_up.shape)}, expected an even number of rows, [value | gate]",
    )
    _checks.shape("w_up", w_up, (2 * features, x.shape[-1]), "[2F, C] with F from w_down and C from x")
    if b_up is not None:
        _checks.shape("b_up", b_up, (up_rows,), "[2F]")
    if b_down is not None:
        _checks.shape("b_down", b_down, (w_down.shape[0],), "[E]")
    for name, tensor in (("w_up", w_up), ("w_down", w_down)):
        _checks.linear_weight(name, tensor, "x", x)
    for name, tensor in (("b_up", b_up), ("b_down", b_down)):
        if tensor is not None:
            _checks.like(name, tensor, "x", x)


def _check_bwd(grad: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, wanted: list[bool]) -> None:
    _check(x, w_up, w_down, b_up, None)
    for name, tensor in (("w_up", w_up), ("w_down", w_down)):
        _checks.like(name, tensor, "x", x)
    _checks.shape("grad", grad, (*x.shape[:-1], w_down.shape[0]), "[..., E] like the result")
    _checks.like("grad", grad, "x", x)
    _checks.wanted(wanted, 5)


def _fake(x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


def _fake_bwd(
    grad: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, wanted: list[bool]
) -> list[Tensor]:
    shapes = (x.shape, w_up.shape, w_down.shape, w_up.shape[:1], w_down.shape[:1])
    return [x.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_up, w_down, b_up, _ = inputs
    ctx.save_for_backward(x, w_up, w_down, b_up)


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(needed)
    grads = iter(_op_bwd(grad, *ctx.saved_tensors, wanted, ctx.backend))
    return tuple(next(grads) if want else None for want in wanted)


_op = _library.define(
    "swiglu_mlp",
    "(Tensor x, Tensor w_up, Tensor w_down, Tensor? b_up, Tensor? b_down) -> Tensor",
    check=_check,
    fake=_fake,
    implementations={
        "reference": reference.swiglu_mlp,
        "native": _library.lazy("native.swiglu_mlp", "swiglu_mlp"),
        "triton": _library.lazy("gpu.swiglu_mlp", "swiglu_mlp"),
    },
)
_op_bwd = _library.define(
    "swiglu_mlp_bwd",
    "(Tensor grad, Tensor x, Tensor w_up, Tensor w_down, Tensor? b_up, bool[] wanted) -> Tensor[]",
    check=_check_bwd,
    fake=_fake_bwd,
    backward=True,
    implementations={
        "reference": reference.swiglu_mlp_bwd,
        "native": _library.lazy("native.swiglu_mlp", "swiglu_mlp_bwd"),
        "triton": _library.lazy("gpu.swiglu_mlp", "swiglu_mlp_bwd"),
    },
)
_library.differentiable(_op, setup_context=_setup_context, backward=_backward)
_library.not_differentiable(_op_bwd)
_library.autocast(_op)
