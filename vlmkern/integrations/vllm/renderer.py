"""Prompts as jina-vlm was trained on them: every one starts with the BOS id."""

from __future__ import annotations

from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import TokenizeParams


class JinaVLMRenderer(HfRenderer):
    """Tokenises as vLLM does for any model, then puts the BOS id in front where it is not there yet.

    Neither the tokenizer nor the chat template does so: the model's own processor adds the id after tokenising.
    Prompts that come as ids are taken as they are.
    """

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        tokens = super()._tokenize_prompt(prompt, params)
        ids, bos = tokens["prompt_token_ids"], self.model_config.hf_config.bos_token_id
        if ids[:1] != [bos]:
            tokens["prompt_token_ids"] = [bos, *ids]
            if "prompt_token_offsets" in tokens:
                tokens["prompt_token_offsets"] = [(0, 0), *tokens["prompt_token_offsets"]]
        return tokens
