"""The OpenAI-compatible server: what it answers, what it refuses, and that it lives on."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from support import DATA
from vllm_support import CASES, picture, serve

from vlmkern.models.jina_vlm import JinaVLM, JinaVLMProcessor

PHOTO = Image.open(DATA / CASES["640x480"])
SMALL = Image.open(DATA / CASES["64x64"])
LIMIT = 2


@pytest.fixture(scope="module")
def server(served_checkpoint, tmp_path_factory):
    arguments = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "8"]
    limits = ["--limit-mm-per-prompt", f'{{"image": {LIMIT}}}', "--trust-request-mm-kwargs"]
    with serve(served_checkpoint, tmp_path_factory.mktemp("server"), *arguments, *limits) as running:
        yield running
        assert running.alive()


@pytest.fixture(scope="module")
def ours(served_checkpoint):
    """question, pictures -> the package's own prompt ids and greedy answer."""
    model, processor = JinaVLM.from_pretrained(served_checkpoint), JinaVLMProcessor.from_pretrained(served_checkpoint)
    # as in config.json: the tokenizer's files do not say which ids open and end a text
    processor.image_processor.bos_token_id = 0

    def answer(question, *pictures):
        inputs = processor(processor.chat(question, len(pictures)), list(pictures) or None)
        end = model.config.eos_token_id
        return inputs["input_ids"][0].tolist(), model.generate(**inputs, max_new_tokens=8, eos_token_id=end)[0].tolist()

    return answer


def photo(width, height):
    return PHOTO.resize((width, height))


ANSWERED = {
    "one picture": (PHOTO,),
    "text only": (),
    "two pictures": (PHOTO, SMALL),
    "the same picture twice": (SMALL, SMALL),
    "1920x1080": (photo(1920, 1080),),
    "grey": (SMALL.convert("L"),),
    "opaque RGBA": (SMALL.convert("RGBA"),),
}


@pytest.mark.parametrize("case", ANSWERED)
def test_answers_are_our_own(server, ours, case):
    """Prompts, BOS first, and greedy answers equal those of the package's own model and processor."""
    pictures = ANSWERED[case]
    status, body = server.chat(*map(picture, pictures), "What is it?", return_token_ids=True)
    assert status == 200, body
    prompt, answer = ours("What is it?", *pictures)
    assert body["prompt_token_ids"] == prompt
    assert body["choices"][0]["token_ids"] == answer
    assert prompt[0] == 0 and body["usage"]["prompt_tokens"] == len(prompt)


def test_transparency_is_put_on_white(server):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    answers = [
        server.chat(picture(image), "?", return_token_ids=True, logprobs=True)[1]["choices"][0]
        for image in (clear, Image.new("RGB", (64, 64), "white"))
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[0]["logprobs"] == answers[1]["logprobs"]


@pytest.mark.parametrize("prompt", ["Hello", [5, 6, 7]])
def test_completions_of_text_open_with_bos_and_ids_are_taken_as_they_are(server, prompt):
    body = {"model": "jina-vlm", "prompt": prompt, "max_tokens": 2, "temperature": 0, "return_token_ids": True}
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    ids = answer["choices"][0]["prompt_token_ids"]
    assert ids == (prompt if isinstance(prompt, list) else [0, *ids[1:]])
    assert len(ids) == (3 if isinstance(prompt, list) else 6)


def test_answers_can_be_held_to_a_schema(server):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    status, body = server.chat(picture(SMALL), "How many?", response_format=wanted, max_tokens=32)
    assert status == 200, body
    assert body["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_fewer_crops_on_request(server):
    tall = picture(photo(300, 900))
    lengths = []
    for max_crops in (12, 2, 1):
        status, body = server.chat(tall, "?", mm_processor_kwargs={"max_crops": max_crops})
        assert status == 200, body
        lengths.append(body["usage"]["prompt_tokens"])
    assert lengths[0] > lengths[1] > lengths[2]


TRUNCATED = picture(base64.b64decode(picture(PHOTO)["image_url"]["url"].partition(",")[2])[:3000])
REFUSED = {
    "bad base64": (({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}, "?"), {}),
    "not a picture": ((picture(b"not a picture"), "?"), {}),
    "a truncated PNG": ((TRUNCATED, "?"), {}),
    "an aspect ratio above 200": ((picture(Image.new("RGB", (2010, 10))), "?"), {}),
    "more pictures than allowed": ((*[picture(SMALL)] * (LIMIT + 1), "?"), {}),
    "a prompt that is too long": (("x" * 5000,), {}),
    "pictures that make it too long": ((picture(photo(1920, 1080)), picture(photo(1920, 1080)), "x" * 1000), {}),
    "a marker in the text": ((picture(SMALL), "and <|image|> this"), {}),
    "more crops than planned for": ((picture(SMALL), "?"), {"mm_processor_kwargs": {"max_crops": 13}}),
    "another crop size": ((picture(SMALL), "?"), {"mm_processor_kwargs": {"base_size": 756}}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_and_leave_the_server_alive(server, case):
    parts, more = REFUSED[case]
    status, body = server.chat(*parts, **more)
    assert status == 400, body
    assert body["error"]["message"]
    assert server.alive()
    assert server.chat("Still there?")[0] == 200


def test_concurrent_answers_equal_sequential_ones(server):
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (378, 378), (900, 300), (640, 480), (100, 400), (512, 512), (800, 600), (300, 1000)]
    requests = [(picture(photo(*size)), f"Question {rng.integers(100)}?") for size in sizes] + [("Only text?",)] * 4

    def tokens(parts):
        status, body = server.chat(*parts, return_token_ids=True)
        assert status == 200, body
        return body["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(tokens, requests))
    assert together == [tokens(parts) for parts in requests]
