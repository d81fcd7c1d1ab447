"""Patched towers over images that differ in size: padding is left out, and what is real stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import IMAGE, TEXT, TOWER, Calls, idefics2, outputs, transformers

from vlmkern.integrations.transformers import patch, register, unpatch


def siglip2_padded():
    """Three images of 9, 6 and 1 patches in one batch."""
    config = transformers.Siglip2VisionConfig(**TOWER, num_patches=9)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] + [0] * 8])
    inputs = {
        "pixel_values": torch.randn(3, 9, 588),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[3, 3], [2, 3], [1, 1]]),
    }
    return transformers.Siglip2VisionModel(config).eval(), inputs, mask.bool()


def idefics2_tower():
    """Images of 4 x 3, 2 x 3 and 4 x 1 patches: what is real is no run of patches in the third."""
    config = transformers.Idefics2Config(
        vision_config=TOWER | {"image_size": 56}, text_config=TEXT | {"model_type": "mistral"}
    )
    model = transformers.models.idefics2.modeling_idefics2.Idefics2VisionTransformer(config.vision_config)
    mask = torch.zeros(3, 4, 3, dtype=torch.bool)
    mask[0], mask[1, :2], mask[2, :, :1] = True, True, True
    return model.eval(), {"pixel_values": torch.randn(3, 3, 56, 42), "patch_attention_mask": mask}, mask.flatten(1)


TOWERS = pytest.mark.parametrize("build", [siglip2_padded, idefics2_tower], ids=lambda build: build.__name__)


def pair(build):
    model, inputs, real = build()
    plain = copy.deepcopy(model)
    report = patch(model)
    assert "encoder" in {what.split()[0] for what in report.values()}, str(report)
    return model, plain, inputs, real


@TOWERS
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "vlmkern"])
def test_real_patches_stay(build, implementation):
    if implementation == "vlmkern":
        register()
    model, plain, inputs, real = pair(build)
    model.set_attn_implementation(implementation)
    unpatch(model)
    patch(model)
    with torch.no_grad(), Calls() as calls:
        found = model(**inputs)
    expected = plain(**inputs)
    assert type(found) is type(expected) and calls.names.count("attention") == 2
    torch.testing.assert_close(found.last_hidden_state[real], expected.last_hidden_state[real], rtol=1e-5, atol=1e-5)
    if getattr(expected, "pooler_output", None) is not None:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)


@TOWERS
def test_gradients_stay(build):
    model, plain, inputs, real = pair(build)
    grads = []
    for each in (model, plain):
        each(**inputs).last_hidden_state[real].square().sum().backward()
        grads.append([p.grad for p in each.parameters() if p.grad is not None])
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


class Rows(TorchDispatchMode):
    """How many tokens each of the ops is given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlmkern":
            name = func._schema.name.split("::")[1]
            self.found.append((name, args[0].shape[:-1].numel() if name == "linear" else args[0].shape[0]))
        return func(*args, **(kwargs or {}))


@TOWERS
def test_padding_is_not_computed(build):
    model, _, inputs, real = pair(build)
    with Rows() as rows, torch.no_grad():
        model(**inputs)
    tokens = int(real.sum())
    block = [*[("linear", tokens)] * 3, ("attention", tokens), *[("linear", tokens)] * 3]
    assert rows.found[: 2 * len(block)] == block * 2 and tokens < real.numel()


@TOWERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(build, dtype):
    model, plain, inputs, real = pair(build)
    model, low = model.to(dtype), copy.deepcopy(plain).to(dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        exact = copy.deepcopy(low).double()(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})
        ours, theirs = (each(**given).last_hidden_state[real].double() for each in (model, low))
    exact = exact.last_hidden_state[real]
    error, theirs = (ours - exact).abs().max(), (theirs - exact).abs().max()
    assert error <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max()


