"""`vlmkern::swiglu_mlp`: gated MLP, down(silu(gate) * value). The maths is in reference.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ...dispatch import checks, choice, library
from . import native, reference
from .problem import SwiGLU, SwiGLUGradient


def swiglu_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """SwiGLU MLP with one fused up-projection: `(silu(gate) * value) @ w_down.T + b_down`, where
    `[value | gate] = x @ w_up.T + b_up`.

    Args:
        x: [..., C], any strides. float32, bfloat16, float16 or float64.
        w_up: [2F, C], the rows of `value` first, then those of `gate`.
        w_down: [E, F].
        b_up: [2F] or None.
        b_down: [E] or None.
        recompute: for gradients, compute the up-projection again in place of keeping it, [..., 2F]: less memory, one
            product more.

    Returns:
        [..., E], dense, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or tensors on different devices.
        TypeError: dtypes that differ from that of `x`, or are not floating point.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6; jina-vlm eq. 4 (projector).
    """
    args = (x, w_up, w_down, b_up, b_down, choice.requested())
    if not recompute and library.differentiates(x, w_up, w_down, b_up):
        return _op_keep(*args)[0]
    return _op(*args)


def _check(p: SwiGLU) -> None:
    x, w_up, w_down, b_up, b_down = p
    checks.float_tensor("x", x)
    checks.value(x.dim() >= 1, lambda: f"x: got shape {list(x.shape)}, expected [..., C]")
    checks.rank("w_up", w_up, "[2F, C]")
    checks.rank("w_down", w_down, "[E, F]")
    up_rows, features = w_up.shape[0], w_down.shape[1]
    checks.value(
        up_rows % 2 == 0,
        lambda: f"w_up: got shape {list(w_up.shape)}, expected an even number of rows, [value | gate]",
    )
    checks.shape("w_up", w_up, (2 * features, x.shape[-1]), "[2F, C] with F from w_down and C from x")
    if b_up is not None:
        checks.shape("b_up", b_up, (up_rows,), "[2F]")
    if b_down is not None:
        checks.shape("b_down", b_down, (w_down.shape[0],), "[E]")
    for name, tensor in (("w_up", w_up), ("w_down", w_down)):
        checks.linear_weight(name, tensor, "x", x)
    for name, tensor in (("b_up", b_up), ("b_down", b_down)):
        if tensor is not None:
            checks.like(name, tensor, "x", x)


def _check_bwd(p: SwiGLUGradient) -> None:
    _check(p.forward)
    for name, tensor in (("w_up", p.w_up), ("w_down", p.w_down)):
        checks.like(name, tensor, "x", p.x)
    checks.shape("grad", p.grad, (*p.x.shape[:-1], p.w_down.shape[0]), "[..., E] like the result")
    checks.like("grad", p.grad, "x", p.x)
    checks.wanted(p.wanted, 5)
    if p.up is not None:
        checks.shape("up", p.up, (*p.x.shape[:-1], p.w_up.shape[0]), "[..., 2F]")
        checks.like("up", p.up, "x", p.x)


def _fake(p: SwiGLU) -> Tensor:
    return p.x.new_empty((*p.x.shape[:-1], p.w_down.shape[0]))


def _fake_keep(p: SwiGLU) -> tuple[Tensor, Tensor]:
    return _fake(p), p.x.new_empty((*p.x.shape[:-1], p.w_up.shape[0]))


def _fake_bwd(p: SwiGLUGradient) -> list[Tensor]:
    shapes = (p.x.shape, p.w_up.shape, p.w_down.shape, p.w_up.shape[:1], p.w_down.shape[:1])
    return [p.x.new_empty(shape) for shape, want in zip(shapes, p.wanted, strict=True) if want]


def _setup_context(ctx: Any, p: SwiGLU, output: Tensor | tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(p.x, p.w_up, p.w_down, p.b_up, library.kept(ctx, output))


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor, *of_kept: None) -> tuple[Tensor | None, ...]:
    wanted = list(needed)
    *inputs, up = ctx.saved_tensors
    grads = iter(_op_bwd(grad, *inputs, wanted, up, ctx.backend))
    return tuple(next(grads) if want else None for want in wanted)


def _triton() -> ModuleType:
    from . import triton

    return triton


_PROVIDERS = {"reference": reference, "native": native, "triton": _triton}
_op, _op_bwd = library.define_with_gradient(
    "swiglu_mlp",
    library.Form(SwiGLU, "Tensor", _check, _fake),
    library.Form(SwiGLUGradient, "Tensor[]", _check_bwd, _fake_bwd),
    providers=_PROVIDERS,
    setup_context=_setup_context,
    backward=_backward,
)
# the same, and what its gradient would compute again
_op_keep = library.define_differentiable(
    "swiglu_mlp_keep",
    library.Form(SwiGLU, "(Tensor, Tensor)", _check, _fake_keep),
    providers=_PROVIDERS,
    setup_context=_setup_context,
    backward=_backward,
    keeps=True,
)
