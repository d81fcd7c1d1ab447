"""Arguments that no op takes: one fault a case, in a public call or in a call of a registered backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .generate import Draw
from .judge import Failure
from .problems import Judge, Problem


class Corrupted(Failure):
    """A call that may have written outside its tensors: nothing that this process does from here on can be judged."""


@dataclass
class Fault:
    """Arguments to put in the place of good ones, and the names of which the error must mention one."""

    what: str
    arguments: dict[str, Any]
    names: tuple[str, ...]


# the arguments of each op that may not be None
REQUIRED = {
    "attention": ("q", "k", "v"),
    "attention_pool": ("features", "w_q", "w_kv", "w_o"),
    "swiglu_mlp": ("x", "w_up", "w_down"),
    "linear": ("x", "weight"),
    "add_layer_norm": ("x",),
    "rms_norm": ("x", "weight"),
}


def draw_fault(problem: Problem) -> Fault:
    """One that the problem can have."""
    draw = problem.draw
    special = _SPECIAL[problem.op](problem)
    if special and draw.chance(0.5):
        what, changes = draw.choice(special)
        return Fault(what, changes, tuple(changes) if len(changes) == 1 else tuple(problem.arguments))
    names = [n for n in problem.differentiable() if "[" not in n]
    if len(names) == 1 and problem.op == "add_layer_norm":
        # x alone may have any size and be anywhere
        return Fault("x None", {"x": None}, ("x",))
    name = draw.choice(names + list(REQUIRED[problem.op]))
    return _tensor_fault(problem, name)


def _tensor_fault(problem: Problem, name: str) -> Fault:
    draw, value = problem.draw, problem.arguments[name]
    anchor = name == REQUIRED[problem.op][0]
    everyone = tuple(problem.arguments)
    if name == "features":
        features = list(value)
        i = draw.randrange(len(features))
        kind, features[i] = _spoiled(draw, features[i], optional=False, any_rank=False)
        return Fault(f"features[{i}] {kind}", {name: features}, everyone if i == 0 else ("features",))
    kind, bad = _spoiled(
        draw, value, optional=name not in REQUIRED[problem.op], any_rank=anchor and problem.op != "attention"
    )
    # the first argument says what the others should be: they are the ones that do not fit it, or each other
    own = kind in ("None", "a string", "a list", "a number", "an array") or not (anchor or kind == "size")
    return Fault(f"{name} {kind}", {name: bad}, (name,) if own else everyone)


def _spoiled(draw: Draw, x: Tensor, *, optional: bool, any_rank: bool) -> tuple[str, Any]:
    """What was done to the tensor, and what became of it."""
    kinds = ["a string", "a list", "a number", "an array", "dtype", "device", "scalar", "size"]
    kinds += [] if optional else ["None"]
    kinds += [] if any_rank else ["rank"]
    kind = draw.choice(kinds)
    if kind == "dtype":
        return kind, x.to(draw.choice([torch.int32, torch.complex64, torch.bool, torch.int64]))
    if kind == "rank":
        return kind, x.unsqueeze(0) if draw.chance(0.5) else x.flatten().unsqueeze(0).unsqueeze(0).unsqueeze(0)[None]
    if kind == "size":
        # the last dimension, in which every argument has to fit another one
        return kind, torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1)
    others = {
        "a string": "x",
        "a list": [1.0, 2.0],
        "a number": 1.0,
        "an array": x.detach().to(torch.float64).numpy(),
        "None": None,
    }
    if kind in others:
        return kind, others[kind]
    return (kind, x.to("meta")) if kind == "device" else (kind, x.new_zeros(()))


def _attention(problem: Problem) -> list[tuple[str, dict[str, Any]]]:
    a, draw = problem.arguments, problem.draw
    q, bounds = a["q"], a["cu_seqlens"]
    found: list[tuple[str, dict[str, Any]]] = [("scale a string", {"scale": "a"}), ("scale a list", {"scale": [1.0]})]
    if q.shape[-1] > 1 and q.numel():
        name = draw.choice("qkv")
        apart = torch.stack([a[name]] * 2, -1)[..., 0]
        found.append((f"{name} with a last stride of 2", {name: apart}))
    if bounds is None:
        found += [
            ("max_seqlen alone", {"max_seqlen": 3}),
            ("cu_seqlens for dense tensors", {"cu_seqlens": torch.zeros(2, dtype=torch.int32), "max_seqlen": 1}),
        ]
        return found
    found += [
        ("max_seqlen None", {"max_seqlen": None}),
        ("max_seqlen negative", {"max_seqlen": -draw.randint(1, 2**40)}),
        ("max_seqlen a string", {"max_seqlen": "3"}),
        ("max_seqlen a fraction", {"max_seqlen": 2.5}),
        ("cu_seqlens None", {"cu_seqlens": None}),
        ("cu_seqlens int64", {"cu_seqlens": bounds.long()}),
        ("cu_seqlens float", {"cu_seqlens": bounds.float()}),
        ("cu_seqlens of rank 2", {"cu_seqlens": bounds[None]}),
        ("cu_seqlens of rank 0", {"cu_seqlens": bounds[0]}),
        ("cu_seqlens empty", {"cu_seqlens": bounds[:0]}),
        ("cu_seqlens on meta", {"cu_seqlens": bounds.to("meta")}),
        ("cu_seqlens a list", {"cu_seqlens": bounds.tolist()}),
        ("cu_seqlens past the end", {"cu_seqlens": bounds + torch.arange(len(bounds), dtype=torch.int32) + 1}),
        ("cu_seqlens negative", {"cu_seqlens": bounds - 1}),
    ]
    longest = int(bounds.diff().max()) if len(bounds) > 1 else 0
    if longest:
        found.append(("max_seqlen too small", {"max_seqlen": longest - 1}))
    if len(bounds) > 2 and q.shape[0] > 0:
        found.append(("cu_seqlens decreasing", {"cu_seqlens": _decreasing(bounds)}))
    return found


def _decreasing(bounds: Tensor) -> Tensor:
    bad = bounds.clone()
    bad[1] = bounds[-1] + 7
    return bad


def _attention_pool(problem: Problem) -> list[tuple[str, dict[str, Any]]]:
    a, draw = problem.arguments, problem.draw
    mask, pad_embed, keep, first = a["mask"], a["pad_embed"], a["keep"], a["features"][0]
    found: list[tuple[str, dict[str, Any]]] = [
        ("no features", {"features": []}),
        ("num_heads 0", {"num_heads": 0}),
        ("num_heads negative", {"num_heads": -1}),
        ("num_heads a string", {"num_heads": "2"}),
        ("num_heads a fraction", {"num_heads": 1.5}),
        ("num_heads that do not divide", {"num_heads": a["w_q"].shape[0] * a["w_o"].shape[1] + 1}),
    ]
    for name in ("grid", "window"):
        bad = draw.choice([[0, 1], [-1, -1], [2], [1, 1, 1], [], [1.5, 1.0], ["a", "b"]])
        found.append((f"{name} {bad}", {name: bad}))
    found.append(("grid too large", {"grid": [a["grid"][0] + 1, a["grid"][1]]}))
    found.append(("grid huge", {"grid": [2**40, 2**40]}))
    if mask is not None:
        found += [
            ("mask without pad_embed", {"pad_embed": None}),
            ("pad_embed without mask", {"mask": None}),
            ("mask complex", {"mask": mask.to(torch.complex64)}),
            ("mask of rank 1", {"mask": mask.flatten()}),
            ("mask on meta", {"mask": mask.to("meta")}),
            ("mask too long", {"mask": torch.cat([mask, mask[:, :1]], 1)}),
            ("pad_embed of one row", {"pad_embed": pad_embed[:1]}),
        ]
    windows = first.shape[0] * -(-a["grid"][0] // a["window"][0]) * -(-a["grid"][1] // a["window"][1])
    for index in (windows, -1, 2**62, -(2**62)):
        kept = torch.tensor([0, index, 0] if windows else [index])
        found.append((f"keep {index}", {"keep": kept}))
    keep = torch.zeros(3, dtype=torch.int64) if keep is None else keep
    found += [
        ("keep int32", {"keep": keep.int()}),
        ("keep bool", {"keep": keep.bool()}),
        ("keep of rank 2", {"keep": keep[None]}),
        ("keep of rank 0", {"keep": torch.tensor(0)}),
        ("keep a list", {"keep": [0]}),
        ("keep on meta", {"keep": keep.to("meta")}),
    ]
    if first.shape[-1] > 1 and first.numel():
        found.append(("features far apart", {"features": [torch.stack([f, f], -1)[..., 0] for f in a["features"]]}))
    return found


def _linear(problem: Problem) -> list[tuple[str, dict[str, Any]]]:
    bad = problem.draw.choice(["relu", "", "GELU", None, 3, ["gelu"]])
    return [(f"activation {bad!r}", {"activation": bad})]


def _add_layer_norm(problem: Problem) -> list[tuple[str, dict[str, Any]]]:
    bad = problem.draw.choice(["a", None, [1e-6]])
    return [(f"eps {bad!r}", {"eps": bad})]


def _rms_norm(problem: Problem) -> list[tuple[str, dict[str, Any]]]:
    name, bad = problem.draw.choice(["eps", "offset"]), problem.draw.choice(["a", None, [1e-6]])
    return [(f"{name} {bad!r}", {name: bad})]


def _swiglu_mlp(problem: Problem) -> list[tuple[str, dict[str, Any]]]:
    w_up = problem.arguments["w_up"]
    return [("w_up of an odd number of rows", {"w_up": torch.cat([w_up, w_up.new_zeros(1, w_up.shape[1])])})]


_SPECIAL: dict[str, Callable[[Problem], list[tuple[str, dict[str, Any]]]]] = {
    "attention": _attention,
    "attention_pool": _attention_pool,
    "linear": _linear,
    "add_layer_norm": _add_layer_norm,
    "rms_norm": _rms_norm,
    "swiglu_mlp": _swiglu_mlp,
}


@dataclass
class BackwardCall:
    """A call of a registered backward with good arguments, until `spoil`."""

    problem: Problem
    arguments: dict[str, Any]
    names: list[str]
    results: list[str]
    grads: list[Tensor | None]

    def run(self) -> Sequence[Tensor]:
        op = getattr(torch.ops.vlmkern, f"{self.problem.op}_bwd")
        return op(*self.arguments.values())

    def judge(self, found: Sequence[Tensor]) -> None:
        if len(found) != len(self.results):
            raise Failure(f"{len(found)} gradients, expected {len(self.results)}")
        pairs = [(name, g) for name, g in zip(self.results, found, strict=True) if name in self.names]
        Judge(self.problem).gradients([n for n, _ in pairs], [g for _, g in pairs], self.grads)

    def spoil(self) -> str | None:
        """Puts one fault into the arguments and says which; None where there is nothing to spoil."""
        draw = self.problem.draw
        a = self.arguments
        if "keep" in a and draw.chance(0.2):
            index = draw.choice([-1, 2**40, 10**6])
            a["keep"] = torch.full((len(a["grad"]) if a["keep"] is not None else 1,), index)
            a["grad"] = a["grad"].flatten(0, -2)[: len(a["keep"])]
            if len(a["grad"]):
                return f"keep {index}"
        if a.get("cu_seqlens") is not None and a["cu_seqlens"].numel() > 1 and draw.chance(0.2):
            a["cu_seqlens"] = a["cu_seqlens"] + torch.arange(a["cu_seqlens"].numel(), dtype=torch.int32) * 9
            return "cu_seqlens past the end"
        if "wanted" in a and draw.chance(0.1):
            a["wanted"] = draw.choice([a["wanted"][:-1], [*a["wanted"], True], []])
            return f"wanted of {len(a['wanted'])}"
        tensors = [n for n, t in a.items() if isinstance(t, Tensor) and n not in ("mask", "keep", "cu_seqlens")]
        name = draw.choice(tensors)
        return self._spoil(name, draw.choice(["narrow", "short", "long", "dtype", "device", "scalar", "None"]))

    def _spoil(self, name: str, kind: str) -> str | None:
        x = self.arguments[name]
        if kind == "narrow" or (kind == "short" and x.dim() == 0):
            bad = x[..., :-1] if x.dim() and x.shape[-1] > 1 else None
        elif kind in ("short", "long"):
            if x.dim() == 0 or x.numel() == 0:
                return None
            bad = torch.cat([x, x[:1]]) if kind == "long" else x[:-1] if x.shape[0] > 1 else None
        elif kind == "dtype":
            bad = x.to(torch.float64 if x.dtype != torch.float64 else torch.float32)
        elif kind == "device":
            bad = x.to("meta")
        elif kind == "scalar":
            bad = x.new_zeros(())
        else:
            required = ("grad", "summed", *REQUIRED[self.problem.op], "out", "lse")
            if name not in required or name == "features":
                return None
            self.arguments[name] = None
            return f"{name} None"
        if bad is None:
            return None
        self.arguments[name] = bad
        return f"{name} {kind}, {list(bad.shape)} for {list(x.shape)}"


def backward_call(problem: Problem) -> BackwardCall:
    """With the results of a forward call and random gradients."""
    draw, a = problem.draw, problem.arguments
    with torch.no_grad():
        outputs = problem.raw()
    grad = problem.arena.tensor(draw.normal(outputs[0].shape), problem.dtype)
    grads: list[Tensor | None] = [grad]
    if problem.op == "attention":
        scale = a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
        inputs = {name: a[name] for name in "qkv"} | {"out": outputs[0], "lse": outputs[1], "scale": scale}
        inputs |= {name: a[name] for name in ("cu_seqlens", "max_seqlen")}
        return BackwardCall(problem, {"grad": grad} | inputs, ["q", "k", "v"], ["q", "k", "v"], grads)
    every = {
        "linear": ["x", "weight", "bias", "residual"],
        "swiglu_mlp": ["x", "w_up", "w_down", "b_up", "b_down"],
        "add_layer_norm": ["x", "weight", "bias"],
        "rms_norm": ["x", "weight"],
        "attention_pool": [
            *(f"features[{i}]" for i in range(len(a.get("features", ())))),
            *("w_q", "b_q", "w_kv", "b_kv", "w_o", "b_o", "pad_embed"),
        ],
    }[problem.op]
    present = problem.tensors()
    wanted = [name in present and draw.chance(0.8) for name in every]
    results = [name for name, want in zip(every, wanted, strict=True) if want]
    if problem.op == "linear":
        inputs = {name: a[name] for name in ("x", "weight", "bias", "activation")}
    elif problem.op == "swiglu_mlp":
        inputs = {name: a[name] for name in ("x", "w_up", "w_down", "b_up")}
    elif problem.op == "attention_pool":
        inputs = {name: value for name, value in a.items() if name != "b_o"}
    else:
        grads.append(
            problem.arena.tensor(draw.normal(grad.shape), problem.dtype) if a["residual"] is not None else None
        )
        summed = outputs[1] if a["residual"] is not None else a["x"]
        last = [name for name in ("weight", "bias", "eps", "offset") if name in a]
        inputs = {"grad_summed": grads[1], "summed": summed} | {name: a[name] for name in last}
    arguments = {"grad": grad} | inputs | {"wanted": wanted}
    kept = {"linear": "before", "swiglu_mlp": "up"}.get(problem.op)
    if kept is not None:
        arguments[kept] = _kept(problem) if draw.chance(0.5) else None
    return BackwardCall(problem, arguments, results, results, grads)


def _kept(problem: Problem) -> Tensor:
    """What the forward keeps for its gradients, laid out at random."""
    a = problem.arguments
    names = {
        "linear": ("x", "weight", "bias", "activation", "residual"),
        "swiglu_mlp": ("x", "w_up", "w_down", "b_up", "b_down"),
    }[problem.op]
    with torch.no_grad():
        kept = getattr(torch.ops.vlmkern, f"{problem.op}_keep")(*(a[name] for name in names))[1]
    return problem.arena.tensor(kept, problem.dtype, distinct=True)
