"""Checkpoint files that are not what they should be: pipes, devices, nonsense, and a few hundred random mutations of
good ones. Each is refused in a line that names the file, at once and in little memory, or loads."""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import shutil
import time
import warnings

import pytest
import torch
from safetensors import safe_open
from support import DATA, make_no_file

from vlmkern.models.jina_vlm import CheckpointError, ConfigError, JinaVLM, JinaVLMConfig

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000
# what a value may be turned into
ODD_VALUES = [
    *(0, -1, 1, 3, 27, 10_000, 2**31, 2**63, 2**64, 10**400, -(10**400)),
    *(0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), 2.0),
    *(None, True, False, "", "x", "1", "\0", "../x", "rms", "\ud800", [], [[]], [5], [-1, 10**30], {}, {"a": 1}),
    "long" * 10_000,
]


@pytest.fixture
def directory(checkpoint_dir):
    return checkpoint_dir("tiny70")


@pytest.fixture(scope="module")
def layout():
    return json.loads((DATA / "tiny70.config.json").read_text(encoding="utf-8"))


def places(value, path=()):
    """Every (path, value) in nested objects and lists, the root too."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutated(rng, layout):
    """`layout` with one to three places removed, replaced, or exchanged with another."""
    layout = copy.deepcopy(layout)
    for _ in range(rng.randint(1, 3)):
        path, _ = rng.choice([place for place in places(layout) if place[0]] or [((), None)])
        if not path:
            break
        parent = layout
        for key in path[:-1]:
            parent = parent[key]
        kind = rng.random()
        if kind < 0.15:
            del parent[path[-1]]
        elif kind < 0.3:
            parent[path[-1]] = copy.deepcopy(rng.choice(list(places(layout)))[1])
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD_VALUES))
    return layout


def refusal(directory):
    """What `from_pretrained` says of a checkpoint, None if it loads; errors that are not documented pass."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            JinaVLM.from_pretrained(directory)
    except (ConfigError, CheckpointError) as error:
        message = str(error)
        assert str(directory) in message and "\n" not in message and len(message) < 3000, message[:2000]
        return message
    finally:
        assert time.perf_counter() - started < 20
    return None


