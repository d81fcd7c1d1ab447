"""Tokens and log-probabilities of vLLM's engine, in every way that it can run the model, against the stored ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import DATA, load_arrays
from vllm_support import CASES, IMAGE_ID, oracle_prompt, oracle_tokens, run_engine

from vlmkern.models.jina_vlm import JinaVLM

EAGER = {"enforce_eager": True}
IN_PROCESS = {"distributed_executor_backend": "uni"}
NO_CACHES = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of pictures: one of the size of a stored case, others of other tilings."""
    directory = tmp_path_factory.mktemp("pictures")
    first = np.array(Image.open(DATA / CASES["640x480"]))
    made = {"flipped": Image.fromarray(first[::-1].copy())}
    for width, height in ((378, 378), (900, 300), (100, 500), (512, 512), (800, 600)):
        made[f"{width}x{height}"] = Image.fromarray(first).resize((width, height))
    for name, image in made.items():
        image.save(directory / f"{name}.png")
    return {name: str(directory / f"{name}.png") for name in made}


@pytest.fixture(scope="module")
def requests(pictures):
    """Twelve requests: the stored cases, pictures of other tilings, two pictures, the same one twice."""
    stored = [oracle_prompt(case) for case in CASES]
    others = [
        {"ids": [0, 7, IMAGE_ID, 50, 60 + place], "images": [pictures[name]]} for place, name in enumerate(pictures)
    ]
    several = [
        {"ids": [0, IMAGE_ID, 9, IMAGE_ID, 50], "images": [pictures["flipped"], pictures["378x378"]]},
        {"ids": [0, IMAGE_ID, IMAGE_ID, 50], "images": [pictures["100x500"]] * 2},
    ]
    arrays = [{**stored[1], "numpy": True}]
    made = stored + others + several + arrays
    assert len(made) == 12
    return made


