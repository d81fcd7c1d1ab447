"""The checkpoint of a jina-vlm: which tensors a configuration asks for, and what random ones are like."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .._shared import weights
from .._shared.weights import CheckpointError, Model
from .config import JinaVLMConfig

__all__ = ["CheckpointError", "load", "random", "save"]

Build = Callable[[JinaVLMConfig], Model]


def random(
    build: Build[Model], config: JinaVLMConfig, seed: int, dtype: torch.dtype | str, device: torch.device | str
) -> Model:
    """See `JinaVLM.random`."""
    model = weights.uninitialised(lambda: build(config), dtype, device)
    weights.randomise(model, seed, _distribution)
    return model.eval()


def _distribution(name: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation: of matrices 0 and fan_in ** -0.5, norm weights are about 1, vision biases about 0,
    and the decoder's q, k and v biases 0, as released."""
    leaf = name.rsplit(".", 1)[-1]
    if "language_model" in name and leaf in ("q_b", "k_b", "v_b"):
        return 0.0, 0.0
    if "lnorm.weight" in name or "ln_f" in name:
        return 1.0, 0.1
    if "embed" in name and "proj" not in name:
        return 0.0, 1.0 if "language_model" in name else 0.1
    if parameter.dim() == 1:
        return 0.0, 0.1
    return 0.0, parameter.shape[1] ** -0.5


def load(build: Build[Model], directory: Path, dtype: torch.dtype | str | None, device: torch.device | str) -> Model:
    """See `JinaVLM.from_pretrained`."""
    wanted = None if dtype is None else weights.dtype_of(dtype)
    config = JinaVLMConfig.from_pretrained(directory)
    files = weights.weight_files(directory)
    found, stored_dtype = weights.inventory(files)
    weights.compare(directory, _expected_shapes(build, config, directory, found), found)
    model = weights.uninitialised(lambda: build(config), wanted or stored_dtype, device)
    weights.fill(model, directory, files)
    return model.eval()


def save(model: torch.nn.Module, config: JinaVLMConfig, directory: Path) -> None:
    """See `JinaVLM.save_pretrained`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
    weights.save(model, directory)


def _expected_shapes(
    build: Build[Model], config: JinaVLMConfig, directory: Path, found: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors. What a config asks for is not built before it is known to be of the
    size of what the files hold: a block of each kind stands for all of them."""
    prefixes = {"vision_model": config.vision.num_layers, "language_model": config.text.num_layers}
    for part, count in prefixes.items():
        if count > len(found):
            raise CheckpointError(
                f"{directory}: tensors do not match the config: it has n_layers {count} for the {part}, "
                f"the files hold {len(found)} tensors in all"
            )
    one_block = dataclasses.replace(
        config,
        vision=dataclasses.replace(
            config.vision, num_layers=1, feature_layers=(0,) * len(config.vision.feature_layers)
        ),
        text=dataclasses.replace(config.text, num_layers=1),
    )
    with torch.device("meta"):
        small = {name: tuple(t.shape) for name, t in build(one_block).state_dict().items()}
    expected = {}
    for name, shape in small.items():
        part = name.split(".")[1]
        block = f"model.{part}.layers."
        if name.startswith(block):
            rest = name.removeprefix(block + "0")
            expected |= {f"{block}{i}{rest}": shape for i in range(prefixes[part])}
        else:
            expected[name] = shape
    return expected
