"""`vlmkern.integrations.transformers`: transformers' models with vlmkern's ops in them, against themselves without."""

import copy
import io
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from jina_remote import Vision
from torch import nn
from transformers_models import (
    Calls,
    clip,
    dinov2,
    dinov2_swiglu,
    gemma2,
    gemma3,
    idefics2,
    idefics3,
    internvl,
    internvl_6b,
    llava_next,
    outputs,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3,
    qwen3_vl,
    siglip,
    siglip2,
    transformers,
    vit,
)

from vlmkern import nn as vlmkern_nn
from vlmkern.integrations.transformers import patch, register, unpatch

# per model: how many modules of each kind are swapped: attention, blocks, MLPs, gated ones, RMS norms; torch's own
# attention, in the heads of SigLIP's towers, which call it for its weights too; encoders with padding, and connectors
MODELS = {
    siglip: (2, 2, 3, 0, 0, 1),
    siglip2: (2, 2, 3, 0, 0, 1, 1),
    idefics2: (2, 2, 2, 2 + 1 + 1, 5 + 4, 0, 1, 1),  # gates of text, projection and resampler
    idefics3: (2, 2, 2, 2, 5, 0, 1),
    paligemma: (2, 2, 2, 2, 5),
    llava_next: (2, 2, 2 + 1 + 1, 2, 5, 1),  # with the projector and the tower's head
    qwen3: (0, 0, 0, 2, 9),
    qwen2_vl: (2, 2, 2 + 1, 2, 5),
    qwen2_5_vl: (3, 3, 1, 3 + 2, 7 + 5),
    qwen3_vl: (2, 2, 2 + 2, 2, 9),
    internvl: (2, 2, 2 + 1, 2, 5),
    internvl_6b: (2, 2, 2 + 1, 2, 8 + 5),
    gemma2: (0, 0, 0, 2, 9),
    gemma3: (2, 2, 2, 2, 14),
    dinov2: (2, 2, 2, 0, 0),
    dinov2_swiglu: (2, 2, 0, 2, 0),
    vit: (2, 2, 2, 0, 0),
    clip: (2, 2, 2, 0, 0),
}
if transformers.__version__.startswith("4."):
    # their attention is two modules deep there, and the one MLP of two is that of the block itself
    MODELS |= {dinov2: (0, 0, 2, 0, 0), dinov2_swiglu: (0, 0, 0, 0, 0), vit: (0, 0, 0, 0, 0)}
KINDS = ("attention", "block", "MLP", "gated", "RMSNorm", "nn.MultiheadAttention,", "encoder", "connector")
GENERATING = [
    *(idefics2, idefics3, paligemma, llava_next, qwen3, qwen2_vl, qwen2_5_vl, qwen3_vl),
    *(internvl, internvl_6b, gemma2, gemma3),
]


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_results_stay(build):
    model, inputs = build()
    before, keys = outputs(model, inputs), list(model.state_dict())
    report = patch(model)
    kinds = [what.split()[0] for what in report.values()]
    counts = tuple(map(kinds.count, KINDS))
    assert counts == (*MODELS[build], 0, 0, 0)[: len(KINDS)] and len(kinds) == sum(counts), str(report)
    with Calls() as calls:
        after = outputs(model, inputs)
    assert calls.names.count("attention") == counts[0] + counts[KINDS.index("connector")]
    assert calls.names.count("linear") >= 2 * sum(MODELS[build][2:4])
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert list(model.state_dict()) == keys

    # again: nothing to do; undone: to the bit
    again = patch(model)
    assert not again and all(name in again.passed_over for name in report)
    assert unpatch(model) == len(report) and unpatch(model) == 0
    with Calls() as calls:
        assert torch.equal(outputs(model, inputs), before)
    assert not calls.names