@pytest.fixture(scope="module")
def truth(served_checkpoint, tmp_path_factory, requests):
    """Each request alone, then all at once, in an engine without caches."""
    engine = {**EAGER, **IN_PROCESS, **NO_CACHES}
    jobs = [[request] for request in requests] + [requests]
    scratch = tmp_path_factory.mktemp("truth")
    results = run_engine(served_checkpoint, jobs, scratch, engine, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return [result for (result,) in results[:-1]], results[-1]


def tokens(results):
    return [result["tokens"] for result in results]


def test_alone_they_are_the_stored_tokens_and_probabilities(truth):
    alone, _ = truth
    for case, result in zip(CASES, alone, strict=False):
        assert result["tokens"] == oracle_tokens(case), case
        logits = load_arrays(f"tiny378_{case}")["greedy_logits"][0, :-1].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(result["tokens"][1:])[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(result["logprobs"][1:]).double(), expected, rtol=0, atol=2e-5)
    assert alone[-1]["tokens"] == alone[1]["tokens"], "an array and a PIL image of the same pixels"


def test_a_batch_of_twelve_equals_one_by_one(truth):
    alone, together = truth
    assert tokens(together) == tokens(alone)


@pytest.mark.parametrize(
    ("engine", "env"),
    [
        pytest.param(EAGER, {}, id="eager-own-process"),
        pytest.param({"enforce_eager": False, **IN_PROCESS}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, id="compiled"),
        pytest.param(
            {**EAGER, **IN_PROCESS, "max_num_batched_tokens": 256},
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            id="256-tokens-a-step",
        ),
    ],
)
def test_engines_agree(served_checkpoint, tmp_path, requests, truth, engine, env):
    """With caches: the second round finds prefixes and pictures in them, and still gives each request its own."""
    jobs = [[request] for request in requests[:4]] + [requests, requests]
    *alone, first, second = run_engine(served_checkpoint, jobs, tmp_path, {**engine, "seed": 0}, **env)
    expected = tokens(truth[0])
    assert [tokens(result) for result in alone] == [[row] for row in expected[:4]]
    assert tokens(first) == expected
    assert tokens(second) == expected


def test_the_same_text_about_another_picture_of_the_same_size(served_checkpoint, tmp_path, pictures):
    same_size = {**oracle_prompt("640x480"), "images": [pictures["flipped"]]}
    jobs = [[oracle_prompt("640x480")], [same_size], [oracle_prompt("640x480")]]
    engine = {**EAGER, **IN_PROCESS}
    (first,), (other,), (again,) = run_engine(
        served_checkpoint, jobs, tmp_path, engine, VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )
    assert first["tokens"] == again["tokens"] == oracle_tokens("640x480")
    np.testing.assert_allclose(first["logprobs"], again["logprobs"], rtol=0, atol=1e-5)
    assert other["prompt_tokens"] == first["prompt_tokens"]
    assert other["logprobs"][0] != pytest.approx(first["logprobs"][0], abs=1e-3)


def test_without_pictures_the_tower_is_not_loaded(served_checkpoint, tmp_path):
    engine = {**EAGER, **IN_PROCESS, "limit_mm_per_prompt": {"image": 0}}
    ((result,),) = run_engine(
        served_checkpoint, [[oracle_prompt("text")]], tmp_path, engine, VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )
    assert result["tokens"] == oracle_tokens("text")


def test_bfloat16_stays_near(served_checkpoint, tmp_path, truth):
    engine = {**EAGER, **IN_PROCESS, "dtype": "bfloat16"}
    jobs = [[oracle_prompt(case)] for case in CASES]
    results = run_engine(served_checkpoint, jobs, tmp_path, engine, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for (result,), expected in zip(results, truth[0], strict=False):
        # later tokens follow from other first ones, where two are nearly as likely
        assert result["logprobs"][0] == pytest.approx(expected["logprobs"][0], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({**EAGER, "tensor_parallel_size": 2}, id="tp2"),
        pytest.param({**EAGER, "tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}, id="tp2-crops-shared-out"),
        pytest.param({"enforce_eager": False, "pipeline_parallel_size": 2}, id="pp2-compiled"),
    ],
)
def test_two_ranks(served_checkpoint, tmp_path, requests, truth, engine):
    (results,) = run_engine(served_checkpoint, [requests], tmp_path, engine, ranks=2)
    assert tokens(results) == tokens(truth[0])


def test_an_adapter_of_the_decoder(served_checkpoint, tmp_path):
    """Adapters name the decoder's projections as transformers' Qwen3 does, in the checkpoint's module tree."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 64, generator=generator) / 8, torch.randn(64, 8, generator=generator) / 8
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = "base_model.model.model.language_model.layers.1.self_attn.v_proj"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **settings}), encoding="utf-8")

    model = JinaVLM.from_pretrained(served_checkpoint)
    case = load_arrays("tiny378_64x64")
    inputs = {name: case[name] for name in ("crops", "image_masks", "image_input_idx")}
    with torch.no_grad():
        model.model.language_model.layers[1].attn.qkv_w.weight[-64:] += 2 * up @ down
    expected = model.generate(case["input_ids"], **inputs, max_new_tokens=8)[0].tolist()
    assert expected != oracle_tokens("64x64")

    engine = {**EAGER, **IN_PROCESS, "enable_lora": True, "max_lora_rank": 8}
    jobs = [[oracle_prompt("64x64")], [{**oracle_prompt("64x64"), "adapter": str(adapter)}]]
    (plain,), (adapted,) = run_engine(served_checkpoint, jobs, tmp_path, engine, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert plain["tokens"] == oracle_tokens("64x64")
    assert adapted["tokens"] == expected


def test_a_wrong_checkpoint_is_refused_by_name(served_checkpoint, tmp_path):
    """One fault through the engine; tests/test_vllm_plugin.py has the others."""
    tensors = load_file(served_checkpoint / "model.safetensors")
    name = "model.language_model.layers.1.attn.q_lnorm.weight"
    del tensors[name]
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in served_checkpoint.glob("*.json"):
        (broken / file.name).write_bytes(file.read_bytes())
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match=f"CheckpointError: 1 tensors are missing: {name}"):
        run_engine(broken, [], tmp_path, {**EAGER, **IN_PROCESS}, VLLM_ENABLE_V1_MULTIPROCESSING="0")
