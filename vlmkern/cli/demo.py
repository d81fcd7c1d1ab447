"""`vlmkern demo`: jina-vlm on a photograph, with time, work and accuracy by stage."""

from __future__ import annotations

import argparse
import json
import os
import reprlib
import resource
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..images import load_image
from ..models.jina_vlm import JinaVLM, JinaVLMConfig, JinaVLMImageProcessor, JinaVLMProcessor
from ..models.jina_vlm.tiling_picture import draw_tiling
from .accuracy import OpError, SampledInputs
from .stages import Stage, StageClock

_PICTURE, _FIGURES = "tiling.png", "demo.json"
_DEFAULT_QUESTION = "Describe this image."
# stand-ins for a tokenised question: random weights have no tokenizer, and only their number matters
_TEXT_BEFORE, _TEXT_AFTER = 4, 12


@dataclass
class _Inputs:
    model: dict[str, Tensor]
    image_tokens: int
    prompt_tokens: int
    eos: Any
    processor: JinaVLMProcessor | None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the model once; prints tables unless JSON is wanted; writes tiling.png and demo.json to the report
    directory."""
    started = time.perf_counter()
    progress = Console(stderr=True)
    bundled = resources.files(__package__.rpartition(".")[0]) / "data" / "raccoon.jpg"
    source = str(bundled) if options.image is None else options.image
    image = load_image(source)
    report_dir = Path(options.report)
    _make_writable(report_dir)
    if options.prompt is not None and options.checkpoint is None:
        progress.print("note: --prompt is not used: random weights have no tokenizer, the prompt is fixed ids")

    stages: list[Stage] = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # everything that a bad argument can break comes before the weights, which take seconds
    with Stage("image processing").timed(stages) as stage:
        config = _config(options)
        inputs = _prepare(image, options, config, device)
        stage.tokens = inputs.image_tokens
    new_tokens = options.max_new_tokens
    if new_tokens is None:
        new_tokens = 256 if options.checkpoint is not None else 16
    room = config.text.max_length - inputs.prompt_tokens
    if new_tokens > room:
        raise ValueError(
            f"--max-new-tokens: got {reprlib.repr(new_tokens)}, expected at most {room}, as the model reads "
            f"{config.text.max_length} tokens and the prompt has {inputs.prompt_tokens}"
        )
    with (
        progress.status(f"weights: {'loading' if options.checkpoint is not None else 'random'}"),
        Stage("weights").timed(stages),
    ):
        model = _model(options, config, device)

    samples, crops = SampledInputs(model), inputs.model["crops"].shape[1]
    with StageClock(model, progress, new_tokens, inputs.prompt_tokens, crops) as clock, samples:
        new_ids = model.generate(**inputs.model, max_new_tokens=new_tokens, eos_token_id=inputs.eos)
    stages += clock.stages()
    with progress.status("comparing the ops with the float32 reference"):
        errors = samples.op_errors()
    picture = report_dir / _PICTURE
    draw_tiling(image, _image_processor(options, config, inputs), picture)

    report: dict[str, Any] = {
        "image": str(source),
        "width": image.width,
        "height": image.height,
        "weights": str(options.checkpoint) if options.checkpoint is not None else f"random ({options.size})",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "threads": torch.get_num_threads(),
        "image_tokens": inputs.image_tokens,
        "prompt_tokens": inputs.prompt_tokens,
        "stages": [stage.as_dict() for stage in stages],
        "op_errors": [error.as_dict() for error in errors],
        "new_ids": new_ids[0].tolist(),
        "answer": inputs.processor.decode(new_ids[0]) if inputs.processor else None,
        "total_seconds": time.perf_counter() - started,
        "peak_memory_bytes": _peak_memory(),
        "picture": str(picture),
    }
    (report_dir / _FIGURES).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not options.json:
        _print(report, stages, errors)
    return report


def _make_writable(report_dir: Path) -> None:
    """The report's directory; an error now, and not after minutes, if the report could not be written there."""
    report_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(report_dir, os.W_OK | os.X_OK):
        raise PermissionError(f"--report: {report_dir} cannot be written to")
    for name in (_PICTURE, _FIGURES):
        path = report_dir / name
        if path.exists() and not path.is_file():
            raise ValueError(f"--report: {path} is not a regular file, expected one to replace or none")


