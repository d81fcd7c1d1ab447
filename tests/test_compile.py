"""The vision path through torch.compile, torch.export and AOTInductor: one graph, compiled once for any crop count."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vlmkern.examples.colours import tiny_config
from vlmkern.models.jina_vlm import JinaVLM, VisionPath

COUNTS = (3, 2, 5, 1, 13)


@pytest.fixture(scope="module")
def path():
    return VisionPath(JinaVLM.random(tiny_config()).model.vision_model).eval()


def inputs(count, keep=None):
    crops, masks = torch.randn(count, 64, 588), torch.ones(count, 64)
    masks[-1] = -1
    return (crops, masks) if keep is None else (crops, masks, torch.randperm(16 * count)[: 7 * count])


def any_count(tensors):
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensors


@pytest.mark.parametrize("keep", [None, True], ids=["all_windows", "kept_windows"])
def test_compiled_once_for_any_number_of_crops(path, keep):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(path, fullgraph=True, backend=counter)
    with torch.no_grad():
        for count in COUNTS:
            tensors = any_count(inputs(count, keep))
            torch.testing.assert_close(compiled(*tensors), path(*tensors), rtol=1e-5, atol=1e-5)
    # one crop is a graph of its own in torch: sizes of 1 are always specialised
    assert counter.frame_count <= 2


def test_gradients_compiled_once(path):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(path, fullgraph=True, backend=counter)
    parameters = [p for name, p in path.named_parameters() if "vl_connector" in name or "layers.0" in name]
    for count in (3, 2, 5):
        tensors = any_count(inputs(count))
        actual = torch.autograd.grad(compiled(*tensors).square().sum(), parameters)
        expected = torch.autograd.grad(path(*tensors).square().sum(), parameters)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    assert counter.frame_count == 1


def test_inductor(path):
    torch._dynamo.reset()
    compiled = torch.compile(path, fullgraph=True)
    with torch.no_grad():
        for count in (3, 2):
            tensors = any_count(inputs(count))
            torch.testing.assert_close(compiled(*tensors), path(*tensors), rtol=1e-4, atol=1e-4)


def run_elsewhere(program, *arguments):
    """Runs a program in a new process that imports vlmkern and nothing else of this package."""
    command = [sys.executable, "-c", f"import sys, torch, vlmkern\n{program}", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=120)


def test_exported_for_any_number_of_crops(path, tmp_path):
    crops = torch.export.Dim("crops", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(path, inputs(3), dynamic_shapes=({0: crops}, {0: crops}))
        found = {str(node.target) for node in program.graph.nodes if "vlmkern" in str(node.target)}
        assert found == {f"vlmkern.{op}.default" for op in ("attention", "attention_pool", "linear", "swiglu_mlp")}
        cases = [(tensors, path(*tensors)) for tensors in map(inputs, COUNTS)]
        for tensors, expected in cases:
            torch.testing.assert_close(program.module()(*tensors), expected, rtol=1e-4, atol=1e-4)
        torch.export.save(program, tmp_path / "path.pt2")
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "path_aoti.pt2"))
    torch.save(cases, tmp_path / "cases.pt")
    run_elsewhere(
        "cases = torch.load(sys.argv[1])\n"
        "exported = torch.export.load(sys.argv[2]).module()\n"
        "compiled = torch._inductor.aoti_load_package(sys.argv[3])\n"
        "for tensors, expected in cases:\n"
        "    for run in (exported, compiled):\n"
        "        torch.testing.assert_close(run(*tensors), expected, rtol=1e-4, atol=1e-4)\n",
        tmp_path / "cases.pt",
        tmp_path / "path.pt2",
        package,
    )