@pytest.mark.parametrize("build", GENERATING, ids=lambda build: build.__name__)
def test_generation_stays(build):
    model, inputs = build()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(**inputs, **options)
    patch(model)
    assert torch.equal(model.generate(**inputs, **options), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model, inputs = siglip()
    exact = outputs(model, inputs)
    model, inputs = model.to(dtype), {"pixel_values": inputs["pixel_values"].to(dtype)}
    before = outputs(model, inputs)
    patch(model)
    error, limit = ((t.float() - exact).abs().max() for t in (outputs(model, inputs), before))
    assert error <= 2 * limit


def test_gradients_stay():
    model, inputs = siglip()
    clone = copy.deepcopy(model)
    patch(clone)
    for each in (model, clone):
        each.train()
        each(**inputs).pooler_output.square().sum().backward()
    for (name, expected), (_, actual) in zip(model.named_parameters(), clone.named_parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_checkpointing():
    model, inputs = siglip()
    patch(model)
    model.train()
    # not a sum of squares: behind a LayerNorm that is constant, and its gradients are rounding errors
    probe = torch.randn_like(model(**inputs).last_hidden_state)
    (model(**inputs).last_hidden_state * probe).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with Calls() as calls:
        (model(**inputs).last_hidden_state * probe).sum().backward()
    assert calls.names.count("attention") == 4  # each block forward twice
    # of all, as those of the keys' biases are rounding errors in any case
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=2e-6 * scale)


def test_saved_copied_and_moved(tmp_path):
    model, inputs = siglip()
    patch(model)
    before = outputs(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.allclose(outputs(torch.load(file, weights_only=False), inputs), before, atol=1e-5)

    clone = copy.deepcopy(model)
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    # a copy runs on its own weights
    assert outputs(clone, inputs).abs().max() == 0 and torch.equal(outputs(model, inputs), before)

    model.save_pretrained(tmp_path)
    loaded = transformers.SiglipVisionModel.from_pretrained(tmp_path).eval()
    assert torch.allclose(outputs(loaded, inputs), before, atol=1e-5)

    wide = model.to(torch.float64)
    with Calls() as calls:
        outputs(wide, {"pixel_values": inputs["pixel_values"].double()})
    assert not calls.names  # left to the original forward
    with Calls() as calls:
        assert torch.allclose(outputs(model.to(torch.float32), inputs), before, atol=1e-5)
    assert calls.names


def test_what_is_asked_beside_the_result():
    model, inputs = siglip(attn_implementation="eager")
    wanted = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        before = model(**inputs, **wanted)
        patch(model)
        after = model(**inputs, **wanted)
    for name in ("attentions", "hidden_states"):
        for a, b in zip(getattr(after, name), getattr(before, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_in_training_goes_to_the_original():
    model, inputs = siglip(attention_dropout=0.5)
    patch(model)
    with Calls() as calls:
        model.train()(**inputs)
    assert "attention" not in calls.names
    with Calls() as calls:
        model.eval()(**inputs)
    assert "attention" in calls.names


def test_hooks_run():
    model, inputs = siglip()
    patch(model)
    seen = []
    layer = next(module for module in model.modules() if type(module).__name__ == "SiglipEncoderLayer")
    for module in (layer, layer.self_attn, layer.self_attn.q_proj, layer.mlp.fc1):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    outputs(model, inputs)
    assert seen == ["Linear", "SiglipAttention", "Linear", "SiglipEncoderLayer"]


def test_adapters_stay():
    peft = pytest.importorskip("peft")
    model, inputs = siglip()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "fc2"], init_lora_weights=False))
    adapted.eval()
    before = outputs(adapted, inputs)
    report = patch(adapted)
    assert not any("layers.0" in name for name in report)
    reasons = {name.split(".")[-1]: reason for name, reason in report.passed_over.items() if "layers.0." in name}
    assert "q_proj is a peft" in reasons["self_attn"] and "fc2 is a peft" in reasons["mlp"]
    torch.testing.assert_close(outputs(adapted, inputs), before, rtol=1e-5, atol=1e-5)

    # an adapter that comes after the swap is found when the module is called
    model, inputs = siglip()
    patch(model)
    plain = outputs(model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "fc2"], init_lora_weights=False))
    adapted.eval()
    after = outputs(adapted, inputs)
    assert not torch.allclose(after, plain, atol=1e-3)
    unpatch(adapted)
    torch.testing.assert_close(after, outputs(adapted, inputs), rtol=1e-5, atol=1e-5)


