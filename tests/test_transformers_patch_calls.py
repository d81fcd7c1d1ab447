"""Inner modules of patched ones whose calls do more than the formula: hooks and forwards of their own.

The ops call no inner module, so that such calls belong to the original forward. Each is set up in a patched model and
in one like it that was never patched: the two must stay alike, and the patched one must be on the ops again after.
"""

import copy

import pytest
import torch
from jina_remote import Vision
from torch.nn.modules import module as module_globals
from transformers_models import Calls, assert_alike, blocks, half, outputs, run, siglip, siglip_pair

from vlmkern.integrations.transformers import patch, unpatch

INNER = [
    "self_attn",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "mlp",
    "mlp.fc1",
    "mlp.fc2",
    "mlp.activation_fn",
    "layer_norm1",
    "layer_norm2",
]


def forward_hook(module, seen):
    def hook(module, args, result):
        seen.append("forward")
        return half(result)

    return module.register_forward_hook(hook).remove


def forward_pre_hook(module, seen):
    def hook(module, args, kwargs):
        seen.append("pre")
        return tuple(map(half, args)), kwargs | {k: half(v) for k, v in kwargs.items() if k == "hidden_states"}

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def backward_hook(module, seen):
    return module.register_full_backward_hook(lambda module, grads, _: seen.append("backward")).remove


def backward_pre_hook(module, seen):
    return module.register_full_backward_pre_hook(lambda module, grads: seen.append("backward pre")).remove


def accelerate_hook(module, seen):
    hooks = pytest.importorskip("accelerate.hooks")

    class Hook(hooks.ModelHook):
        def post_forward(self, module, result):
            seen.append("accelerate")
            return half(result)

    hooks.add_hook_to_module(module, Hook())
    return lambda: hooks.remove_hook_from_module(module)


def own_forward(module, seen):
    before, had = module.forward, module.__dict__.get("forward")

    def forward(*args, **kwargs):
        seen.append("own")
        return half(before(*args, **kwargs))

    module.forward = forward

    def undo():
        del module.forward
        if had is not None:
            module.forward = had

    return undo


def of_all(register):
    """A hook of every module in the process, of which those inside `inner` are let to see."""

    def change(module, seen):
        return getattr(module_globals, register)(lambda each, *_: seen.append("all") if each is module else None).remove

    change.__name__ = register
    return change


TOUCHES = [
    forward_hook,
    forward_pre_hook,
    backward_hook,
    backward_pre_hook,
    accelerate_hook,
    own_forward,
    of_all("register_module_forward_hook"),
    of_all("register_module_forward_pre_hook"),
    of_all("register_module_full_backward_hook"),
    of_all("register_module_full_backward_pre_hook"),
]


@pytest.fixture
def pair():
    return siglip_pair()


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
@pytest.mark.parametrize("inner", INNER)
def test_inner_modules_are_called(pair, inner, touch):
    model, plain, inputs = pair
    *_, untouched = run(model, inputs)
    seen, expected = [], []
    take_back = touch(blocks(model)[0].get_submodule(inner), seen)
    take_back_plain = touch(blocks(plain)[0].get_submodule(inner), expected)
    calls = []
    try:
        calls = assert_alike(model, plain, inputs)
        assert seen == expected and len(seen) == 1
    finally:
        take_back()
        take_back_plain()
    # where a layer norm is called by the ops' path depends on the device: its block must leave that path on all
    assert calls.residuals < untouched.residuals or inner == "layer_norm1"
    assert assert_alike(model, plain, inputs).names == untouched.names
    assert unpatch(model) == 8


