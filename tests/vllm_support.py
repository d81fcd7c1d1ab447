"""What the vLLM tests and bench/vllm_serving.py share: a checkpoint that vLLM can serve on CPUs, engines in processes
of their own, and a server."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import DATA, load_arrays
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# what vLLM's CPU attention takes, and the fixture's 24 is not
HEAD_DIM = 32
IMAGE_ID = 304
CASES = {"640x480": "tiny378_640x480.png", "64x64": "tiny378_64x64.png", "text": None}
SPECIAL = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>")
BOS = "<|endoftext|>"


def environment(ranks: int = 1, **more: str) -> dict[str, str]:
    """Variables of a process that runs vLLM on `ranks` cores."""
    fixed = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if ranks == 1 else "|".join(str(core) for core in range(ranks)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **fixed, **more}


def write_checkpoint(directory: Path, name: str = "tiny378") -> Path:
    """The fixture as a directory that vLLM serves: heads widened exactly, a tokenizer, no chat template."""
    config = json.loads((DATA / f"{name}.config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": 0, "eos_token_id": 299}
    tensors = load_file(DATA / f"{name}.safetensors")
    widen_heads(config["text_config"], tensors, HEAD_DIM)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_tokenizer(directory, config["text_config"]["vocab_size"])
    return directory


def widen_heads(text: dict[str, Any], tensors: dict[str, torch.Tensor], wide: int) -> None:
    """Rewrites a decoder, in place, to heads of `wide` columns that compute the same.

    Zeros are put behind each half of a head, since rotation pairs column j with column j + dim / 2. The rotation's
    base is raised so that the columns that were there keep their angles. The norm of queries and keys divides by
    the root of the mean over more columns: its weights shrink, and the keys' also make up for the new score scale.
    """
    attention = text["block_config"]["attn_config"]
    dim, heads, kv_heads = attention["head_dim"], attention["n_heads"], attention["n_kv_heads"]
    assert wide >= dim

    def pad(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Widens the heads along an axis of size count * dim."""
        moved = tensor.movedim(axis, -1)
        halves = moved.unflatten(-1, (-1, 2, dim // 2))
        padded = torch.nn.functional.pad(halves, (0, (wide - dim) // 2)).flatten(-3)
        return padded.movedim(-1, axis).contiguous()

    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    for name in list(tensors):
        if "language_model" not in name:
            continue
        if name.endswith("attn.qkv_w.weight"):
            tensors[name] = torch.cat([pad(part, 0) for part in tensors[name].split(sizes)])
        elif name.endswith("attn.out.weight"):
            tensors[name] = pad(tensors[name], 1)
        elif name.endswith(("attn.q_b", "attn.k_b", "attn.v_b")):
            tensors[name] = pad(tensors[name], 0)
        elif name.endswith(("attn.q_lnorm.weight", "attn.k_lnorm.weight")):
            tensors[name] = pad(tensors[name].double() * (dim / wide) ** 0.5, 0)
            if name.endswith("attn.k_lnorm.weight"):
                tensors[name] *= (wide / dim) ** 0.5
            tensors[name] = tensors[name].float()
    epsilon = attention["lnorm_config"]["eps"]
    # the norm of queries and keys has an epsilon of its own in no served model; this one is too small to be seen
    assert epsilon <= 1e-5
    attention["head_dim"] = wide
    text["rope_theta"] = text["rope_theta"] ** (wide / dim)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A tokenizer of single bytes: BOS, 256 bytes, unused ids, then the image tokens. It adds no BOS itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [BOS, *alphabet]
    entries += [f"<unused{index}>" for index in range(vocab_size - len(entries))]
    tokenizer = Tokenizer(models.BPE({entry: index for index, entry in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(entry, special=True) for entry in (BOS, *SPECIAL)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": entries[-1], "model_max_length": 40960}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def oracle_prompt(case: str) -> dict[str, Any]:
    """A stored case as a request: the picture's block of tokens back to its marker."""
    ids = load_arrays(f"tiny378_{case}")["input_ids"][0].tolist()
    if CASES[case] is None:
        return {"ids": ids, "images": []}
    first, last = ids.index(300), len(ids) - 1 - ids[::-1].index(301)
    return {"ids": [*ids[:first], IMAGE_ID, *ids[last + 1 :]], "images": [str(DATA / CASES[case])]}


def oracle_tokens(case: str) -> list[int]:
    """The eight greedy tokens of a stored case."""
    return load_arrays(f"tiny378_{case}")["greedy_tokens"][0].tolist()


@contextlib.contextmanager
def process(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, all of which is gone at the end; what it prints is in `log`."""
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            yield child
        finally:
            _end_group(child)


def _end_group(child: subprocess.Popen) -> None:
    for sign, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            child.poll()
            try:
                os.killpg(child.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def run_engine(
    directory: Path, jobs: list[list[dict]], scratch: Path, engine: dict[str, Any], ranks: int = 1, **env: str
) -> list[list[dict]]:
    """Runs batches of requests through an offline engine in a process of its own.

    Args:
        jobs: batches, one after the other, of {"ids" or "text", "images": paths, optional "numpy": true}.
        engine: arguments of `vllm.LLM`.

    Returns:
        For each request {"tokens", "logprobs" (of those tokens), "prompt_tokens"}.
    """
    spec, log = scratch / "spec.json", scratch / "engine.log"
    spec.write_text(json.dumps({"model": str(directory), "engine": engine, "jobs": jobs}), encoding="utf-8")
    script = Path(__file__).parent / "vllm" / "engine.py"
    with process([sys.executable, str(script), str(spec)], log, environment(ranks, **env)) as child:
        status = child.wait(timeout=280)
    assert status == 0, f"engine ended with {status}:\n{log.read_text(encoding='utf-8')[-6000:]}"
    return json.loads((scratch / "results.json").read_text(encoding="utf-8"))


class Server:
    """vLLM's OpenAI-compatible server, reached over HTTP."""

    def __init__(self, port: int, child: subprocess.Popen, log: Path) -> None:
        self.port, self.child, self.log = port, child, log

    def post(self, path: str, body: dict[str, Any], timeout: float = 120) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            try:
                return response.status, json.loads(text)
            except ValueError:
                return response.status, {"text": text}
        finally:
            connection.close()

    def chat(self, *parts: dict | str, **more: Any) -> tuple[int, dict[str, Any]]:
        """One user turn of text and pictures, answered greedily with eight tokens."""
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        body = {"model": "jina-vlm", "messages": [{"role": "user", "content": content}]}
        return self.post("/v1/chat/completions", {**body, "max_tokens": 8, "temperature": 0, **more})

    def alive(self) -> bool:
        """Whether it runs and answers."""
        if self.child.poll() is not None:
            return False
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


@contextlib.contextmanager
def serve(directory: Path, scratch: Path, *arguments: str, patience: float = 200, **env: str) -> Iterator[Server]:
    """A server of a checkpoint, until the end of the block.

    The `vllm` command asks for the version of a distribution of that name, which vllm-cpu is not: hence the module.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = scratch / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", "jina-vlm", "--host", "127.0.0.1", "--port", str(port), *arguments]
    with process(command, log, environment(**env)) as child:
        server = Server(port, child, log)
        deadline = time.monotonic() + patience
        while not server.alive():
            if child.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{log.read_text(encoding='utf-8')[-6000:]}")
            time.sleep(0.5)
        yield server


def picture(source: Image.Image | bytes | Path) -> dict[str, Any]:
    """An image part of a chat message, inline."""
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        source = buffer.getvalue()
    data = source if isinstance(source, bytes) else source.read_bytes()
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}
