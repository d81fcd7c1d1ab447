"""The steps of a run on a GPU, in the order of their worth. Each has a share of the run's minutes, and what one leaves
goes to those behind it."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """One step.

    Attributes:
        share: of the run's minutes.
        quiet: seconds without a sign of life after which its process is stopped, as a kernel hangs.
        file: where its results go, beside those of other steps.
        about: what it gives.
        compiles: whether it compiles kernels, which a rehearsal cannot do where it interprets them.
        tuned: whether kernels read what was tuned before it, in place of the tables that ship.
    """

    name: str
    share: float
    quiet: float
    file: str
    about: str
    compiles: bool = False
    tuned: bool = False


STEPS = (
    Step("machine", 0.05, 240, "bench.jsonl", "ceilings of the card; all shipped kernels compiled, on all cores", True),
    Step("numerics", 0.18, 90, "numerics.jsonl", "tests/gpu: every op, both directions, at the sizes of the models"),
    Step("bench", 0.17, 60, "bench.jsonl", "every op against torch's attentions, eager torch and installed libraries"),
    Step("tune", 0.12, 90, "tuning.jsonl", "the tables that matter: bf16 attention at D = 72, pooling, SwiGLU", True),
    Step("blocks", 0.13, 90, "bench.jsonl", "tower block and vision path; the tuned ops again", tuned=True),
    Step("compile", 0.25, 240, "bench.jsonl", "the same against torch.compile (max-autotune)", tuned=True),
    Step("rest", 0.10, 90, "tuning.jsonl", "the other tables", True),
)

# the variable that tells a rehearsal's processes what they are
REHEARSAL = "VLMKERN_GPU_REHEARSAL"
# seconds at the end of a run that no step begins anything in: a summary is to be printed
RESERVE = 15


def by_name(names: str | None) -> tuple[Step, ...]:
    """The steps of these names, separated by commas, in the order of a run; all for None.

    Raises:
        ValueError: one is none.
    """
    known = [step.name for step in STEPS]
    wanted = known if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--steps: got {name!r}, expected some of {','.join(known)}")
    return tuple(step for step in STEPS if step.name in wanted)


def ends(steps: tuple[Step, ...], begin: float, seconds: float) -> dict[str, float]:
    """When each step begins nothing new: its share of `seconds` from `begin` on behind those before it."""
    whole, sum_of_shares, found = sum(step.share for step in steps), 0.0, {}
    for step in steps:
        sum_of_shares += step.share
        found[step.name] = begin + (seconds - RESERVE) * sum_of_shares / whole
    return found
