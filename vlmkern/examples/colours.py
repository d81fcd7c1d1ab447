"""A tiny jina-vlm learns, from random weights, to read out the colours of a picture's tiles.

python -m vlmkern.examples.colours [--steps 80] [--backend auto] [--autocast] [--seed 0]

Pictures are two squares side by side, each of one of four colours; they go through the real image processor (thumbnail,
tiles, image tokens) and the prompt's answer is one token for each square, left to right. All ops run forward and
backward: attention in the tower, pooling and SwiGLU in the connector, the decoder's projections.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

from .. import use_backend
from ..models.jina_vlm import (
    ConnectorConfig,
    JinaVLM,
    JinaVLMConfig,
    JinaVLMImageProcessor,
    TextConfig,
    VisionConfig,
)
from ..models.jina_vlm.training import PAPER, Pace, make_optimizer

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 70), "blue": (50, 80, 230), "yellow": (235, 215, 50)}
SQUARES = 2
_SIDE = 112
_VOCABULARY = 16
_BOS, _FIRST_COLOUR = 0, 4
# far above the paper's, for a model of 10^5 parameters; the paper's relations and warm-ups stay
_FASTER = {"tower": 150, "connector": 10, "decoder": 150}


def tiny_config() -> JinaVLMConfig:
    """Crops of 8 x 8 patches, as pictures of two squares make three of; head dimension 24 in the tower."""
    return JinaVLMConfig(
        vision=VisionConfig(
            hidden_size=48,
            num_layers=3,
            image_size=(_SIDE, _SIDE),
            num_heads=2,
            head_dim=24,
            mlp_size=96,
            feature_layers=(-2, -3),
        ),
        connector=ConnectorConfig(num_heads=2, head_dim=24, mlp_size=96, output_size=64),
        text=TextConfig(
            hidden_size=64,
            num_layers=2,
            vocab_size=_VOCABULARY,
            additional_vocab_size=8,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            mlp_size=128,
        ),
        bos_token_id=_BOS,
        eos_token_id=_BOS,
    )


def make_batches(seed: int, size: int = 8) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Endless batches of model inputs and of the answers' token ids [size, SQUARES]."""
    image, start, end, patch, column, piece = range(_VOCABULARY, _VOCABULARY + 6)
    processor = JinaVLMImageProcessor(
        base_size=_SIDE,
        overlap_margins=(2, 2),
        max_crops=SQUARES,
        im_start_token_id=start,
        im_end_token_id=end,
        im_patch_token_id=patch,
        im_col_token_id=column,
        image_token_id=image,
        im_slice_token_id=piece,
        bos_token_id=_BOS,
        eos_token_id=_BOS,
    )
    palette, generator = np.array(list(COLOURS.values()), dtype=np.uint8), np.random.default_rng(seed)
    while True:
        answers = generator.integers(len(COLOURS), size=(size, SQUARES))
        found = [processor.preprocess(_picture(palette[row])) for row in answers]
        answer_ids = torch.from_numpy(answers) + _FIRST_COLOUR
        prompts = torch.stack([inputs.tokens for inputs in found])
        bos = torch.full((size, 1), _BOS)
        yield (
            {
                "input_ids": torch.cat([bos, prompts, answer_ids], dim=1),
                "crops": torch.stack([inputs.crops for inputs in found]),
                "image_masks": torch.stack([inputs.image_masks for inputs in found]),
                # positions count from the picture's block, which follows one token
                "image_input_idx": torch.stack([inputs.image_input_idx + 1 for inputs in found]),
            },
            answer_ids,
        )


def train(
    model: JinaVLM, steps: int, seed: int = 0, *, autocast: bool = False, progress: Progress | None = None
) -> list[float]:
    """Trains in place; the loss of every step."""
    paces = {name: Pace(pace.peak * _FASTER[name], pace.warmup) for name, pace in PAPER.items()}
    optimizer, schedule = make_optimizer(model, steps, paces)
    batches, losses = make_batches(seed), []
    task = None if progress is None else progress.add_task("training", total=steps)
    model.train()
    for _ in range(steps):
        inputs, answers = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**inputs)[:, -SQUARES - 1 : -1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), answers.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if progress is not None and task is not None:
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
    return losses


@torch.no_grad()
def accuracy(model: JinaVLM, seed: int, batches: int = 4) -> float:
    """Share of squares of new pictures that are read out right by greedy decoding."""
    model.eval()
    source, right = make_batches(seed), []
    for _ in range(batches):
        inputs, answers = next(source)
        prompt = inputs | {"input_ids": inputs["input_ids"][:, :-SQUARES]}
        right.append((model.generate(**prompt, max_new_tokens=SQUARES) == answers).float().mean())
    return torch.stack(right).mean().item()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="as in vlmkern.use_backend")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 products, float32 weights")
    options = parser.parse_args()
    console, start = Console(), time.perf_counter()
    model = JinaVLM.random(tiny_config(), seed=options.seed)
    with use_backend(options.backend), Progress(console=console, transient=True) as progress:
        before = accuracy(model, seed=options.seed + 1)
        losses = train(model, options.steps, options.seed, autocast=options.autocast, progress=progress)
        after = accuracy(model, seed=options.seed + 1)
    for step in range(0, len(losses), max(1, len(losses) // 10)):
        console.print(f"step {step:>5}  loss {losses[step]:.3f}", highlight=False)
    console.print(
        f"colours read out right: {before:.0%} before, {after:.0%} after {options.steps} steps"
        f" ({time.perf_counter() - start:.0f} s)",
        highlight=False,
    )


def _picture(colours: np.ndarray) -> np.ndarray:
    """[SQUARES, 3] -> squares side by side, [side, SQUARES * side, 3]."""
    return np.repeat(colours[None], _SIDE, axis=0).repeat(_SIDE, axis=1)


if __name__ == "__main__":
    main()
