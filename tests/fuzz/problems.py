"""Random arguments for every op, and what is needed to judge a call with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmkern import ops

from . import judge, oracles
from .generate import FLOATS, Arena, Draw
from .rounding import Exact, Plain, Shaken, accumulator, sum_size

ACTIVATIONS = ("none", "gelu_tanh", "gelu", "silu")
# ops that give a sum beside its norm
NORMS = ("add_layer_norm", "rms_norm")
MASK_VALUES = (1.0, 1.0, 1.0, 0.0, 0.0, 0.37, 0.999, -1.0, 2.0)
MASK_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


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
        return [name for name in self.tensors() if name not in ("mask", "keep", "cu_seqlens")]

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
        if safe and arguments.get("scale") != 0.0:
            draw.sprinkle(tensors[draw.choice(safe)], kind)
    return problem


class Maker:
    def __init__(self, arena: Arena, dtype: torch.dtype, kind: str, dtypes: Sequence[torch.dtype] | None):
        self.arena, self.draw, self.dtype, self.kind, self.dtypes = arena, arena.draw, dtype, kind, dtypes
        self.extreme = False
        self.overlapping: set[str] = set()
        # in half of the cases one tensor alone has the unusual values
        self._everywhere = self.draw.chance(0.5)
        self._chosen = False

    def tensor(self, name: str, shape: Sequence[int], factor: float = 1.0, **layout: Any) -> Tensor:
        kind = self.kind
        if not self._everywhere:
            kind = "normal" if self._chosen or self.draw.chance(0.5) else self.kind
            self._chosen |= kind == self.kind
        values = self.draw.values(shape, kind, factor)
        dtype = self.dtype if self.dtypes is None else self.draw.choice(self.dtypes)
        view = self.arena.tensor(values, dtype, **layout)
        if id(view) in self.arena.overlapping:
            self.overlapping.add(name)
        return view

    def maybe(self, name: str, shape: Sequence[int], probability: float = 0.6) -> Tensor | None:
        return self.tensor(name, shape) if self.draw.chance(probability) else None

    def rows(self, limit: int = 40) -> list[int]:
        """Leading sizes: most often one of at most `limit`, both sides of the few rows with kernels of their own."""
        draw = self.draw
        if draw.chance(0.03):
            return [draw.randint(150, 400)]
        if draw.chance(0.1):
            return [] if draw.chance(0.5) else [draw.size(4, zero=True), draw.size(5, zero=True), draw.size(3)]
        return [draw.randint(1, 6) if draw.chance(0.4) else draw.size(limit, zero=True)]

    def linear(self) -> dict[str, Any]:
        draw = self.draw
        rows, inputs, outputs = self.rows(), draw.size(260, zero=True), draw.size(130, zero=True)
        return {
            "x": self.tensor("x", [*rows, inputs]),
            "weight": self.tensor("weight", [outputs, inputs], max(inputs, 1) ** -0.5),
            "bias": self.maybe("bias", [outputs]),
            "activation": draw.choice(ACTIVATIONS),
            "residual": self.maybe("residual", [*rows, outputs], 0.4),
        }

    def swiglu_mlp(self) -> dict[str, Any]:
        draw = self.draw
        rows, inputs = self.rows(), draw.size(130, zero=True)
        features, outputs = draw.size(70, zero=True), draw.size(40, zero=True)
        return {
            "x": self.tensor("x", [*rows, inputs]),
            "w_up": self.tensor("w_up", [2 * features, inputs], max(inputs, 1) ** -0.5),
            "w_down": self.tensor("w_down", [outputs, features], max(features, 1) ** -0.5),
            "b_up": self.maybe("b_up", [2 * features]),
            "b_down": self.maybe("b_down", [outputs]),
        }

    def add_layer_norm(self) -> dict[str, Any]:
        draw = self.draw
        shape = [*self.rows(), draw.size(300, zero=True)]
        return {
            "x": self.tensor("x", shape),
            "residual": self.maybe("residual", shape),
            "weight": self.maybe("weight", shape[-1:]),
            "bias": self.maybe("bias", shape[-1:]),
            "eps": draw.choice([1e-6, 1e-5, 1e-3]),
        }

    def rms_norm(self) -> dict[str, Any]:
        draw = self.draw
        # of heads too, of which there may be views
        shape = [*self.rows(), *([draw.size(4)] if draw.chance(0.3) else []), draw.size(300, zero=True)]
        return {
            "x": self.tensor("x", shape),
            "weight": self.tensor("weight", shape[-1:]),
            "residual": self.maybe("residual", shape),
            "eps": draw.choice([1e-6, 1e-5, 1e-3]),
            "offset": draw.choice([0.0, 0.0, 1.0, -0.3]),
        }

    def attention(self) -> dict[str, Any]:
        draw = self.draw
        dim, heads, budget = draw.size(256), draw.choice([1, 1, 2, 3, 4, 8, 16]), 3e6 if draw.chance(0.05) else 4e5
        most = max(1, int((budget / (heads * dim)) ** 0.5))
        packed = draw.chance(0.5)
        bounds = longest = None
        if packed:
            lengths = [draw.size(min(most, 300), zero=True) for _ in range(draw.choice([0, 1, 1, 2, 3, 5]))]
            lengths = [0 if draw.chance(0.1) else n for n in lengths]
            shape = [sum(lengths), heads, dim]
            values = torch.tensor([0, *lengths]).cumsum(0)
            bounds = self.arena.tensor(values, torch.int32, distinct=True)
            longest = max(lengths, default=0) + draw.choice([0, 0, 1, 1000])
        else:
            shape = [draw.size(3, zero=True), draw.size(min(most, 300), zero=True), heads, dim]
        factor = 1.0
        if draw.chance(0.12):
            # scores from a hundred to beyond 1e9
            factor, self.extreme = 10 ** draw.uniform(1, 5), True
        return {
            "q": self.tensor("q", shape, factor, unit_last_stride=True),
            "k": self.tensor("k", shape, factor, unit_last_stride=True),
            "v": self.tensor("v", shape, unit_last_stride=True),
            "scale": draw.choice([None, None, 0.3, -0.4, 0.0, dim**-0.5]),
            "cu_seqlens": bounds,
            "max_seqlen": longest,
        }

    def attention_pool(self) -> dict[str, Any]:
        draw = self.draw
        heads = draw.choice([1, 1, 1, 2, 3, 4, 16])
        key, value = (draw.size(limit) for limit in ((24, 40) if heads < 4 else (8, 8)))
        grid, window = [draw.size(7), draw.size(7)], [draw.randint(1, 3), draw.randint(1, 3)]
        tiles, layers, channels = draw.size(3, zero=True), draw.choice([1, 2, 2, 3]), draw.size(70, zero=True)
        outputs, width = draw.size(40, zero=True), layers * channels
        factor = max(width, 1) ** -0.5
        windows = tiles * math.ceil(grid[0] / window[0]) * math.ceil(grid[1] / window[1])
        mask = pad_embed = keep = None
        if draw.chance(0.5):
            dtype = draw.choice(MASK_DTYPES)
            values = torch.tensor(draw.choices(MASK_VALUES, k=tiles * grid[0] * grid[1]), dtype=torch.float64)
            values = values.abs() if dtype == torch.uint8 else values
            mask = self.arena.tensor(values.reshape(tiles, grid[0] * grid[1]), dtype)
        if mask is not None:
            pad_embed = self.tensor("pad_embed", [2, width])
        if draw.chance(0.4):
            chosen = [draw.randrange(windows) for _ in range(draw.choice([0, 1, 2, 5, 12]))] if windows else []
            keep = self.arena.tensor(torch.tensor(chosen, dtype=torch.int64), torch.int64, distinct=True)
        return {
            "features": [
                self.tensor(f"features[{i}]", [tiles, grid[0] * grid[1], channels], unit_last_stride=True)
                for i in range(layers)
            ],
            "w_q": self.tensor("w_q", [heads * key, width], factor),
            "b_q": self.maybe("b_q", [heads * key]),
            "w_kv": self.tensor("w_kv", [heads * (key + value), width], factor),
            "b_kv": self.maybe("b_kv", [heads * (key + value)]),
            "w_o": self.tensor("w_o", [outputs, heads * value], (heads * value) ** -0.5),
            "b_o": self.maybe("b_o", [outputs]),
            "grid": grid,
            "num_heads": heads,
            "window": window,
            "pad_embed": pad_embed,
            "mask": mask,
            "keep": keep,
        }


def _linear(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return (ops.linear(a.pop("x"), a.pop("weight"), a.pop("bias"), **a),)


def _swiglu_mlp(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return (ops.swiglu_mlp(a.pop("x"), a.pop("w_up"), a.pop("w_down"), **a),)


def _attention(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return (ops.attention(a.pop("q"), a.pop("k"), a.pop("v"), **a),)


def _add_layer_norm(a: dict[str, Any]) -> tuple[Tensor, ...]:
    positional = [a.pop(name) for name in ("x", "residual", "weight", "bias")]
    return ops.add_layer_norm(*positional, **a)


def _rms_norm(a: dict[str, Any]) -> tuple[Tensor, ...]:
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