def test_jina_vlm_from_remote_code():
    model = Vision().eval()
    inputs = {"patches": torch.randn(1, 3, 15, 24), "masks": torch.tensor([0, 1, -1, 0.5, 1]).repeat(9).view(1, 3, 15)}
    with torch.no_grad():
        before = model(**inputs)
    report = patch(model)
    assert sorted(report.swapped.values()) == sorted(
        ["attention on vlmkern.ops.attention and linear"] * 2
        + ["MLP on vlmkern.ops.linear", "block with fused residuals"] * 2
        + ["connector on vlmkern.ops.attention_pool", "SwiGLU on vlmkern.ops.swiglu_mlp"]
    )
    with torch.no_grad(), Calls() as calls:
        after = model(**inputs)
    assert calls.names.count("attention") == 2 and {"attention_pool", "swiglu_mlp"} <= set(calls.names)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs), before)


def test_modules_of_another_formula_stay():
    class Other(nn.Module):
        """Children like a SwiGLU MLP's, but the gate is the other one."""

        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    model, x = Other(), torch.randn(3, 8)
    before = model(x)
    report = patch(model)
    assert not report and report.passed_over == {"Other": "its result differs from that of the ops"}
    assert torch.equal(model(x), before) and "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.to(torch.float64), "torch.float64 has no kernels"),
        (lambda model: model.to("meta"), "no kernels for meta"),
        (lambda model: setattr(model.encoder.layers[0].mlp, "activation_fn", nn.ReLU()), "ReLU, has no kernel"),
    ],
    ids=["dtype", "device", "activation"],
)
def test_left_alone_and_reported(change, reason):
    model, _ = siglip()
    body = getattr(model, "vision_model", model)
    change(body)
    report = patch(model)
    assert any(reason in why for why in report.passed_over.values()), str(report)
    assert reason in str(report)


def test_bfloat16_where_torch_has_none():
    """AVX2 alone: oneDNN refuses bfloat16 products there, and torch has its own."""
    program = """
        import copy, torch
        from transformers_models import Calls, outputs, siglip
        from vlmkern.integrations.transformers import patch
        torch.manual_seed(0)
        model, inputs = siglip()
        exact = outputs(copy.deepcopy(model).double(), {"pixel_values": inputs["pixel_values"].double()})
        model, inputs = model.bfloat16(), {"pixel_values": inputs["pixel_values"].bfloat16()}
        before = outputs(model, inputs)
        report = patch(model)
        assert len(report) == 8, str(report)
        with Calls() as calls:
            after = outputs(model, inputs)
        assert calls.names.count("attention") == 2
        error, limit = ((t - exact).square().mean().sqrt() for t in (after.double(), before.double()))
        assert error <= 1.1 * limit, (error, limit)
    """
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    without = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=os.environ | without)


def test_nothing_to_patch():
    report = patch(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert not report and not report.passed_over and str(report) == "0 modules swapped, 0 passed over"
    # modules of this package run on the ops as they are
    assert not patch(vlmkern_nn.TileAttention(8, 1, 8)).passed_over
    with pytest.raises(TypeError, match="model: got str, expected"):
        patch("siglip")


def test_compiles():
    model, inputs = siglip()
    before = outputs(model, inputs)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        after = compiled(**inputs).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_registered_attention():
    register()
    register()
    model, inputs = siglip()
    before = outputs(model, inputs)
    model.set_attn_implementation("vlmkern")
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        after = outputs(model, inputs)
    # with the pooling head's where it goes through the interface too
    assert calls.names.count("attention") >= 2
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_registered_attention_in_a_vision_language_model():
    register()
    model, inputs = idefics3()
    before = outputs(model, inputs)
    model.set_attn_implementation({"vision_config": "vlmkern", "text_config": "sdpa"})
    with Calls() as calls:
        after = outputs(model, inputs)
    assert calls.names.count("attention") == 2
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_without_transformers():
    program = (
        "import importlib.metadata as metadata, sys\n"
        "version = metadata.version\n"
        "def without(name):\n"
        "    if name == 'transformers': raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = without\n"
        "try:\n    import vlmkern.integrations.transformers\n"
        "except ImportError as error:\n    print(error)\n"
        "import vlmkern\nassert 'transformers' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'vlmkern[transformers]'" in run.stdout