def test_accelerate_on_a_swapped_module_outlives_unpatch():
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = siglip()
    before = outputs(model, inputs)
    patch(model)
    for layer in blocks(model):
        for module in (layer, layer.self_attn):
            hooks.add_hook_to_module(module, hooks.ModelHook())
    with Calls() as calls:
        torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert calls.names
    # the forward that accelerate keeps is the swapped one
    assert unpatch(model) == 8 and unpatch(model) == 0
    with Calls() as calls:
        assert torch.equal(outputs(model, inputs), before)
    assert not calls.names
    assert len(patch(model)) == 8
    with Calls() as calls:
        torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert calls.names
    hooks.remove_hook_from_module(model, recurse=True)
    assert unpatch(model) == 8
    with Calls() as calls:
        assert torch.equal(outputs(model, inputs), before)
    assert not calls.names
    assert not any("vlmkern" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("touch", [accelerate_hook, own_forward], ids=lambda touch: touch.__name__)
def test_modules_with_a_forward_of_their_own_are_left(touch):
    model, inputs = siglip()
    seen = []
    layer = blocks(model)[0]
    for module in (layer, layer.self_attn, layer.mlp.fc1):
        touch(module, seen)
    before = outputs(model, inputs)
    assert len(seen) == 3
    report = patch(model)
    assert len(seen) == 3  # not run for trial
    reasons = {name.rpartition("layers.0")[2]: why for name, why in report.passed_over.items()}
    assert "forward of its own" in reasons[".self_attn"] and "fc1 has a forward of its own" in reasons[".mlp"]
    assert "forward of its own" in reasons[""]
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert len(seen) == 6


def test_hooks_before_the_patch_are_not_run_for_trial():
    model, _ = siglip()
    seen = []
    for name in ("self_attn", "mlp.activation_fn", "layer_norm2"):
        forward_hook(blocks(model)[0].get_submodule(name), seen)
    report = patch(model)
    assert not seen
    assert {name.rpartition(".layers.")[2] for name in report if ".layers." in f".{name}"} >= {
        "0.self_attn",
        "1",
        "1.mlp",
        "1.self_attn",
    }
    reasons = {name.rpartition("layers.0")[2]: why for name, why in report.passed_over.items()}
    assert "activation_fn has hooks" in reasons[".mlp"] and "" in reasons


@pytest.mark.parametrize("inner", ["attn_drop", "attn.q_lnorm", "ffn.inner_lnorm"])
def test_hooks_on_modules_that_do_nothing(inner):
    model, x, seen = Vision().eval(), torch.randn(1, 5, 24), []
    patch(model)
    block = model.layers[0]
    called = inner == "attn_drop"  # the others are part of the module, but its forward calls them no more than the ops
    block.get_submodule(inner).register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        block(x)
    assert len(seen) == called


@pytest.mark.parametrize("inner", ["pooling", "pooling.q_w", "pooling.out", "projector", "projector.act"])
def test_hooks_inside_a_connector(inner):
    model, plain = (Vision().eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    patch(model)
    inputs = torch.randn(1, 3, 15, 24), torch.ones(1, 3, 15)
    for each in (model, plain):
        each.vl_connector.get_submodule(inner).register_forward_hook(lambda module, args, result: half(result))
    with torch.no_grad():
        expected = plain(*inputs)
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_hooks_that_transformers_leaves_behind():
    """Once asked for attention weights, a model keeps hooks on its attention: these must not keep it off the ops."""
    model, inputs = siglip(attn_implementation="eager")
    plain = copy.deepcopy(model)
    patch(model)
    with Calls() as before:
        outputs(model, inputs)
    for each in (model, plain):
        outputs(each, inputs | {"output_hidden_states": True})
    with torch.no_grad():
        expected, actual = (each(**inputs, output_attentions=True).attentions for each in (plain, model))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    for wanted in ({}, {"output_hidden_states": True}):
        with Calls() as after:
            outputs(model, inputs | wanted)
        assert after.names == before.names and after.residuals == before.residuals
    # also where the patch comes after
    assert len(patch(plain)) == 8


def test_attention_weights_reach_a_hook():
    model, inputs = siglip(attn_implementation="eager")
    patch(model)
    seen = []
    for layer in blocks(model):
        layer.self_attn.register_forward_hook(lambda module, args, result: seen.append(result[1]))
    outputs(model, inputs)
    assert len(seen) == 2
    for weights in seen:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9), rtol=1e-5, atol=1e-5)