def _config(options: argparse.Namespace) -> JinaVLMConfig:
    if options.checkpoint is not None:
        return JinaVLMConfig.from_pretrained(options.checkpoint)
    return JinaVLMConfig() if options.size == "full" else JinaVLMConfig.tiny()


def _model(options: argparse.Namespace, config: JinaVLMConfig, device: str) -> JinaVLM:
    if options.checkpoint is not None:
        return JinaVLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16, device=device)
    return JinaVLM.random(config, dtype=torch.bfloat16, device=device)


def _prepare(image: Any, options: argparse.Namespace, config: JinaVLMConfig, device: str) -> _Inputs:
    if options.checkpoint is not None:
        processor = JinaVLMProcessor.from_pretrained(options.checkpoint)
        prompt = processor.chat(_DEFAULT_QUESTION if options.prompt is None else options.prompt)
        batch = processor(prompt, image)
        image_tokens = processor.image_processor.describe(*image.size)["total_tokens"]
        eos = config.eos_token_id
    else:
        processor, eos = None, None
        batch = _fixed_prompt(image, config)
        image_tokens = batch["input_ids"].shape[1] - _TEXT_BEFORE - _TEXT_AFTER
    tensors = {name: tensor.to(device) for name, tensor in batch.items()}
    return _Inputs(tensors, image_tokens, tensors["input_ids"].shape[1], eos, processor)


def _fixed_prompt(image: Any, config: JinaVLMConfig) -> dict[str, Tensor]:
    """The image between fixed ids, as a tokenised question would have it."""
    inputs = _fixed_image_processor(config).preprocess(image)
    before = torch.tensor([config.bos_token_id, *range(1, _TEXT_BEFORE)])
    after = torch.arange(_TEXT_BEFORE, _TEXT_BEFORE + _TEXT_AFTER)
    positions = inputs.image_input_idx
    return {
        "input_ids": torch.cat([before, inputs.tokens, after])[None],
        "crops": inputs.crops[None],
        "image_masks": inputs.image_masks[None],
        "image_input_idx": torch.where(positions < 0, positions, positions + len(before))[None],
    }


def _fixed_image_processor(config: JinaVLMConfig) -> JinaVLMImageProcessor:
    names = ("im_start", "im_end", "im_patch", "im_col", "image", "im_slice")
    ids = {f"{name}_token_id": config.text.vocab_size + i for i, name in enumerate(names)}
    eos = config.eos_token_id
    return JinaVLMImageProcessor(
        **ids, bos_token_id=config.bos_token_id, eos_token_id=eos if isinstance(eos, int) else eos[0]
    )


def _image_processor(options: argparse.Namespace, config: JinaVLMConfig, inputs: _Inputs) -> JinaVLMImageProcessor:
    return inputs.processor.image_processor if inputs.processor else _fixed_image_processor(config)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print(report: dict[str, Any], stages: list[Stage], errors: list[OpError]) -> None:
    console = Console()
    console.print()
    console.print(
        f"[bold]jina-vlm[/] on {escape(report['image'])} ({report['width']} x {report['height']}): "
        f"{escape(report['weights'])} weights, {report['parameters'] / 1e6:,.1f} M parameters, {report['dtype']}, "
        f"{report['device']}, {report['threads']} threads"
    )
    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    for heading in ("ms", "TFLOP", "TFLOP/s", "tokens", "ms/token"):
        table.add_column(heading, justify="right")
    for stage in stages:
        table.add_row(*stage.cells())
    console.print(table)

    table = Table(
        title="Ops against the float32 reference, on a sample of this run's activations", title_justify="left"
    )
    table.add_column("op")
    table.add_column("first tensor")
    for heading in ("largest error", "largest value", "relative"):
        table.add_column(heading, justify="right")
    for error in errors:
        table.add_row(*error.cells())
    console.print(table)
    if report["answer"] is not None:
        console.print(f"\n[bold]Answer:[/] {escape(report['answer'].strip())}")
    else:
        console.print(f"New ids (random weights, so they mean nothing): {report['new_ids']}")
    console.print(
        f"{report['total_seconds']:.1f} s in all, {report['peak_memory_bytes'] / 1e9:.1f} GB at most. "
        f"Picture of the tiles: {escape(report['picture'])}"
    )
