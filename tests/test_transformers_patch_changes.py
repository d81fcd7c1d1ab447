"""Patched models that change after the patch, and calls unlike the one of its trial: right, or left to the original.

Each change is made to a patched model and to one like it that was never patched: the two must stay alike.
"""

import copy
import functools

import pytest
import torch
from jina_remote import Vision
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from transformers_models import Calls, assert_alike, blocks, half, outputs, siglip, siglip_pair

from vlmkern.integrations.transformers import patch, unpatch


@pytest.fixture
def pair():
    return siglip_pair()


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


@pytest.mark.parametrize("shape", [(15,), (1, 1, 15), (2, 3, 15)], ids=str)
def test_masks_that_broadcast(shape):
    model = Vision().eval()
    plain = copy.deepcopy(model)
    patch(model)
    features, masks = torch.randn(1, 3, 15, 48), torch.tensor([0, 1, -1, 0.5, 1]).repeat(3).expand(shape)
    with torch.no_grad():
        expected, actual = (each.vl_connector(features, masks) for each in (plain, model))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_moved_to_a_device_without_kernels(pair):
    model, _, inputs = pair
    model.to("meta")
    with Calls() as calls:
        assert model(pixel_values=inputs["pixel_values"].to("meta")).last_hidden_state.device.type == "meta"
    assert not calls.names


def test_functional_call(pair):
    model, plain, inputs = pair
    other = {name: p * 0.5 + 0.01 for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(plain, other, kwargs=inputs).last_hidden_state
        with Calls() as calls:
            actual = torch.func.functional_call(model, other, kwargs=inputs).last_hidden_state
    assert calls.names
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vmap of grad"])
def test_function_transforms(transform):
    model, plain, inputs = siglip_pair(attn_implementation="eager")  # torch's fused attention has no such rules on CPU
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
    model, plain, inputs = siglip_pair(attn_implementation="eager")  # torch's fused attention has no such rules on CPU

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
    assert len(patch(model)) == 7
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
            blocks(each)[0].mlp.activation_fn.register_forward_hook(lambda module, args, result: half(result))
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


def test_swapped_forwards_that_somebody_took_away():
    """As a library does that gives a module back the forward of its class."""
    model, inputs = siglip()
    before = outputs(model, inputs)
    patch(model)
    mlp, attention = blocks(model)[0].mlp, blocks(model)[0].self_attn
    del mlp.forward
    attention.forward = type(attention).forward.__get__(attention)
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-5, atol=1e-5)
    report = patch(model)
    assert sorted(name.rpartition("layers.0.")[2] for name in report) == ["mlp", "self_attn"]
    assert unpatch(model) == 8
    assert torch.equal(outputs(model, inputs), before)
