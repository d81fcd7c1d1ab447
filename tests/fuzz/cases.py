"""One case: a random problem, run in one of the ways in which an op may be called, and judged."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import vlmkern

from . import faults, judge, problems
from .generate import Arena, Draw
from .judge import Failure
from .problems import Judge, Problem
from .rounding import Exact

PASSED, DECLINED, REFUSED = "passed", "declined", "refused"


def run(op: str, seed: int, index: int, mode: str | None = None, note: Callable[[str], None] = lambda _: None) -> str:
    """Runs the case that the seed and the index stand for: PASSED; DECLINED, where the native backend had no kernel
    and the automatic choice was right; REFUSED, where the arguments were bad and the op said so.

    Raises:
        Failure: the op did something else. Errors of any other type that escape are failures too.
    """
    draw = Draw(op, seed, index)
    drawn = draw.choices(list(MODES), [weight for _, weight in MODES.values()])[0]
    mode = mode or drawn
    note(mode)
    with _uninitialized_memory_is_nan() if draw.chance(0.3) else contextlib.nullcontext():
        return MODES[mode][0](op, Arena(draw), lambda text: note(f"{mode}: {text}"))


def describe(op: str, seed: int, index: int, mode: str | None = None) -> str:
    """What the case is about: its mode and its arguments, or its fault."""
    notes = [""]
    with contextlib.suppress(Exception):
        run(op, seed, index, mode, notes.append)
    return notes[-1]


def forward(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """Repeated calls give the same bits and write to nothing but their results, which may then be written to."""
    draw, problem = arena.draw, problems.make(op, arena)
    context = draw.choice([contextlib.nullcontext, torch.no_grad, torch.inference_mode])
    note(f"{context.__name__}, {problem.describe()}")
    with context():
        arena.seal()
        outcome, results = _call(problem, draw.choice([1, 1, 2, 3]))
        arena.verify()
        first = results[0]
        for again in results[1:]:
            for a, b in zip(first, again, strict=True):
                judge.same_bits("out", a, b)
        Judge(problem).outputs(first)
        for name, y in zip(("out", "second"), first, strict=False):
            _is_dense(name, y, problem)
            if not any(y is t for t in problem.tensors().values()):
                y += 1
        arena.verify()
    return outcome


def gradient(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """Gradients of random outputs by random inputs; results may be written to before the backward pass."""
    draw, problem = arena.draw, problems.make(op, arena)
    names = _some(draw, problem.differentiable())
    note(f"by {', '.join(names)}; {problem.describe()}")
    tensors = problem.tensors()
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    trained = problem.with_tensors(leaves)
    arena.seal()
    outcome, (outputs, *_) = _call(trained, 1)
    arena.verify()
    grads = [_grad_output(draw, y) for y in outputs]
    if len(grads) == 2 and draw.chance(0.5):
        grads[draw.randrange(2)] = None
    if not any(g is not None and y.requires_grad for g, y in zip(grads, outputs, strict=True)):
        return outcome
    written = draw.chance(0.25)
    if written:
        outputs = tuple(y if any(y is t for t in trained.tensors().values()) else y.add_(1) for y in outputs)
    arena.seal()
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    try:
        found = torch.autograd.grad(
            [y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
        )
    except RuntimeError as error:
        # an op that keeps its result for the backward, as torch's softmax does, may say that it has changed
        if written and op in ("attention", *problems.NORMS) and "modified by an inplace operation" in str(error):
            return outcome
        raise
    arena.verify()
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves.values(), strict=True)]
    for name, g in zip(names, found, strict=True):
        if g.dtype != leaves[name].dtype:
            raise Failure(f"gradient by {name}: dtype {g.dtype}, expected {leaves[name].dtype}")
    if problem.kind != "inf" and not (problem.kind == "large" and problem.dtype == torch.float16):
        Judge(problem).gradients(names, found, grads)
    return outcome


def double_backward(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """Must raise: there are first-order gradients only."""
    draw, problem = arena.draw, problems.make(op, arena)
    names = _some(draw, problem.differentiable())
    note(f"by {', '.join(names)}; {problem.describe()}")
    leaves = {name: problem.tensors()[name].detach().requires_grad_() for name in names}
    outcome, (outputs, *_) = _call(problem.with_tensors(leaves), 1)
    y = outputs[0]
    weights = torch.ones_like(y).requires_grad_()
    first = torch.autograd.grad(y, list(leaves.values()), weights, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None)
    try:
        torch.autograd.grad(total, [*leaves.values(), weights], allow_unused=True)
    except RuntimeError:
        return outcome
    raise Failure("a second backward pass raised nothing")


def functional(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """torch.func: vjp and grad are right, jvp is right or raises."""
    draw, problem = arena.draw, problems.make(op, arena, dtypes=None)
    names = _some(draw, problem.differentiable())
    which = draw.choice(["vjp", "grad", "jvp"])
    note(f"{which} by {', '.join(names)}; {problem.describe()}")
    primals = [problem.tensors()[name] for name in names]

    def call(*tensors: Tensor) -> Tensor:
        return problem.with_tensors(dict(zip(names, tensors, strict=True))).call()[0]

    if which == "jvp":
        return _jvp(problem, names, primals, call)
    if which == "vjp":
        y, pull = torch.func.vjp(call, *primals)
        grad = _grad_output(draw, y)
        found = pull(grad)
    else:
        y = problem.call()[0]
        grad = torch.ones(y.shape, dtype=y.dtype)
        found = torch.func.grad(lambda *t: call(*t).sum(), argnums=tuple(range(len(names))))(*primals)
    if problem.kind != "inf" and not (problem.kind == "large" and problem.dtype == torch.float16):
        Judge(problem).gradients(names, found, [grad])
    return PASSED


def _jvp(problem: Problem, names: list[str], primals: list[Tensor], call: Callable[..., Tensor]) -> str:
    draw = problem.draw
    tangents = [draw.normal(t.shape).to(t.dtype) for t in primals]
    try:
        _, found = torch.func.jvp(call, tuple(primals), tuple(tangents))
    except RuntimeError:
        return REFUSED
    exact = problem.upcast(torch.float64)
    _, expected = torch.func.jvp(
        lambda *t: exact.with_tensors(dict(zip(names, t, strict=True))).oracle(Exact(), problem.dtype)[0],
        tuple(exact.tensors()[name] for name in names),
        tuple(t.double() for t in tangents),
    )
    error, size = (found.double() - expected).abs(), expected.abs()
    if error.numel() and not error.nan_to_num(0).max() <= 0.1 * size.nan_to_num(0).max():
        raise Failure(f"jvp: error {error.max():.3g}, largest value {size.max():.3g}")
    return PASSED


def autocast(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """Every floating argument is cast, whatever its dtype, but float64."""
    draw = arena.draw
    dtype = draw.choice([torch.bfloat16, torch.float16])
    problem = problems.make(op, arena, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    note(f"{dtype}, {problem.describe()}")
    problem.dtype = dtype
    names = _some(draw, problem.differentiable()) if draw.chance(0.4) else []
    leaves = {name: problem.tensors()[name].detach().requires_grad_() for name in names}
    arena.seal()
    with torch.autocast("cpu", dtype):
        outcome, (outputs, *_) = _call(problem.with_tensors(leaves), 1)
    arena.verify()
    expected = [dtype] * len(outputs)
    if op == "add_layer_norm" and problem.arguments["residual"] is None:
        # the sum is x itself
        outputs, expected = outputs[:1], expected[:1]
    if [y.dtype for y in outputs] != expected:
        raise Failure(f"under autocast to {dtype}: got {[y.dtype for y in outputs]}")
    judged = Judge(problem, precision=dtype, cast=True)
    judged.outputs(outputs)
    _judge_gradients(judged, draw, names, leaves, outputs[0])
    return outcome


def registered(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """The op as torch knows it, with the results that the public function keeps back."""
    problem = problems.make(op, arena)
    note(problem.describe())
    arena.seal()
    outputs = problem.raw()
    arena.verify()
    inputs = {t.untyped_storage().data_ptr() for t in problem.tensors().values()}
    if any(y.numel() and y.untyped_storage().data_ptr() in inputs for y in outputs):
        raise Failure("a result shares its memory with an argument")
    if op in problems.NORMS and problem.arguments["residual"] is None:
        outputs = outputs[:1]
    if op == "attention" and problem.dtype in (torch.bfloat16, torch.float16):
        Judge(problem).outputs(outputs[:1])
        exact = problem.upcast(torch.float64).oracle(Exact(), problem.dtype)[1]
        if outputs[1].dtype != torch.float32:
            raise Failure(f"lse: got {outputs[1].dtype}, expected torch.float32")
        _near_enough_lse(problem, outputs[1], exact)
        return PASSED
    Judge(problem).outputs(outputs)
    return PASSED


def _near_enough_lse(problem: Problem, lse: Tensor, exact: Tensor) -> None:
    """Scores and sums are float32 whatever the tensors are, but the vector units sum low precision in their own way."""
    limit = torch.finfo(problem.dtype).eps + 1e-5 * exact.abs().nan_to_num(0, 0, 0).amax() if exact.numel() else 0.0
    error = (lse.double() - exact).abs()[exact.isfinite() & lse.isfinite()]
    if error.numel() and bool((error > limit).any()):
        raise Failure(f"lse: error {error.max():.3g}, limit {limit:.3g}")


def changed_weights(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """A weight that changes between calls, by whatever route, changes the result."""
    draw, problem = arena.draw, problems.make(op, arena)
    names = [n for n in problem.weights() if problem.tensors()[n].numel()]
    if not names:
        return PASSED
    name = draw.choice(names)
    route = draw.choice(list(ROUTES))
    note(f"{name} {route}; {problem.describe()}")
    plain = draw.chance(0.7)
    # a weight of its own in memory, as a module has it
    weight = Arena(draw).tensor(problem.tensors()[name].double(), problem.dtype, distinct=True, plain=plain)
    weight = weight.clone() if plain else weight
    if draw.chance(0.5):
        weight = torch.nn.Parameter(weight)
    problem = problem.with_tensors({name: weight})
    # copies of weights are made when they come back
    outcome, _ = _call(problem, draw.choice([1, 2, 3, 4]))
    ROUTES[route](weight, draw)
    outcome, results = _call(problem, 2)
    for outputs in results:
        Judge(problem).outputs([y.detach() for y in outputs])
    return outcome


def _through_numpy(weight: Tensor, draw: Draw) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    alias = weight.detach().view(integers).numpy()
    alias[..., draw.randrange(weight.shape[-1])] = 0


def _one_element(weight: Tensor, draw: Draw) -> None:
    weight.data[tuple(draw.randrange(n) for n in weight.shape)] = 3.0


def _replaced_data(weight: Tensor, draw: Draw) -> None:
    weight.data = draw.normal(weight.shape).to(weight.dtype)


def _set(weight: Tensor, draw: Draw) -> None:
    with torch.no_grad():
        weight.set_(draw.normal(weight.shape).to(weight.dtype))


def _step(weight: Tensor, draw: Draw) -> None:
    leaf = weight.requires_grad_()
    leaf.grad = draw.normal(weight.shape).to(weight.dtype)
    draw.choice([torch.optim.SGD, torch.optim.AdamW])([leaf], lr=0.5).step()


@torch.no_grad()
def _in_place(weight: Tensor, draw: Draw) -> None:
    weight.mul_(-0.5)


@torch.no_grad()
def _slice(weight: Tensor, draw: Draw) -> None:
    weight[draw.randrange(weight.shape[0])] = 1.0


def _data_slice(weight: Tensor, draw: Draw) -> None:
    weight.data[..., 1 if weight.shape[-1] > 1 else 0 :] = 0


ROUTES = {
    "in place": _in_place,
    "a slice in place": _slice,
    "a slice through data": _data_slice,
    "an element through data": _one_element,
    "through numpy": _through_numpy,
    "new data": _replaced_data,
    "set_": _set,
    "an optimizer's step": _step,
}


def compiled(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """torch.compile in one graph, with gradients; now and then with inductor."""
    draw, problem = arena.draw, problems.make(op, arena)
    backend = "inductor" if draw.chance(0.05) else "aot_eager"
    names = _some(draw, problem.differentiable()) if draw.chance(0.5) else []
    note(f"{backend}, by {', '.join(names)}; {problem.describe()}")
    leaves = {name: problem.tensors()[name].detach().requires_grad_() for name in names}
    every = problem.differentiable()
    tensors = problem.with_tensors(leaves).tensors()
    torch._dynamo.reset()

    @torch.compile(backend=backend, fullgraph=True)
    def call(*given: Tensor) -> tuple[Tensor, ...]:
        return problem.with_tensors(dict(zip(every, given, strict=True))).call()

    outputs = call(*(tensors[name] for name in every))
    judged = Judge(problem)
    judged.outputs([y.detach() for y in outputs])
    _judge_gradients(judged, draw, names, leaves, outputs[0])
    return PASSED


def bad_argument(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """One fault in an otherwise good call: an error that names the argument."""
    problem = problems.make(op, arena)
    fault = faults.draw_fault(problem)
    note(f"{fault.what}; {problem.describe()}")
    _raises(replace(problem, arguments=problem.arguments | fault.arguments).call, fault.names)
    return REFUSED


def backward_op(op: str, arena: Arena, note: Callable[[str], None]) -> str:
    """The registered backward, right for good arguments and an error for bad ones."""
    problem = problems.make(op, arena)
    while problem.kind in ("nan", "inf"):
        problem = problems.make(op, Arena(arena.draw))
    note(problem.describe())
    call = faults.backward_call(problem)
    if arena.draw.chance(0.3):
        call.judge(call.run())
        return PASSED
    what = call.spoil()
    if what is None:
        return PASSED
    note(f"{what}; {problem.describe()}")
    _raises(call.run, None, silent=faults.Corrupted)
    return REFUSED


def _raises(call: Callable[[], object], names: tuple[str, ...] | None, silent: type[Failure] = Failure) -> None:
    """The call raises one of the errors that the ops may raise, and the message has one of the names."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        message = str(error)
        if names is not None and not any(re.search(rf"\b{re.escape(name)}(?!\w)", message) for name in names):
            raise Failure(f"{type(error).__name__} without the argument's name: {message.splitlines()[0]}") from error
    except Exception as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
    else:
        raise silent("bad arguments raised nothing")