@TOWERS
def test_what_blocks_have_between_them_can_be_asked_for(build):
    """Hidden states are all those of the original, padding too."""
    model, plain, inputs, _ = pair(build)
    found, expected = (each(**inputs, output_hidden_states=True).hidden_states for each in (model, plain))
    assert len(found) == len(expected) == 3
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@TOWERS
def test_hooks_of_blocks_run(build):
    model, plain, inputs, real = pair(build)
    seen = []
    layers = next(m.layers for m in model.modules() if hasattr(m, "layers"))
    layers[1].register_forward_hook(lambda *_: seen.append(1))
    found = model(**inputs).last_hidden_state
    assert seen == [1]
    torch.testing.assert_close(found[real], plain(**inputs).last_hidden_state[real], rtol=1e-5, atol=1e-5)


def test_masks_that_are_no_padding_go_to_the_blocks():
    """Of which each lets its attention's own code have the mask."""
    model, plain, _, _ = pair(siglip2_padded)
    encoder, original = (next(m for m in each.modules() if hasattr(m, "layers")) for each in (model, plain))
    x = torch.randn(2, 7, TOWER["hidden_size"])
    causal = torch.full((7, 7), torch.finfo(x.dtype).min).triu(1).expand(2, 1, 7, 7)
    bias = torch.randn(2, 1, 1, 7).expand(2, 1, 7, 7)
    for mask in (causal, bias):
        with Calls() as calls:
            found = encoder(x, attention_mask=mask).last_hidden_state
        assert "attention" not in calls.names
        torch.testing.assert_close(found, original(x, attention_mask=mask).last_hidden_state, rtol=1e-5, atol=1e-5)


def idefics2_of_two():
    """Two images of one sequence, the second smaller."""
    model, _inputs = idefics2()
    pixels, mask = torch.randn(1, 2, 3, 56, 42), torch.zeros(1, 2, 56, 42, dtype=torch.bool)
    mask[0, 0], mask[0, 1, :28, :28] = True, True
    pixels[~mask[:, :, None].expand_as(pixels)] = 0
    ids = torch.tensor([[5, IMAGE, IMAGE, 7, IMAGE, IMAGE, 9]])
    return model, {"input_ids": ids, "pixel_values": pixels, "pixel_attention_mask": mask}


class TestIdefics2:
    def test_results_and_tokens_stay(self):
        model, inputs = idefics2_of_two()
        plain = copy.deepcopy(model)
        report = patch(model)
        assert report["model.connector"].startswith("connector without padding"), str(report)
        with Calls() as calls:
            found = outputs(model, inputs)
        # the tower's two blocks and the resampler's one
        assert calls.names.count("attention") == 3
        expected = outputs(plain, inputs)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))

    @pytest.mark.parametrize("depth", [1, 3])
    def test_connector(self, depth):
        """Layers whose norms differ, and patches that are no run; gradients too."""
        model, _ = idefics2()
        config = model.config
        config.perceiver_config.resampler_depth = depth
        connector = type(model.model.connector)(config).eval()
        for name, parameter in connector.named_parameters():
            if "norm" in name or "latents" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        plain = copy.deepcopy(connector)
        assert "connector" in patch(connector)["Idefics2Connector"]
        x, real = torch.randn(3, 11, TOWER["hidden_size"]), torch.rand(3, 11) < 0.6
        real[1], real[2] = True, torch.arange(11) == 4
        found = []
        for each in (connector, plain):
            leaf = x.clone().requires_grad_()
            result = each(leaf, attention_mask=real)
            grads = torch.autograd.grad(result.square().sum(), [leaf, *each.parameters()])
            found.append((result, *grads))
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * max(1.0, e.abs().max().item()))
        assert not found[0][1][~real].any()

    def test_hooks_inside_the_resampler_run(self):
        model, inputs = idefics2_of_two()
        patch(model)
        seen = []
        model.model.connector.perceiver_resampler.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
        outputs(model, inputs)
        assert seen == [1]

    def test_undone_to_the_bit(self):
        model, inputs = idefics2_of_two()
        before = outputs(model, inputs)
        report = patch(model)
        assert unpatch(model) == len(report) and torch.equal(outputs(model, inputs), before)
