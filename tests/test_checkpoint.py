"""Loading and saving checkpoints, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmkern.models.jina_vlm import CheckpointError, ConfigError, JinaVLM, JinaVLMConfig


@pytest.fixture
def directory(checkpoint_dir):
    return checkpoint_dir("tiny70")


@pytest.fixture
def rewrite(directory):
    """Edits the weight file in place."""

    def edit(change):
        file = directory / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)

    return edit


def test_round_trip(directory, tmp_path):
    model = JinaVLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "copy")
    again = JinaVLM.from_pretrained(tmp_path / "copy", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16())


def test_sharded_with_index(directory):
    state = load_file(directory / "model.safetensors")
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, directory / file)
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = JinaVLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())

    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: model-00002-of-00002\.safetensors"):
        JinaVLM.from_pretrained(directory)


def test_missing_unknown_and_misshapen_tensors_are_all_listed(directory, rewrite):
    def change(state):
        del state["lm_head.weight"]
        state["extra.weight"] = torch.zeros(1)
        state["model.language_model.ln_f.weight"] = torch.zeros(3)

    rewrite(change)
    with pytest.raises(CheckpointError) as error:
        JinaVLM.from_pretrained(directory)
    for part in (
        "1 missing: lm_head.weight",
        "1 not of this model: extra.weight",
        "ln_f.weight [3], expected [64]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_load_with_a_warning(directory, rewrite, value):
    rewrite(lambda state: state["model.language_model.ln_f.weight"].fill_(value))
    with pytest.warns(RuntimeWarning, match="NaN or infinite values in model.language_model.ln_f.weight"):
        JinaVLM.from_pretrained(directory)


def test_pickles_are_refused(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*not loaded"):
        JinaVLM.from_pretrained(directory)


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_truncated_weights(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        JinaVLM.from_pretrained(directory)


def test_directories_without_the_files(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"no config.json"):
        JinaVLM.from_pretrained(tmp_path)
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        JinaVLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        JinaVLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside the directory"):
        JinaVLM.from_pretrained(tmp_path)


class TestConfig:
    def layout(self):
        return JinaVLMConfig().to_dict()

    def test_defaults_are_the_released_layout(self):
        config = JinaVLMConfig()
        assert JinaVLMConfig.from_dict(self.layout()) == config
        assert config.vision.feature_slots == (24, 18) and config.windows_per_crop == 196

    def test_tiny_round_trip(self):
        assert JinaVLMConfig.from_dict(JinaVLMConfig.tiny().to_dict()) == JinaVLMConfig.tiny()

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("model_type", "llava", "model_type: got 'llava', expected 'jvlm'"),
            ("tie_word_embeddings", True, "tie_word_embeddings: got True"),
            ("vision_config", None, "vision_config: missing"),
            ("vision_config", [], "vision_config: got list, expected an object"),
            ("vision_config.hidden_size", None, "vision_config.hidden_size: missing"),
            (
                "vision_config.hidden_size",
                "big",
                "vision_config.hidden_size: got 'big', expected a positive integer",
            ),
            ("vision_config.n_layers", 0, "vision_config.n_layers: got 0"),
            ("vision_config.use_cls_token", True, "vision_config.use_cls_token: got True, expected False"),
            ("vision_config.vit_layers", [-40], "vit_layers: got -40"),
            ("vision_config.vit_layers", "all", "vit_layers: got 'all'"),
            ("vision_config.input_size", [380, 378], "expected multiples of patch_size"),
            ("vision_config.output_size", 7, "output_size: got 7, expected the decoder's hidden_size 2048"),
            ("vision_config.block_config.attn_config.n_kv_heads", 4, "n_kv_heads: got 4, expected 16"),
            ("vision_config.block_config.ffn_config.activation_type", "relu", "activation_type: got 'relu'"),
            ("vision_config.vl_connector_config.pooling_type", "mean", "pooling_type: got 'mean'"),
            ("text_config.rope_scaling", {"factor": 2}, "rope_scaling: got"),
            ("text_config.rope_theta", -1, "rope_theta: got -1"),
            (
                "text_config.block_config.lnorm_config.type",
                "default",
                "lnorm_config.type: got 'default', expected 'rms'",
            ),
            ("text_config.block_config.attn_config.n_kv_heads", 3, "expected a multiple of n_kv_heads 3"),
        ],
    )
    def test_errors_name_the_key(self, path, value, message):
        layout = self.layout()
        *parents, leaf = path.split(".")
        section = layout
        for parent in parents:
            section = section[parent]
        section[leaf] = value
        with pytest.raises(ConfigError, match=message):
            JinaVLMConfig.from_dict(layout)

    def test_not_json(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ConfigError, match="cannot be read as JSON"):
            JinaVLMConfig.from_pretrained(tmp_path)