def _call(problem: Problem, times: int) -> tuple[str, list[tuple[Tensor, ...]]]:
    """The public function `times` times: natively where there is a kernel, else by the automatic choice."""
    native = problem.op in _native_ops()
    if native and problem.draw.chance(0.7):
        try:
            with vlmkern.use_backend("native"):
                return PASSED, [problem.call() for _ in range(times)]
        except vlmkern.BackendUnavailable as error:
            if not problem.declinable():
                raise Failure(f"the native backend declined: {error}") from error
            return DECLINED, [problem.call() for _ in range(times)]
    return PASSED, [problem.call() for _ in range(times)]


@functools.cache
def _native_ops() -> frozenset[str]:
    report = vlmkern.backends()["native"]
    chosen = "VLMKERN_BACKEND" not in os.environ
    return frozenset(report["ops"]) if chosen and report["available"] else frozenset()


def _is_dense(name: str, y: Tensor, problem: Problem) -> None:
    if y.dtype != problem.dtype:
        raise Failure(f"{name}: dtype {y.dtype}, expected {problem.dtype}")
    if not y.is_contiguous() and not any(y is t for t in problem.tensors().values()):
        raise Failure(f"{name}: strides {y.stride()} of shape {list(y.shape)}, expected a dense result")


def _some(draw: Draw, names: list[str]) -> list[str]:
    """All of the names, or some, at least one."""
    if draw.chance(0.3):
        return names
    return [n for n in names if draw.chance(0.5)] or [draw.choice(names)]