@pytest.mark.parametrize("name", [CONFIG, INDEX, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "dangling", "huge", "unreadable"])
def test_files_that_are_no_files(directory, name, kind):
    path = directory / name
    if not make_no_file(path, kind):
        if kind == "dangling":
            path.symlink_to(directory / "nowhere")
        else:
            path.touch(mode=0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(directory)
    # a link to nothing is as good as no index
    assert (message is None) == (name == INDEX and kind == "dangling")
    expected = {"pipe": "not a regular file", "device": "not a regular file", "directory": "is a directory"}
    assert kind not in expected or expected[kind] in message
    if kind == "huge" and name != WEIGHTS:
        assert "1099511627776 bytes, expected at most" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000


@pytest.mark.parametrize("name", [CONFIG, INDEX])
@pytest.mark.parametrize(
    "text", [DEEP, '{"a": ' * 100_000, "", "null", "[]", "\udc80", '"x"', "{" + "9" * 5000, '{"a": ' + "9" * 5000 + "}"]
)
def test_texts_that_are_no_objects(directory, name, text):
    (directory / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(directory / name) in refusal(directory)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "text_config.rope_theta",
            10**400,
            r"text_config.rope_theta: got an integer of 1329 bits, expected",
        ),
        ("text_config.rope_theta", float("inf"), r"text_config.rope_theta: got inf, expected a positive number"),
        ("text_config.block_config.lnorm_config.eps", float("nan"), r"lnorm_config.eps: got nan, expected a positive"),
        ("text_config.block_config.lnorm_config.eps", float("inf"), r"lnorm_config.eps: got inf"),
        ("vision_config.block_config.lnorm_config.eps", float("nan"), r"vision_config.*lnorm_config.eps: got nan"),
        ("vision_config.block_config.lnorm_config.eps", 0, r"lnorm_config.eps: got 0"),
        ("eos_token_id", "x", r"eos_token_id: got 'x', expected a token's id"),
        ("eos_token_id", [], r"eos_token_id: got \[\], expected"),
        ("eos_token_id", [1, -2], r"eos_token_id: got \[1, -2\], expected"),
        ("eos_token_id", 2**70, r"eos_token_id: got 11805"),
        ("bos_token_id", 1.5, r"bos_token_id: got 1.5, expected a token's id"),
        ("bos_token_id", -1, r"bos_token_id: got -1, expected a token's id"),
        # settings of norms that would give other numbers than this implementation's
        ("vision_config.block_config.lnorm_config.bias", False, r"lnorm_config.bias: got False, expected True"),
        ("vision_config.block_config.lnorm_config.with_affine", False, r"with_affine: got False, expected True"),
        ("text_config.block_config.lnorm_config.bias", True, r"lnorm_config.bias: got True, expected False"),
        ("text_config.block_config.lnorm_config.with_affine", False, r"with_affine: got False, expected True"),
        (
            "text_config.block_config.attn_config.lnorm_config.type",
            "default",
            r"attn_config.lnorm_config.type: got",
        ),
        ("text_config.block_config.attn_config.lnorm_config.bias", True, r"attn_config.lnorm_config.bias: got True"),
        ("text_config.block_config.attn_config.lnorm_config.eps", 1e-5, r"attn_config.lnorm_config.eps: got 1e-05"),
        (
            "text_config.block_config.attn_config.lnorm_config",
            5,
            r"attn_config.lnorm_config: got int, expected",
        ),
        ("vision_config.block_config.ffn_config", {"ratio": "x"}, r"ffn_config.ratio: got 'x', expected a positive"),
        ("vision_config.block_config.ffn_config", {"ratio": float("inf")}, r"ffn_config.ratio: got inf"),
        ("text_config.block_config.attn_config.head_dim", 127, r"head_dim: got 127, expected an even number"),
        (
            "vision_config.vl_connector_config.pooling_h",
            2**20,
            r"pooling_h: got 1048576, expected at most",
        ),
        ("vision_config.hidden_size", 2**40, r"vision_config.hidden_size: got 1099511627776, expected a size from 1"),
        ("vision_config.vit_layers", [0] * 100_000, r"hidden_size \* vit_layers: got 115200000, expected a size"),
        ("vision_config.input_size", [14 * 2**19] * 2, r"input_size: got .* patches, expected at most"),
        ("model_type", "m" * 10_000, r"model_type: got .{1,100}, expected 'jvlm'$"),
    ],
)
def test_settings_that_are_refused(path, value, message):
    config = JinaVLMConfig().to_dict()
    *parents, leaf = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    with pytest.raises(ConfigError, match=message):
        JinaVLMConfig.from_dict(config)


def test_errors_in_a_config_name_its_file(directory, layout):
    layout = copy.deepcopy(layout)
    layout["text_config"]["rope_theta"] = 0
    (directory / CONFIG).write_text(json.dumps(layout))
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(directory / CONFIG))}: text_config.rope_theta: got 0"):
        JinaVLMConfig.from_pretrained(directory)


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
@pytest.mark.parametrize("layers", [10_000, 2**24])
def test_more_layers_than_the_files_hold_are_refused_before_they_are_built(directory, layout, part, layers):
    layout = copy.deepcopy(layout)
    layout[part]["n_layers"] = layers
    layout["vision_config"]["vit_layers"] = [3, 9]
    (directory / CONFIG).write_text(json.dumps(layout))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"n_layers {layers}"):
        JinaVLM.from_pretrained(directory)
    assert time.perf_counter() - started < 2


