"""vLLM's server with the plugin, on CPUs: requests per second and time to first token, and a load of mixed requests.

    python bench/vllm_serving.py [--load-only | --speed-only] [--json FILE]

Speed: a model of the released geometry with fewer and narrower layers and random weights, so that an answer takes
seconds; every request asks about a picture of its own of 640 x 480 pixels (5 crops, 814 tokens) for 32 tokens. Beside
the server, one request after another in one process:

- `vlmkern`: `JinaVLM.generate`;
- `transformers`: transformers has no jina-vlm, so this is a stand-in: its SigLIP, run up to the last block that is
  used, and its Qwen3 `generate`, both holding the same weights, with the connector on vlmkern's plain-torch reference
  between them. Its tokens must equal those of `vlmkern`.

All compute in float32 on one thread; the server reads pictures in another process, which may use a second core.

Load: 200 requests, 16 at a time, to a server of the tests' checkpoint: pictures of ten sizes, text only, and bad ones.
Every request must get the status that belongs to it, and the server must be alive afterwards.
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from vllm_support import Server, picture, serve, write_checkpoint, write_tokenizer

from vlmkern import use_backend
from vlmkern.integrations.vllm import installed, weights
from vlmkern.models.jina_vlm import (
    ConnectorConfig,
    JinaVLM,
    JinaVLMConfig,
    JinaVLMProcessor,
    TextConfig,
    VisionConfig,
)

NEW_TOKENS = 32
QUESTION = "What is in this picture?"
CONCURRENT = (1, 4, 8)
SIZES = (
    (64, 64),
    (224, 224),
    (378, 378),
    (640, 480),
    (900, 300),
    (512, 512),
    (100, 1000),
    (800, 600),
    (1024, 768),
    (1920, 1080),
)


def config() -> JinaVLMConfig:
    """54 million parameters: released geometry, heads of 72 and of 64."""
    return JinaVLMConfig(
        vision=VisionConfig(hidden_size=288, num_layers=14, num_heads=4, mlp_size=1076),
        connector=ConnectorConfig(num_heads=4, mlp_size=1536, output_size=512),
        text=TextConfig(
            hidden_size=512,
            num_layers=12,
            vocab_size=300,
            additional_vocab_size=20,
            num_heads=8,
            num_kv_heads=4,
            head_dim=64,
            mlp_size=1536,
        ),
        bos_token_id=0,
        eos_token_id=299,
    )


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth noise: no two alike, and a PNG of it is as small as a drawing's."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


class StandIn:
    """The model put together from transformers' parts; see the module's docstring."""

    def __init__(self, model: JinaVLM) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

        self.model, vision, text = model, model.config.vision, model.config.text
        tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.mlp_size,
                num_hidden_layers=weights.last_block(model.config) + 1,
                num_attention_heads=vision.num_heads,
                image_size=vision.image_size[0],
                patch_size=vision.patch_size,
                vision_use_head=False,
            )
        )
        self.tower = getattr(tower, "vision_model", tower).eval()
        self.decoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=text.mlp_size,
                num_hidden_layers=text.num_layers,
                num_attention_heads=text.num_heads,
                num_key_value_heads=text.num_kv_heads,
                head_dim=text.head_dim,
                rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
                tie_word_embeddings=False,
            )
        ).eval()
        self._copy_tower(model.model.vision_model)
        state = dict(weights.served(model.config, model.state_dict().items()))
        state = {name.removeprefix("language_model."): t for name, t in state.items() if name.startswith("language")}
        table = "model.embed_tokens.weight"
        self.decoder.load_state_dict({**state, table: state[table][: text.vocab_size]})

    @torch.no_grad()
    def _copy_tower(self, ours) -> None:
        patch, channels = ours.config.patch_size, ours.config.num_channels
        conv = ours.patch_embed.proj.weight.view(-1, patch, patch, channels).permute(0, 3, 1, 2)
        pairs = [
            (self.tower.embeddings.patch_embedding, conv, ours.patch_embed.proj.bias),
            (self.tower.embeddings.position_embedding, ours.pos_embed, None),
        ]
        for other, mine in zip(self.tower.encoder.layers, ours.layers, strict=False):
            q, k, v = mine.attn.qkv_w.weight.chunk(3)
            pairs += [
                (other.layer_norm1, mine.attn_lnorm.weight, mine.attn_lnorm.bias),
                (other.layer_norm2, mine.ffn_lnorm.weight, mine.ffn_lnorm.bias),
                (other.self_attn.q_proj, q, mine.attn.q_b),
                (other.self_attn.k_proj, k, mine.attn.k_b),
                (other.self_attn.v_proj, v, mine.attn.v_b),
                (other.self_attn.out_proj, mine.attn.out.weight, mine.attn.out.bias),
                (other.mlp.fc1, mine.ffn.up.weight, mine.ffn.up.bias),
                (other.mlp.fc2, mine.ffn.down.weight, mine.ffn.down.bias),
            ]
        for module, weight, bias in pairs:
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)

    @torch.no_grad()
    def generate(self, input_ids, crops, image_masks, image_input_idx, attention_mask, max_new_tokens) -> torch.Tensor:
        """As `JinaVLM.generate`, for one sequence."""
        vision = self.model.config.vision
        side, patch = vision.grid[0], vision.patch_size
        pixels = crops[0].view(-1, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        features = [states[slot + 1].contiguous() for slot in vision.feature_slots]
        keep = (image_input_idx.flatten() >= 0).nonzero().squeeze(1)
        with use_backend("reference"):
            rows = self.model.model.vision_model.vl_connector(features, image_masks[0], keep)
        embeds = self.model.model.language_model.embedding(input_ids)
        embeds[0].index_add_(0, image_input_idx.flatten()[keep], rows)
        return self.decoder.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )


def one_by_one(generate, processor: JinaVLMProcessor, pictures: list[Image.Image]) -> tuple[dict, list[list[int]]]:
    """Requests per second and seconds to the first token, reading the pictures included; and the tokens."""
    prompt, firsts, totals, tokens = processor.chat(QUESTION), [], [], []
    for image in pictures:
        start = time.perf_counter()
        inputs = processor(prompt, image)
        read = time.perf_counter() - start
        start = time.perf_counter()
        generate(**inputs, max_new_tokens=1)
        firsts.append(read + time.perf_counter() - start)
        start = time.perf_counter()
        tokens.append(generate(**inputs, max_new_tokens=NEW_TOKENS)[0].tolist())
        totals.append(read + time.perf_counter() - start)
    return _figures(len(pictures), sum(totals), firsts), tokens


def _figures(requests: int, seconds: float, firsts: list[float]) -> dict:
    return {
        "requests_per_second": requests / seconds,
        "first_token_median_s": statistics.median(firsts),
        "first_token_worst_s": max(firsts),
    }


def streamed(server: Server, image: Image.Image) -> tuple[float, list[int]]:
    """Seconds to the first token of a streamed answer, and its tokens."""
    body = {
        "model": "jina-vlm",
        "messages": [{"role": "user", "content": [picture(image), {"type": "text", "text": QUESTION}]}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    start, first, tokens = time.perf_counter(), None, []
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                tokens += choice.get("token_ids") or []
                first = first or (time.perf_counter() - start if tokens else None)
    connection.close()
    return first, tokens


def speed(scratch: Path, count: int) -> dict:
    """Figures of the server and of both ways one by one."""
    torch.set_num_threads(1)
    directory = scratch / "model"
    model = JinaVLM.random(config(), seed=0)
    model.save_pretrained(directory)
    write_tokenizer(directory, model.config.text.vocab_size)
    processor = JinaVLMProcessor.from_pretrained(directory)
    processor.image_processor.bos_token_id = 0
    pictures = [photo(640, 480, seed) for seed in range(count * (1 + len(CONCURRENT)))]

    results, expected = {}, {}
    for name, generate in (("vlmkern", model.generate), ("transformers", StandIn(model).generate)):
        one_by_one(generate, processor, pictures[-1:])
        results[f"{name}, one by one"], expected[name] = one_by_one(generate, processor, pictures[:count])
    if expected["vlmkern"] != expected["transformers"]:
        raise RuntimeError("the stand-in's tokens differ from the model's: it is not the same model")

    arguments = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8"]
    with serve(directory, scratch, *arguments, patience=400) as server:
        streamed(server, photo(640, 480, 10_000))
        for place, concurrent in enumerate(CONCURRENT):
            # pictures that no cache has seen; the first ones also answer whether it is the same model
            chosen = pictures[:count] if place == 0 else pictures[place * count : (place + 1) * count]
            start = time.perf_counter()
            with ThreadPoolExecutor(concurrent) as pool:
                answers = list(pool.map(lambda image: streamed(server, image), chosen))
            seconds = time.perf_counter() - start
            results[f"vLLM with the plugin, {concurrent} at a time"] = _figures(
                len(chosen), seconds, [first for first, _ in answers]
            )
            if place == 0 and [tokens for _, tokens in answers] != expected["vlmkern"]:
                raise RuntimeError("the server's tokens differ from the model's")
    return results


def load(scratch: Path, total: int = 200, concurrent: int = 16) -> dict:
    """Counts of a load of mixed requests; raises where one is lost or gets a status that is not its own."""
    rng = np.random.default_rng(0)
    good = picture(photo(64, 64, 0))
    broken = {"type": "image_url", "image_url": {"url": good["image_url"]["url"][:200]}}
    bad = (
        (broken, "?"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}, "?"),
        (picture(Image.new("RGB", (2010, 10))), "?"),
        ("x" * 20_000,),
        (good, good, good, "?"),
    )
    requests = []
    for index in range(total):
        kind = rng.choice(["picture", "text", "bad"], p=[0.6, 0.2, 0.2])
        if kind == "picture":
            size = SIZES[index % len(SIZES)]
            requests.append((kind, 200, (picture(photo(*size, seed=index % 40)), f"Number {index}?")))
        elif kind == "text":
            requests.append((kind, 200, (f"Number {index}?",)))
        else:
            requests.append((kind, 400, bad[index % len(bad)]))

    directory = write_checkpoint(scratch / "tiny")
    limits = ["--limit-mm-per-prompt", '{"image": 2}', "--max-model-len", "4096"]
    with serve(directory, scratch, "--dtype", "float32", "--enforce-eager", *limits) as server:
        start = time.perf_counter()
        with ThreadPoolExecutor(concurrent) as pool:
            answers = list(pool.map(lambda request: server.chat(*request[2], return_token_ids=True), requests))
        seconds = time.perf_counter() - start
        alive = server.alive()
        # the same questions one at a time: load must not have changed an answer
        sample = [index for index, request in enumerate(requests) if request[1] == 200][::20]
        changed = sum(
            server.chat(*requests[index][2], return_token_ids=True)[1]["choices"][0]["token_ids"]
            != answers[index][1]["choices"][0]["token_ids"]
            for index in sample
        )
    wrong = [
        (kind, wanted, status)
        for (kind, wanted, _), (status, _) in zip(requests, answers, strict=True)
        if status != wanted
    ]
    if wrong or changed or not alive or len(answers) != total:
        raise RuntimeError(f"alive: {alive}; answers that changed: {changed}; wrong statuses: {wrong}")
    kinds = {kind: sum(request[0] == kind for request in requests) for kind in ("picture", "text", "bad")}
    return {"requests": total, **kinds, "seconds": seconds, "requests_per_second": total / seconds, "alive": alive}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8, help="requests for each figure")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--load-only", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    report = {"vllm": " ".join(installed() or ("none",)), "torch": torch.__version__, "machine": platform.processor()}
    with tempfile.TemporaryDirectory() as scratch:
        if not arguments.load_only:
            report["speed"] = speed(Path(scratch), arguments.requests)
            print(f"{'':34}{'requests/s':>12}{'first token, median s':>24}{'worst s':>10}")
            for name, row in report["speed"].items():
                rate, median, worst = row.values()
                print(f"{name:34}{rate:12.2f}{median:24.2f}{worst:10.2f}")
        if not arguments.speed_only:
            report["load"] = load(Path(scratch))
            print("load:", ", ".join(f"{key} {value:.4g}" for key, value in report["load"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
