"""Random arguments for every op, and what is needed to judge a call with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmkern import ops

from . import judge, oracles
from .generate import FLOATS, Arena, Draw
from .makers import Maker
from .rounding import Exact, Plain, Shaken, accumulator, sum_size

NOT_DIFFERENTIABLE = ("mask", "keep", "cu_seqlens", "cu_seqlens_k", "cos", "sin", "cos_k", "sin_k")
# ops that give a sum beside its norm
NORMS = ("add_layer_norm", "rms_norm")


@dataclass
class Problem:
    """Arguments under their names, in the order of the registered op. `kind` is that of the values, `rows` whether
    they are so extreme that every row is judged by itself."""

    op: str
    arguments: dict[str, Any]
    dtype: torch.dtype
    kind: str
    arena: Arena
    rows: bool = False

    @property
    def draw(self) -> Draw:
        return self.arena.draw

    def call(self) -> tuple[Tensor, ...]:
        """The public function."""
        return CALLS[self.op](dict(self.arguments))

    def registered(self) -> Callable[..., Any]:
        return getattr(torch.ops.vlmkern, self.op)

    def raw(self) -> tuple[Tensor, ...]:
        """The registered op itself, which also gives what the public function keeps back."""
        arguments = dict(self.arguments)
        if self.op == "attention" and arguments["scale"] is None:
            arguments["scale"] = arguments["q"].shape[-1] ** -0.5
        result = self.registered()(*arguments.values())
        return result if isinstance(result, tuple) else (result,)

    def tensors(self) -> dict[str, Tensor]:
        return dict(_tensors(self.arguments))

    def differentiable(self) -> list[str]:
        return [name for name in self.tensors() if name not in NOT_DIFFERENTIABLE]

    def weights(self) -> list[str]:
        return [name for name in self.differentiable() if name.startswith(("w", "b"))]

    def with_tensors(self, tensors: dict[str, Tensor]) -> Problem:
        """The same problem with other tensors under these names."""
        arguments = dict(self.arguments)
        if "features" in arguments:
            arguments["features"] = [tensors.get(f"features[{i}]", f) for i, f in enumerate(arguments["features"])]
        arguments |= {name: tensor for name, tensor in tensors.items() if "[" not in name}
        return replace(self, arguments=arguments)

    def upcast(self, dtype: torch.dtype, cast_first: torch.dtype | None = None) -> Problem:
        """Dense copies in `dtype` of everything that is differentiable."""
        tensors = self.tensors()
        copies = {}
        for name in self.differentiable():
            x = tensors[name].detach()
            x = x if cast_first is None else x.to(cast_first)
            copies[name] = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return self.with_tensors(copies)

    def oracle(self, rounding: Exact, precision: torch.dtype) -> tuple[Tensor, ...]:
        """The op's results for upcast arguments, as tensors of that precision would give them."""
        oracle = getattr(oracles, self.op)
        if self.op in NORMS:
            return oracle(self.arguments, rounding, precision)
        return oracle(self.arguments, rounding)

    def declinable(self) -> bool:
        """Whether a backend may have no kernel for this."""
        empty = any(t.numel() == 0 for t in self.tensors().values())
        return empty or self.dtype != torch.float32

    def describe(self) -> str:
        parts = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                parts.append(f"{name} {_shown(value)}")
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                parts.append(f"{name} [{', '.join(map(_shown, value))}]")
            elif value is not None:
                parts.append(f"{name}={value}")
        return f"{self.kind} values, " + ", ".join(parts)