def test_one_more_layer_than_the_files_hold_is_listed(directory, layout):
    layout = copy.deepcopy(layout)
    layout["text_config"]["n_layers"] += 1
    (directory / CONFIG).write_text(json.dumps(layout))
    last = layout["text_config"]["n_layers"] - 1
    with pytest.raises(CheckpointError, match=rf"missing: .*language_model\.layers\.{last}\.attn"):
        JinaVLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": 5}, r"weight_map\['a'\]: got 5, expected a file name"),
        ({"a": None}, r"weight_map\['a'\]: got None"),
        ({"a": ["model.safetensors"]}, r"weight_map\['a'\]: got \['model.safetensors'\]"),
        ([], r"weight_map: got \[\]"),
        ({}, r"weight_map: got {}"),
        (None, "weight_map: got None"),
        ({"a": ""}, "outside the directory"),
        ({"a": ".."}, "outside the directory"),
        ({"a": "/etc/passwd"}, "outside the directory"),
        ({"a": "config.json"}, "not \\*.safetensors: config.json"),
        ({"a": "n" * 5000 + ".safetensors"}, "are missing: n"),
        ({"a": "n\0.safetensors"}, "are missing: n"),
    ],
)
def test_indexes_that_are_refused(directory, weight_map, message):
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        JinaVLM.from_pretrained(directory)
    assert refusal(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "torch.bfloat16", torch.float16])
def test_dtypes_by_name(directory, dtype):
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert JinaVLM.from_pretrained(directory, dtype=dtype).dtype == expected
    assert JinaVLM.random(JinaVLMConfig.from_pretrained(directory), dtype=dtype).dtype == expected


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        ("float", ValueError, "dtype: got 'float', expected one of float32, bfloat16"),
        ("cpu", ValueError, "dtype: got 'cpu', expected one of float32"),
        (torch.int8, ValueError, "dtype: got 'int8', expected"),
        (torch.complex64, ValueError, "dtype: got 'complex64', expected"),
        (5, TypeError, "dtype: got int, expected a torch.dtype or one of"),
        (float, TypeError, "dtype: got type, expected a torch.dtype or one of"),
    ],
)
def test_other_dtypes_are_refused(directory, dtype, error, message):
    with pytest.raises(error, match=message):
        JinaVLM.from_pretrained(directory, dtype=dtype)
    with pytest.raises(error, match=message):
        JinaVLM.random(JinaVLMConfig.tiny(), dtype=dtype)


def test_mutated_configs(directory, layout):
    rng, outcomes = random.Random(0), set()
    for _ in range(300):
        (directory / CONFIG).write_text(json.dumps(mutated(rng, layout)))
        message = refusal(directory)
        outcomes.add(message and message.removeprefix(str(directory)).split(":")[0])
    # some load, as not every key matters; some are refused for themselves, some because the tensors are others
    assert outcomes == {None, "", f"/{CONFIG}"}


def test_mutated_indexes(directory):
    with safe_open(directory / WEIGHTS, framework="pt") as handle:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(handle.keys(), WEIGHTS)}
    index["weight_map"] = dict(list(index["weight_map"].items())[:4])
    rng, refused = random.Random(1), 0
    for _ in range(150):
        (directory / INDEX).write_text(json.dumps(mutated(rng, index)))
        refused += refusal(directory) is not None
    assert 50 < refused < 150


def test_mutated_headers(directory):
    whole = (directory / WEIGHTS).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    few = dict(list(header.items())[:6])
    rng, refused = random.Random(2), 0
    for _ in range(150):
        # changes in a handful of entries: the others would hardly be met
        changed = mutated(rng, few)
        text = json.dumps(header | changed if isinstance(changed, dict) else changed).encode()
        (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + tensors)
        refused += refusal(directory) is not None
    assert refused > 100


def test_mutated_bytes(directory):
    whole = (directory / WEIGHTS).read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    rng, refused = random.Random(3), 0
    for case in range(150):
        if case < 50:
            damaged = whole[: rng.choice([rng.randrange(size), rng.randrange(len(whole))])]
        else:
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(8 if case < 70 else size)] = rng.randrange(256)
        (directory / WEIGHTS).write_bytes(damaged)
        refused += refusal(directory) is not None
    assert refused > 100
    shutil.copyfile(DATA / "tiny70.safetensors", directory / WEIGHTS)
    text = (directory / CONFIG).read_bytes()
    for _ in range(100):
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(text))] = rng.randrange(256)
        (directory / CONFIG).write_bytes(damaged[: rng.choice([len(text), rng.randrange(len(text))])])
        refusal(directory)
