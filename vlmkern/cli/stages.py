"""Timing a model's stages from outside, by hooks on its modules, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from ..efficiency import formulas
from ..models.jina_vlm import JinaVLM


@dataclass
class Stage:
    """One row of the table."""

    name: str
    seconds: float = 0.0
    flops: int = 0
    tokens: int = 0

    @contextmanager
    def timed(self, stages: list[Stage]) -> Iterator[Stage]:
        """Adds the block's time and then itself to `stages`."""
        started = time.perf_counter()
        yield self
        self.seconds += time.perf_counter() - started
        stages.append(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: milliseconds, FLOPs, TFLOP/s, tokens (0 where it has none)."""
        return {
            "stage": self.name,
            "ms": self.seconds * 1e3,
            "flops": self.flops,
            "tflops_per_s": self.flops / self.seconds / 1e12 if self.seconds else 0.0,
            "tokens": self.tokens,
        }

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        return (
            self.name,
            f"{self.seconds * 1e3:,.0f}",
            f"{self.flops / 1e12:.2f}" if self.flops else "",
            f"{self.flops / self.seconds / 1e12:.3f}" if self.flops and self.seconds else "",
            f"{self.tokens:,}" if self.tokens else "",
            f"{self.seconds * 1e3 / self.tokens:.2f}" if self.tokens and self.seconds else "",
        )


class StageClock:
    """Times tower, connector, prefill and decode of what runs inside its `with` block, and counts their FLOPs from
    the shapes that went through. On GPUs the times are the device's, as every stage ends with a wait for it."""

    def __init__(self, model: JinaVLM, console: Console, new_tokens: int, prompt_tokens: int, crops: int) -> None:
        self._model = model
        self._sizes = _sizes(model)
        self._tower, self._connector = Stage("vision tower"), Stage("connector")
        self._prefill, self._decode = Stage("prefill"), Stage("decode")
        self._cached = 0
        self._current = self._prefill
        self._handles: list[Any] = []
        vision, text = model.model.vision_model, model.model.language_model
        self._tower_blocks = max(vision.config.feature_slots) + 1
        self._progress = Progress(
            TextColumn("{task.description:16}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._bars = {
            name: self._progress.add_task(name, total=total, unit=unit, start=False)
            for name, total, unit in (
                ("vision tower", self._tower_blocks * crops, f"blocks of {crops} crops"),
                ("prefill", len(text.layers), f"layers, {prompt_tokens:,} tokens"),
                ("decode", max(new_tokens - 1, 0), "tokens"),
            )
        }

    def __enter__(self) -> StageClock:
        vision, text = self._model.model.vision_model, self._model.model.language_model
        self._time(vision, self._tower_stage)
        self._time(vision.vl_connector, self._connector_stage)
        self._time(text, self._text_stage)
        self._time(self._model.lm_head, self._head_stage)
        for block in vision.layers:
            self._handles.append(
                block.register_forward_hook(lambda _, inputs, __: self._step("vision tower", len(inputs[0])))
            )
        for block in text.layers:
            self._handles.append(block.register_forward_hook(lambda *_: self._step_prefill()))
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._progress.stop()

    def stages(self) -> list[Stage]:
        """The stages that ran."""
        return [stage for stage in (self._tower, self._connector, self._prefill, self._decode) if stage.seconds]

    def _time(self, module: nn.Module, stage_of: Callable[[tuple[Any, ...], Any], Stage]) -> None:
        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            self._wait()
            started = time.perf_counter()

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._wait()
            elapsed = time.perf_counter() - started
            stage_of(inputs, output).seconds += elapsed

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()

    def _step(self, bar: str, steps: int = 1) -> None:
        self._progress.start_task(self._bars[bar])
        self._progress.advance(self._bars[bar], steps)

    def _step_prefill(self) -> None:
        if self._current is self._prefill:
            self._step("prefill")

    def _tower_stage(self, inputs: tuple[Any, ...], output: Any) -> Stage:
        crops = len(inputs[0])
        sizes, layers = self._sizes, self._tower_blocks
        self._tower.flops += (
            formulas.patch_embedding_flops(sizes, crops)
            + formulas.tower_linear_flops(sizes, crops, layers)
            + formulas.tower_attention_flops(sizes, crops, layers)
        )
        self._tower.tokens += crops * sizes.patches_per_crop
        return self._tower

    def _connector_stage(self, inputs: tuple[Any, ...], output: Any) -> Stage:
        # crops of equal pixels share a pass of the tower, which then ends early
        tower = self._bars["vision tower"]
        self._progress.update(tower, completed=self._progress.tasks[tower].total)
        windows = output.shape[:-1].numel()
        self._connector.flops += formulas.connector_flops(self._sizes, windows, windows * self._sizes.window**2)
        self._connector.tokens += windows
        return self._connector

    def _text_stage(self, inputs: tuple[Any, ...], output: Any) -> Stage:
        tokens, sizes = output.shape[1], self._sizes
        stage = self._current = self._decode if self._cached else self._prefill
        before, after = self._cached, self._cached + tokens
        stage.flops += formulas.decoder_linear_flops(sizes, tokens)
        # the causal half square of all tokens so far, less that of those already cached
        stage.flops += formulas.decoder_attention_flops(sizes, after) - formulas.decoder_attention_flops(sizes, before)
        stage.tokens += tokens
        self._cached = after
        if stage is self._decode:
            self._step("decode")
        return stage

    def _head_stage(self, inputs: tuple[Any, ...], output: Any) -> Stage:
        self._current.flops += 2 * output.shape[:-1].numel() * self._model.lm_head.weight.numel()
        stage, self._current = self._current, self._decode
        return stage


def _sizes(model: JinaVLM) -> formulas.Sizes:
    """The sizes that the FLOP formulas need, from the model's config."""
    vision, connector, text = model.config.vision, model.config.connector, model.config.text
    return formulas.Sizes(
        patch_inputs=vision.patch_dim,
        patches_per_side=vision.grid[0],
        window=connector.window[0],
        tower_layers=vision.num_layers,
        tower_layers_used=max(vision.feature_slots) + 1,
        tower_width=vision.hidden_size,
        tower_heads=vision.num_heads,
        tower_head_dim=vision.head_dim,
        tower_mlp=vision.mlp_size,
        connector_features=vision.hidden_size * len(vision.feature_layers),
        connector_heads=connector.num_heads,
        connector_head_dim=connector.head_dim,
        connector_width=vision.hidden_size,
        projector_mlp=connector.mlp_size,
        decoder_layers=text.num_layers,
        decoder_width=text.hidden_size,
        decoder_heads=text.num_heads,
        decoder_kv_heads=text.num_kv_heads,
        decoder_head_dim=text.head_dim,
        decoder_mlp=text.mlp_size,
    )
