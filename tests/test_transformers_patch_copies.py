"""Copies of patched models: pickled, saved whole, copied in the process and sent to another."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from jina_remote import Vision
from transformers_models import Calls, blocks, outputs, siglip

from vlmkern.integrations.transformers import patch, unpatch


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "oldest pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda model: copy.deepcopy(saved(model)),
}


def vars_of(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.fixture
def patched():
    """A patched SigLIP, its input, its attributes and result before."""
    model, inputs = siglip()
    attributes, before = vars_of(model), outputs(model, inputs)
    patch(model)
    return model, inputs, attributes, before


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_patched(patched, duplicate):
    model, inputs, attributes, before = patched
    with Calls() as calls:
        expected = outputs(model, inputs)
    clone = duplicate(model)
    with Calls() as again:
        assert torch.equal(outputs(clone, inputs), expected)
    assert again.names == calls.names and again.residuals == calls.residuals
    assert not patch(clone) and len(patch(clone).passed_over) == 8
    assert vars_of(clone) == vars_of(model)

    # its hooks are its own
    seen = []
    blocks(clone)[0].mlp.activation_fn.register_forward_hook(lambda *_: seen.append("clone"))
    outputs(model, inputs)
    assert not seen
    outputs(clone, inputs)
    assert seen == ["clone"]

    # and so are its weights
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    assert outputs(clone, inputs).abs().max() == 0 and torch.equal(outputs(model, inputs), expected)

    assert unpatch(clone) == 8
    assert vars_of(clone) == attributes
    with Calls() as calls:
        assert torch.equal(outputs(model, inputs), expected)
    assert calls.names
    assert unpatch(model) == 8
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_unpatched_models(patched, duplicate):
    model, inputs, attributes, before = patched
    unpatch(model)
    clone = duplicate(model)
    assert vars_of(clone) == attributes and unpatch(clone) == 0
    assert torch.equal(outputs(clone, inputs), before)
    assert len(patch(clone)) == 8 and unpatch(model) == 0


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_one_module(patched, duplicate):
    layer, x = blocks(patched[0])[0], torch.randn(1, 9, 48)
    for module, arguments in ((layer, (x, None)), (layer.mlp, (x,)), (layer.self_attn, (x,))):
        clone = duplicate(module)
        with Calls() as calls, torch.no_grad():
            actual, expected = clone(*arguments), module(*arguments)
        assert (
            len(calls.names) % 2 == 0 and calls.names[: len(calls.names) // 2] == calls.names[len(calls.names) // 2 :]
        )
        if isinstance(expected, tuple):
            actual, expected = actual[0], expected[0]
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_connectors(duplicate):
    model = Vision().eval()
    patch(model)
    inputs = torch.randn(1, 3, 15, 24), torch.ones(1, 3, 15)
    with torch.no_grad():
        assert torch.equal(duplicate(model)(*inputs), model(*inputs))


def test_another_process(patched, tmp_path):
    """As a worker that was started afresh gets it."""
    model, inputs, _, _ = patched
    torch.save((model, inputs, outputs(model, inputs)), tmp_path / "model.pt")
    program = """
        import sys, torch
        from transformers_models import Calls, outputs
        model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
        with Calls() as calls:
            actual = outputs(model, inputs)
        assert torch.allclose(actual, expected, atol=1e-5)
        assert calls.names.count("attention") == 2 and calls.residuals == 4, calls.names
        from vlmkern.integrations.transformers import unpatch
        assert unpatch(model) == 8
    """
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "model.pt")],
        check=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def test_weights_that_are_saved_alone(patched):
    model, inputs, _, before = patched
    clone, _ = siglip()
    clone.load_state_dict(model.state_dict())
    assert torch.equal(outputs(clone, inputs), before)