class Judge:
    """Compares the outputs, or the gradients by some inputs, of one problem with float64."""

    def __init__(self, problem: Problem, *, precision: torch.dtype | None = None, cast: bool = False):
        self.problem = problem
        self.precision = precision or problem.dtype
        cast_first = self.precision if cast else None
        self._exact = problem.upcast(torch.float64, cast_first)
        self._plain = _once(lambda: problem.upcast(accumulator(self.precision), cast_first))

    def outputs(self, actual: Sequence[Tensor], names: Sequence[str] = ("out", "second")) -> None:
        finite = all(bool(t.isfinite().all()) for t in self._exact.tensors().values())
        if self.problem.op == "attention" and finite:
            # of all values that a dtype has, turned ones may be too large for it
            turned = oracles.turned_pair(self._exact.arguments)
            finite = all(bool(t.to(self.precision).isfinite().all()) for t in turned)
        if self.problem.op == "attention" and finite and self._scores_are_noise():
            low, high = oracles.attention_range(self._exact.arguments)
            judge.between(names[0], actual[0], low, high, self.precision)
        nan_is_strict = self.problem.kind == "nan"
        self._compare(names, actual, lambda problem, rounding: problem.oracle(rounding, self.precision), nan_is_strict)

    def gradients(self, names: Sequence[str], actual: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Of the sum over outputs of output times its gradient, None where an output has none."""

        def gradients(problem: Problem, rounding: Exact) -> list[Tensor]:
            return _gradients(problem, names, grads, rounding, self.precision)

        if self._scores_are_noise():
            # made again from the log-sum-exp, the weights are e to the power of what roundings leave of the scores
            judge.nan_like_plain(actual, gradients(self._plain(), Plain(self.precision)))
            return
        # the weights of a pooling window sum to one whatever they are, so that a gradient need not have their NaN
        nan_is_strict = self.problem.kind == "nan" and self.problem.op != "attention_pool"
        self._compare([f"gradient by {name}" for name in names], actual, gradients, nan_is_strict)

    def _compare(
        self,
        names: Sequence[str],
        actual: Sequence[Tensor],
        run: Callable[[Problem, Exact], Sequence[Tensor]],
        nan_is_strict: bool,
    ) -> None:
        exact = run(self._exact, Exact())
        plain, chaotic = _once(lambda: run(self._plain(), Plain(self.precision))), self._scores_are_noise()
        for i, (name, a, e) in enumerate(zip(names, actual, exact, strict=False)):
            judge.close(
                name,
                a,
                e,
                plain=lambda i=i: plain()[i],
                moved=lambda i=i: (run(*self._shaken())[i] for _ in range(12)),
                precision=self.precision,
                per_row=self.problem.rows,
                nan_is_strict=nan_is_strict,
                chaotic=chaotic,
            )

    def _scores_are_noise(self) -> bool:
        """Whether scores are so large that their roundings decide between the tokens."""
        arguments, computed = self._exact.arguments, torch.finfo(accumulator(self.precision)).eps
        if self.problem.op == "attention":
            return oracles.attention_score_bound(arguments) * computed > 0.01
        if self.problem.op == "attention_pool":
            bound = oracles.attention_pool_score_bound(arguments)
            return bound * computed > 0.01 or bound * torch.finfo(self.precision).eps > 1
        return False

    def _shaken(self) -> tuple[Problem, Shaken]:
        # pooling may keep products of its weights, or of them with queries, in the tensors' dtype
        stored = self.problem.op == "attention_pool"
        shaken, tensors = Shaken(self.precision, self.problem.draw.generator), self._exact.tensors()
        moved = {n: shaken.argument(tensors[n].detach(), stored=stored) for n in self._exact.differentiable()}
        return self._exact.with_tensors(moved), shaken


def make(op: str, arena: Arena, *, dtypes: Sequence[torch.dtype] | None = None) -> Problem:
    """A random problem; with `dtypes`, each floating tensor has one of those, whatever the others have."""
    draw = arena.draw
    dtype = draw.choices(FLOATS, (45, 25, 18, 12))[0]
    kind = draw.values_kind()
    if kind == "inf" and op == "attention_pool":
        # means of infinities are scores of infinities: what is left of them depends on the order of the steps
        kind = "nan"
    maker = Maker(arena, dtype, kind, dtypes)
    arguments = getattr(maker, op)()
    problem = Problem(op, arguments, dtype, kind, arena, rows=kind in ("mixed", "large") or maker.extreme)
    if kind in ("nan", "inf"):
        tensors = problem.tensors()
        safe = [n for n in problem.differentiable() if n not in maker.overlapping and tensors[n].numel()]
        # what is hidden from a query may be multiplied by 0, or left out
        if safe and arguments.get("scale") != 0.0 and not maker.hides:
            draw.sprinkle(tensors[draw.choice(safe)], kind)
    return problem


def _linear(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return (ops.linear(a.pop("x"), a.pop("weight"), a.pop("bias"), **a),)


def _swiglu_mlp(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return (ops.swiglu_mlp(a.pop("x"), a.pop("w_up"), a.pop("w_down"), **a),)


def _attention(a: dict[str, Any]) -> tuple[Tensor, ...]:
    left, right = a.pop("window_left"), a.pop("window_right")
    a |= {"window": (left, right), "causal": right == 0}
    for name, cos, sin in (("rotary", "cos", "sin"), ("rotary_k", "cos_k", "sin_k")):
        a[name] = _pair(a.pop(cos), a.pop(sin))
    return (ops.attention(a.pop("q"), a.pop("k"), a.pop("v"), **a),)


def _add_layer_norm(a: dict[str, Any]) -> tuple[Tensor, ...]:
    positional = [a.pop(name) for name in ("x", "residual", "weight", "bias")]
    return ops.add_layer_norm(*positional, **a)


def _pair(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if cos is None else (cos, sin)


def _rms_norm(a: dict[str, Any]) -> tuple[Tensor, ...]:
    a["rotary"] = _pair(a.pop("cos"), a.pop("sin"))
    found = ops.rms_norm(a.pop("x"), a.pop("weight"), **a)
    return found if isinstance(found, tuple) else (found,)


def _attention_pool(a: dict[str, Any]) -> tuple[Tensor, ...]:
    positional = [a.pop(name) for name in ("features", "w_q", "b_q", "w_kv", "b_kv", "w_o", "b_o")]
    return (ops.attention_pool(*positional, **a),)


CALLS = {
    "attention": _attention,
    "attention_pool": _attention_pool,
    "swiglu_mlp": _swiglu_mlp,
    "linear": _linear,
    "add_layer_norm": _add_layer_norm,
    "rms_norm": _rms_norm,
}


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif name == "features":
            yield from ((f"features[{i}]", f) for i, f in enumerate(value))


def _gradients(
    problem: Problem, names: Sequence[str], grads: Sequence[Tensor | None], rounding: Exact, precision: torch.dtype
) -> list[Tensor]:
    leaves = {name: problem.tensors()[name].detach().requires_grad_() for name in names}
    outputs = problem.with_tensors(leaves).oracle(rounding, precision)
    # dense: torch's gradient of gelu refuses rows that overlap
    up = [
        None if g is None else rounding.computed(g.detach().contiguous().to(y.dtype))
        for y, g in zip(outputs, grads, strict=False)
    ]
    if problem.op == "attention" and isinstance(rounding, Shaken):
        # backwards subtract rowsum(dO * O) with O as it was stored: its roundings are gradients of the log-sum-exp
        out = outputs[0].detach()
        change = (up[0] * (rounding.stored(rounding.computed(out, sum_size(out))) - out)).sum(-1)
        up.append(-change.transpose(-1, -2))
    pairs = [(y, g) for y, g in zip(outputs, up, strict=False) if g is not None and y.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    outputs, up = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), up, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves.values(), strict=True)]


def _once(function: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(function())
        return made[0]

    return get


def _shown(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} strides {list(t.stride())}"
