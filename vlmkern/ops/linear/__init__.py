"""`vlmkern::linear`: linear layer, activation and residual in one. The maths is in reference.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ...dispatch import checks, choice, library
from .._algebra import ACTIVATIONS
from . import native, reference
from .problem import Linear, LinearGradient


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`: the projections of a transformer block with what follows them.

    On CPU float32 has the precision that torch gives it: float32's at the default and at
    `torch.set_float32_matmul_precision("high")` (errors of 1.4e-6 of the largest value at 1,152 channels), at "medium"
    bfloat16's on CPUs with AMX (1e-3), and float32's on others. 16-bit types are summed up in float32 and rounded once
    where there is no epilogue but the bias, or where the CPU has no instructions for them.

    Args:
        x: [..., C], any strides. float32, bfloat16, float16 or float64.
        weight: [E, C].
        bias: [E] or None.
        activation: "none", "gelu_tanh" (SigLIP), "gelu" (exact), "quick_gelu" (CLIP, Qwen2-VL: x sigmoid(1.702 x)) or
            "silu".
        residual: [..., E], of the result's shape, or None.
        recompute: for gradients, compute what the activation was applied to again in place of keeping it, [..., E]:
            less memory, one product more.

    Returns:
        [..., E], dense, dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation, or tensors on different devices.
        TypeError: dtypes that differ from that of `x`, or are not floating point.
    """
    args = (x, weight, bias, activation, residual, choice.requested())
    if activation != "none" and not recompute and library.differentiates(x, weight, bias):
        return _op_keep(*args)[0]
    return _op(*args)


def _check(p: Linear) -> None:
    checks.float_tensor("x", p.x)
    checks.value(p.x.dim() >= 1, lambda: f"x: got shape {list(p.x.shape)}, expected [..., C]")
    checks.rank("weight", p.weight, "[E, C]")
    checks.shape("weight", p.weight, (p.weight.shape[0], p.x.shape[-1]), "[E, C] with C from x")
    if p.bias is not None:
        checks.shape("bias", p.bias, p.weight.shape[:1], "[E]")
    if p.residual is not None:
        checks.shape("residual", p.residual, (*p.x.shape[:-1], p.weight.shape[0]), "[..., E] like the result")
    if p.activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {p.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    checks.linear_weight("weight", p.weight, "x", p.x)
    for name, tensor in (("bias", p.bias), ("residual", p.residual)):
        if tensor is not None:
            checks.like(name, tensor, "x", p.x)


def _check_bwd(p: LinearGradient) -> None:
    _check(p.forward)
    checks.like("weight", p.weight, "x", p.x)
    checks.shape("grad", p.grad, (*p.x.shape[:-1], p.weight.shape[0]), "[..., E] like the result")
    checks.like("grad", p.grad, "x", p.x)
    checks.wanted(p.wanted, 4)
    if p.before is not None:
        checks.shape("before", p.before, p.grad.shape, "[..., E] like the result")
        checks.like("before", p.before, "x", p.x)


def _fake(p: Linear) -> Tensor:
    return p.x.new_empty((*p.x.shape[:-1], p.weight.shape[0]))


def _fake_keep(p: Linear) -> tuple[Tensor, Tensor]:
    return _fake(p), _fake(p)


def _fake_bwd(p: LinearGradient) -> list[Tensor]:
    shapes = (p.x.shape, p.weight.shape, p.weight.shape[:1], p.grad.shape)
    return [p.x.new_empty(shape) for shape, want in zip(shapes, p.wanted, strict=True) if want]


def _setup_context(ctx: Any, p: Linear, output: Tensor | tuple[Tensor, Tensor]) -> None:
    ctx.activation = p.activation
    ctx.save_for_backward(p.x, p.weight, p.bias, library.kept(ctx, output))


def _backward(ctx: Any, needed: tuple[bool, ...], grad: Tensor, *of_kept: None) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias, _, of_residual = needed
    wanted = [of_x, of_weight, of_bias, of_residual]
    *inputs, before = ctx.saved_tensors
    grads = iter(_op_bwd(grad, *inputs, ctx.activation, wanted, before, ctx.backend))
    d_x, d_weight, d_bias, d_residual = (next(grads) if want else None for want in wanted)
    return d_x, d_weight, d_bias, None, d_residual


def _triton() -> ModuleType:
    from . import triton

    return triton


_PROVIDERS = {"reference": reference, "native": native, "triton": _triton}
_op, _op_bwd = library.define_with_gradient(
    "linear",
    library.Form(Linear, "Tensor", _check, _fake),
    library.Form(LinearGradient, "Tensor[]", _check_bwd, _fake_bwd),
    providers=_PROVIDERS,
    setup_context=_setup_context,
    backward=_backward,
)
# the same, and what its gradient would compute again
_op_keep = library.define_differentiable(
    "linear_keep",
    library.Form(Linear, "(Tensor, Tensor)", _check, _fake_keep),
    providers=_PROVIDERS,
    setup_context=_setup_context,
    backward=_backward,
    keeps=True,
)
