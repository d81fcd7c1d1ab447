"""Calls of patched modules that belong to the original forward, because the ops would leave something out.

Each change is made to a patched model and to a copy that was never patched: the two must stay alike, and where the
change is taken back, the patched one must be on the ops again.
"""

import copy
import functools

import pytest
import torch
from jina_remote import Vision
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrizations, parametrize, prune
from transformers_models import Calls, blocks, outputs, siglip

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


def half(value):
    return (value[0] * 0.5, *value[1:]) if isinstance(value, tuple) else value * 0.5


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
    """A patched SigLIP, one like it that is not, and their input."""
    model, inputs = siglip()
    plain = copy.deepcopy(model)
    patch(model)
    return model, plain, inputs


def run(model, inputs):
    """Result, gradients and calls of a model."""
    model.zero_grad()
    with Calls() as calls:
        result = model(**inputs).last_hidden_state
        result.square().sum().backward()
    return result.detach(), [p.grad for p in model.parameters() if p.grad is not None], calls


def assert_alike(model, plain, inputs):
    (actual, grads, calls), (expected, expected_grads, _) = run(model, inputs), run(plain, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for a, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
    return calls


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
    assert unpatch(model) == 7


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
    assert unpatch(model) == 7 and unpatch(model) == 0
    with Calls() as calls:
        assert torch.equal(outputs(model, inputs), before)
    assert not calls.names
    assert len(patch(model)) == 7
    with Calls() as calls:
        torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert calls.names
    hooks.remove_hook_from_module(model, recurse=True)
    assert unpatch(model) == 7
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


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def change_class(name, kind):
    def change(layer):
        layer.get_submodule(name).__class__ = kind

    return change


def replace(name, new):
    def change(layer):
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, new(layer.get_submodule(name)))

    return change


def on_fc1(change):
    return lambda layer: change(layer.mlp.fc1)


def set_value(name, attribute, value):
    return lambda layer: setattr(layer.get_submodule(name), attribute, value)


def half_the_heads(layer):
    layer.self_attn.num_heads //= 2
    layer.self_attn.head_dim *= 2


