"""What else a CPU user would run a model with: OpenVINO, ONNX Runtime and AMD's zentorch, from the extra `[peers]`.

Each takes the same module and the same inputs as the other providers and gives a call of one thread. Where one is not
installed, or not made for the dtype or the CPU, its cases are skipped with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlmkern

PEERS = ("openvino", "onnxruntime", "zentorch")


def peer(name: str, module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call that gives `module(x)` by a peer, in the dtype of `x`. Skips the case if that cannot be."""
    reason = _unfit(name, x.dtype)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} is not installed or does not load ({error}); pip install 'vlmkern[peers]'")
    module = module.eval().requires_grad_(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return {"openvino": _openvino, "onnxruntime": _onnxruntime, "zentorch": _zentorch}[name](module, x)


def _unfit(name: str, dtype: torch.dtype) -> str | None:
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return "what torch is held to does not hold it"
    if name == "onnxruntime" and dtype != torch.float32:
        return f"its CPU provider has no products of {dtype}"
    if name == "zentorch" and vlmkern.backends()["native"].get("vendor") != "AuthenticAMD":
        return "made for AMD's CPUs"
    return None


def _openvino(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import openvino

    converted = openvino.convert_model(module.float(), example_input=x.float())
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[x.dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    # arrays go in and out in float32; inside it computes as the hint says
    given = x.float().numpy()
    return lambda: torch.from_numpy(np.asarray(compiled(given)[0]))


def _onnxruntime(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    file = io.BytesIO()
    with contextlib.redirect_stdout(io.StringIO()), _silent("torch.onnx"):
        program: Any = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
        program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def _zentorch(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    function = torch.compile(module, backend="zentorch")

    def call() -> Tensor:
        # it takes no options: whether weights are frozen is inductor's own setting
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return function(x)

    return call


@contextlib.contextmanager
def _silent(logger: str) -> Any:
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
