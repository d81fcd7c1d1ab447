"""Runs the requests of a JSON file through an offline vLLM engine; a script, since an engine wants a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def request(job: dict) -> dict:
    prompt = {"prompt_token_ids": job["ids"]} if "ids" in job else {"prompt": job["text"]}
    images = [Image.open(path).convert("RGB") for path in job["images"]]
    if job.get("numpy"):
        images = [np.array(image) for image in images]
    if images:
        prompt["multi_modal_data"] = {"image": images}
    return prompt


def main() -> None:
    spec_file = Path(sys.argv[1])
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    settings = {"dtype": "float32", "max_model_len": 4096, "limit_mm_per_prompt": {"image": 4}, "seed": 0}
    llm = LLM(model=spec["model"], **{**settings, **spec["engine"]})
    greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    results = []
    for batch in spec["jobs"]:
        adapters = [LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None for job in batch]
        outputs = llm.generate([request(job) for job in batch], greedy, lora_request=adapters)
        results.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        step[token].logprob
                        for step, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
                    ],
                    "prompt_tokens": len(output.prompt_token_ids),
                }
                for output in outputs
            ]
        )
    (spec_file.parent / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
