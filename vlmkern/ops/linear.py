"""`vlmkern::linear`: linear layer, activation and residual in one. The maths is in `vlmkern.reference.linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _backends
from ..reference import linear as reference
from . import _checks, _library
from ._algebra import ACTIVATIONS


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`: the projections of a transformer block with what follows them.

    Args:
        x: [..., C], any strides. float32, bfloat16, float16 or float64.
        weight: [E, C].
        bias: [E] or None.
        activation: "none", "gelu_tanh" (SigLIP), "gelu" (exact) or "silu".
        residual: [..., E], of the result's shape, or None.

    Returns:
        [..., E], dense, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation, or tensors on different devices.
        TypeError: dtypes that differ from that of `x`, or are not floating point.
    """
    return _op(x, weight, bias, activation, residual, _backends.requested())


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> None:
    _checks.float_tensor("x", x)
    _checks.value(x.dim() >= 1, lambda: f"x: got shape {list(x.shape)}, expected [..., C]")
    _checks.rank("weight", weight, "[E, C]")
    _checks.shape("weight", weight, (weight.shape[0], x.shape[-1]), "[E, C] with C from x")
    if bias is not None:
        _checks.shape("bias", bias, weight.shape[:1], "[E]")
    if residual is not None:
        _checks.shape("residual", residual, (*x.shape[:-1], weight.shape[0]), "[..., E] like the result")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    _checks.linear_weight("weight", weight, "x", x)
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is not None:
            _checks.like(name, tensor, "x", x)


def _check_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, wanted: list[bool]
) -> None:
    _check(x, weight, bias, activation, None)
    _checks.like("weight", weight, "x", x)
    _checks.shape("grad", grad, (*x.shape[:-1], weight.shape[0]), "[..., E] like the result")
    _checks.like("grad", grad, "x", x)
    _checks.wanted(wanted, 4)


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, wanted: list[bool]
) -> list[Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1], grad.shape)
    return [x.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias, _, of_residual = needed
    wanted = [of_x, of_weight, of_bias, of_residual]
    grads = iter(_op_bwd(grad, *ctx.saved_tensors, ctx.activation, wanted, ctx.backend))
    d_x, d_weight, d_bias, d_residual = (next(grads) if want else None for want in wanted)
    return d_x, d_weight, d_bias, None, d_residual


_op = _library.define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual) -> Tensor",
    check=_check,
    fake=_fake,
    implementations={
        "reference": reference.linear,
        "native": _library.lazy("native.linear", "linear"),
        "triton": _library.lazy("gpu.linear", "linear"),
    },
)
_op_bwd = _library.define(
    "linear_bwd",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str activation, bool[] wanted) -> Tensor[]",
    check=_check_bwd,
    fake=_fake_bwd,
    backward=True,
    implementations={
        "reference": reference.linear_bwd,
        "native": _library.lazy("native.linear", "linear_bwd"),
        "triton": _library.lazy("gpu.linear", "linear_bwd"),
    },
)
_library.differentiable(_op, setup_context=_setup_context, backward=_backward)
_library.not_differentiable(_op_bwd)
_library.autocast(_op)