def _judge_gradients(judged: Judge, draw: Draw, names: list[str], leaves: dict[str, Tensor], output: Tensor) -> None:
    """The gradients of one output, for values that do not overflow."""
    if not names or judged.problem.kind not in ("normal", "mixed", "constant"):
        return
    grad = _grad_output(draw, output)
    found = torch.autograd.grad(output, list(leaves.values()), grad, allow_unused=True)
    kept = [(n, g) for n, g in zip(names, found, strict=True) if g is not None]
    judged.gradients([n for n, _ in kept], [g for _, g in kept], [grad])


def _grad_output(draw: Draw, y: Tensor) -> Tensor:
    """As autograd gives them: of a sum with strides of zero, or a view of anything. In a buffer of its own, as what is
    written to any view of a buffer counts as a change of all that autograd has saved of it."""
    if draw.chance(0.2):
        return torch.ones((), dtype=y.dtype).expand(y.shape)
    return Arena(draw).tensor(draw.normal(y.shape), y.dtype)


@contextlib.contextmanager
def _uninitialized_memory_is_nan() -> Iterator[None]:
    """Whatever a result leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MODES: dict[str, tuple[Callable[..., str], float]] = {
    "forward": (forward, 35),
    "gradient": (gradient, 25),
    "autocast": (autocast, 6),
    "registered": (registered, 6),
    "changed_weights": (changed_weights, 8),
    "functional": (functional, 4),
    "double_backward": (double_backward, 2),
    "bad_argument": (bad_argument, 9),
    "backward_op": (backward_op, 5),
    "compiled": (compiled, 0.1),
}