def own_attention(layer):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def sharp(module, q, k, v, mask, scaling, dropout=0.0, **_):
        return ((q @ k.mT * scaling * 3).softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("sharp", sharp)
    layer.self_attn.config._attn_implementation = "sharp"


def quantised(linear):
    torch.manual_seed(1)
    return Doubled(linear.in_features, linear.out_features)


CHANGES = {
    "class of a linear layer": change_class("mlp.fc1", Doubled),
    "class of a norm": change_class("layer_norm2", Shifted),
    "another linear layer": replace("mlp.fc2", quantised),
    "another plain linear layer": replace("mlp.fc2", copy.deepcopy),
    "parametrization": on_fc1(lambda fc1: parametrize.register_parametrization(fc1, "weight", Twice())),
    "parametrization of a norm": lambda layer: parametrize.register_parametrization(
        layer.layer_norm2, "weight", Twice()
    ),
    "weight norm": on_fc1(parametrizations.weight_norm),
    "older weight norm": on_fc1(nn.utils.weight_norm),
    "spectral norm": on_fc1(parametrizations.spectral_norm),
    "pruning": on_fc1(lambda fc1: prune.l1_unstructured(fc1, "weight", 0.5)),
    "activation": set_value("mlp", "activation_fn", nn.ReLU()),
    "scale": set_value("self_attn", "scale", 0.7),
    "number of heads": half_the_heads,
    "causal": set_value("self_attn", "is_causal", True),
    "attention function": own_attention,
    "epsilon": set_value("layer_norm2", "eps", 0.5),
    "forward of the class": lambda layer: setattr(layer.mlp, "__class__", with_own_forward(type(layer.mlp))),
    "weights of the norm": lambda layer: setattr(layer.layer_norm2, "bias", nn.Parameter(torch.ones(48))),
}


def with_own_forward(kind):
    return type("Own", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_count(pair, change):
    model, plain, inputs = pair
    before = outputs(model, inputs)
    for each in (model, plain):
        torch.manual_seed(2)
        change(blocks(each)[0])
    assert_alike(model, plain, inputs)
    same = change in (CHANGES["another plain linear layer"], CHANGES["weight norm"], CHANGES["older weight norm"])
    assert torch.allclose(outputs(model, inputs), before, atol=1e-4) == same


def test_activation_changed_in_place():
    def build():
        model = Vision().eval()
        return model, model.layers[0].ffn

    model, ffn = build()
    plain = copy.deepcopy(model)
    patch(model)
    x = torch.randn(2, 5, 24) * 3
    for each in (ffn, plain.layers[0].ffn):
        each.act.approximate = "none"
    # the two forms differ by up to 5e-4
    torch.testing.assert_close(ffn(x), plain.layers[0].ffn(x), rtol=0, atol=1e-6)


def test_class_of_all_linear_layers_changed(pair, monkeypatch):
    model, plain, inputs = pair
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0.5 * forward(self, x))
    assert_alike(model, plain, inputs)


def test_dropout_modules_alone_in_training():
    """Monte Carlo dropout: a model in evaluation, its dropout layers not."""
    model = Vision().eval()
    block = model.layers[0]
    block.attn_drop.p = 0.5
    patch(model)
    x = torch.randn(1, 5, 24)
    with torch.no_grad():
        still = block(x)[0]
        block.attn_drop.train()
        assert not torch.allclose(block(x)[0], still)
        block.attn_drop.eval()
        assert torch.equal(block(x)[0], still)


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
    assert len(patch(plain)) == 7


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


def test_input_of_another_rank():
    """Attention of jina-vlm's code takes tokens alone as one head more: not what the ops make of them."""
    model = Vision().eval()
    plain = copy.deepcopy(model)
    patch(model)
    # [heads, head_dim] taken for tokens: attention between heads
    x = torch.randn(2, 1, 5, 24)
    with torch.no_grad():
        with pytest.raises((RuntimeError, ValueError)) as expected:
            plain.layers[0].attn(x)
        with pytest.raises(type(expected.value)):
            model.layers[0].attn(x)


def test_functional_call(pair):
    model, plain, inputs = pair
    other = {name: p * 0.5 + 0.01 for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(plain, other, kwargs=inputs).last_hidden_state
        with Calls() as calls:
            actual = torch.func.functional_call(model, other, kwargs=inputs).last_hidden_state
    assert calls.names
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def eager_pair():
    """As `pair`, with attention that torch can differentiate in forward mode on CPU."""
    model, inputs = siglip(attn_implementation="eager")
    plain = copy.deepcopy(model)
    patch(model)
    return model, plain, inputs


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vmap of grad"])
def test_function_transforms(transform):
    model, plain, inputs = eager_pair()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    pixels = inputs["pixel_values"]

    def loss(each, parameters, pixels):
        result = torch.func.functional_call(each, parameters, kwargs={"pixel_values": pixels})
        return result.last_hidden_state.square().sum()

    def of(each):
        of_each = functools.partial(loss, each)
        if transform == "grad":
            return torch.func.grad(of_each)(parameters, pixels)
        if transform == "jvp":
            tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
            return torch.func.jvp(lambda p: of_each(p, pixels), (parameters,), (tangents,))[1]
        rows = pixels.unsqueeze(1)
        if transform == "vmap":
            return torch.func.vmap(of_each, in_dims=(None, 0))(parameters, rows)
        return torch.func.vmap(torch.func.grad(of_each), in_dims=(None, 0))(parameters, rows)

    torch.testing.assert_close(of(model), of(plain), rtol=1e-3, atol=1e-3)


def test_forward_gradients():
    model, plain, inputs = eager_pair()

    def tangent(each):
        with forward_ad.dual_level():
            pixels = forward_ad.make_dual(inputs["pixel_values"], torch.ones_like(inputs["pixel_values"]))
            return forward_ad.unpack_dual(each(pixel_values=pixels).last_hidden_state).tangent

    torch.testing.assert_close(tangent(model), tangent(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["layer_norm2", "fc1.weight", "fc2.bias", "q_proj", "embeddings", "layers.1"])
def test_some_parameters_trained(pair, trained):
    model, plain, inputs = pair
    for each in (model, plain):
        for name, p in each.named_parameters():
            p.requires_grad_(trained in name)
    assert assert_alike(model, plain, inputs).names


def test_inference_mode(pair):
    model, plain, inputs = pair
    with torch.inference_mode(), Calls() as calls:
        actual, expected = (each(**inputs).last_hidden_state for each in (model, plain))
    assert calls.names and actual.is_inference()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_shared_modules():
    model, inputs = siglip()
    first, second = blocks(model)
    second.mlp = first.mlp
    second.self_attn.q_proj.weight = second.self_attn.k_proj.weight
    plain = copy.deepcopy(model)
    assert len(patch(model)) == 6
    assert_alike(model, plain, inputs)


@pytest.mark.parametrize("part", ["mlp.fc1", "mlp", "self_attn", "layer_norm2"])
def test_one_part_of_another_dtype(pair, part):
    """A layer that was moved alone fails as it does without the ops, or runs as it does without them."""
    model, plain, inputs = pair

    def result(each):
        blocks(each)[0].get_submodule(part).to(torch.bfloat16)
        try:
            return outputs(each, inputs)
        except RuntimeError as error:
            return str(error)

    actual, expected = result(model), result(plain)
    assert actual == expected


def test_tensor_subclasses_of_weights(pair):
    """What quantisation by tensor subclass does: a plain linear layer, another kind of weight."""
    from torch.testing._internal.two_tensor import TwoTensor

    model, plain, _ = pair
    for each in (model, plain):
        fc1 = blocks(each)[0].mlp.fc1
        weight = fc1.weight.detach()
        fc1.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
        fc1.bias = nn.Parameter(TwoTensor(fc1.bias.detach(), fc1.bias.detach().clone()), requires_grad=False)

    def result(each):
        with Calls() as calls:
            hidden = blocks(each)[0].mlp(torch.ones(1, 2, 48))
        return type(hidden), calls.names

    kind, names = result(model)
    assert kind is result(plain)[0] and not names


def test_dynamic_quantisation(pair):
    model, plain, inputs = pair
    engines = torch.backends.quantized.supported_engines
    if not {"fbgemm", "x86", "onednn", "qnnpack"} & set(engines):
        pytest.skip("torch has no quantised kernels here")
    quantised = [torch.ao.quantization.quantize_dynamic(each, {nn.Linear}) for each in (model, plain)]
    with Calls() as calls:
        actual = outputs(quantised[0], inputs)
    assert not calls.names
    assert torch.equal(actual, outputs(quantised[1], inputs))


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_compiles_whole(pair, hooked, autocast):
    model, plain, inputs = pair
    if hooked:
        for each in (model, plain):
            blocks(each)[0].mlp.activation_fn.register_forward_hook(lambda module, args, result: half(result))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = compiled(**inputs).last_hidden_state, plain(**inputs).last_hidden_state
    limit = 5e-2 if autocast else 1e-5
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_hooks_after_compiling(pair):
    model, plain, inputs = pair
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(**inputs)
        for each in (model, plain):
            forward_hook(blocks(each)[0].mlp.activation_fn, [])
        actual, expected = compiled(**inputs).last_hidden_state, plain(**inputs).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_patch_is_left():
    model, _ = siglip()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    patch(model)
    unpatch(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_unpatch_of_something_else():
    with pytest.raises(TypeError, match="model: got NoneType, expected"):
        unpatch(None)
