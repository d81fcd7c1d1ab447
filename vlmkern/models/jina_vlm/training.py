"""The paper's recipe of learning rates: tower, connector and decoder each with a peak and a warm-up of their own.

Koukounas et al. (2025), table 2: AdamW with betas 0.9 and 0.95, a linear warm-up, then a cosine to a tenth of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from .model import JinaVLM


class Pace(NamedTuple):
    """Learning rate of a group of parameters.

    Attributes:
        peak: highest learning rate.
        warmup: share of all steps in which it rises to the peak.
    """

    peak: float
    warmup: float


PAPER: Mapping[str, Pace] = {
    "tower": Pace(6e-6, 0.10),
    "connector": Pace(2e-4, 0.01),
    "decoder": Pace(2e-5, 0.10),
}
"""Table 2 of the paper, first stage."""

BETAS = (0.9, 0.95)
FINAL = 0.1
"""Learning rate after the last step, as a share of the peak."""


def parameter_groups(model: JinaVLM) -> dict[str, list[nn.Parameter]]:
    """The parameters that want gradients, as "tower", "connector" and "decoder" (with embeddings and head)."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in PAPER}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".vl_connector." in name:
            groups["connector"].append(parameter)
        else:
            groups["tower" if name.startswith("model.vision_model.") else "decoder"].append(parameter)
    return groups


def make_optimizer(
    model: JinaVLM, steps: int, paces: Mapping[str, Pace] = PAPER, weight_decay: float = 0.0
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the parameters that want gradients, and the schedule to step after it.

    Args:
        model: frozen parts (`requires_grad_(False)`) are left out; their ops compute no gradients for them.
        steps: of the whole training.
        paces: by group; the paper's when left out.
        weight_decay: the paper does not give one.

    Returns:
        Optimizer (one parameter group for each part that is trained, with its `name`) and scheduler.

    Raises:
        ValueError: no steps, a warm-up outside 0 to 1, a group without a pace, or nothing to train.

    Example:
        optimizer, schedule = make_optimizer(model, steps=60_000)
        for batch, labels in data:
            loss(model(**batch), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    found = {name: parameters for name, parameters in parameter_groups(model).items() if parameters}
    if not found:
        raise ValueError("model: got one whose parameters are all frozen, expected some to train")
    for name in found:
        if name not in paces:
            raise ValueError(f"paces: got {', '.join(paces) or 'none'}, expected one for {name} too")
        if not 0 <= paces[name].warmup <= 1:
            raise ValueError(f"paces[{name!r}]: got a warm-up of {paces[name].warmup}, expected a share of 0 to 1")
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": paces[name].peak, "name": name} for name, parameters in found.items()],
        betas=BETAS,
        weight_decay=weight_decay,
    )

    def factor(warmup: float) -> object:
        return lambda step: learning_rate_factor(step, steps, warmup)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(paces[name].warmup) for name in found])


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """The share of the peak at a step (counted from 0): linear up to 1 in `warmup * steps` steps, then a half cosine
    down to `FINAL` at the last."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress))
