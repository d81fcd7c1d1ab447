"""`attn_implementation="vlmkern"` in transformers' decoders, against their own eager attention on random weights."""

from __future__ import annotations

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from vlmkern.integrations.transformers import masks, register  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
MODELS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 6}),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, {"sliding_window": 6}),
}


class Calls(TorchDispatchMode):
    """Counts this package's attention."""

    def __init__(self):
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.attention += function is torch.ops.vlmkern.attention.default
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=MODELS)
def model(request):
    config, build, rest = MODELS[request.param]
    register()
    torch.manual_seed(0)
    model = build(config(**SIZES, **rest)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # far from uniform attention, so that a wrong mask shows
            parameter.normal_(std=0.3 if parameter.dim() > 1 else 0.1)
    return model


def both(model, run):
    """What `run` gives with eager attention and with the op, which has to have been called in every layer."""
    model.set_attn_implementation("eager")
    expected = run()
    model.set_attn_implementation("vlmkern")
    with Calls() as calls, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not run on the op.*")
        actual = run()
    assert calls.attention >= 4
    return actual, expected


def ids(batch=2, tokens=19):
    return torch.randint(1, 97, (batch, tokens))


def close(actual, expected):
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_prefill(model):
    tokens = ids()
    close(*both(model, lambda: model(tokens).logits))


@torch.no_grad()
def test_left_padding(model):
    tokens, mask = ids(), torch.ones(2, 19, dtype=torch.long)
    tokens[1, :7] = mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    actual, expected = both(model, lambda: model(tokens, attention_mask=mask, position_ids=positions).logits)
    close(actual[mask.bool()], expected[mask.bool()])
    assert actual.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 7])
def test_generation(model, cache, padding):
    tokens, mask = ids(), torch.ones(2, 19, dtype=torch.long)
    if padding:
        tokens[1, :padding] = mask[1, :padding] = 0

    def run():
        return model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=9,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
            # compiled decoding is for another test
            disable_compile=True,
        )

    actual, expected = both(model, run)
    assert torch.equal(actual.sequences, expected.sequences)
    close(torch.stack(actual.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_chunked_prefill(model):
    tokens = ids()

    def run():
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(8, 1)]
        return torch.cat(parts, 1)

    close(*both(model, run))


def test_training(model):
    tokens, mask = ids(), torch.ones(2, 19, dtype=torch.long)
    tokens[0, :3] = mask[0, :3] = 0
    # nor does the first token count, which one of padding would have to know
    labels = tokens.clone()
    labels[0, :4] = -100
    model.train()

    def run():
        model.zero_grad()
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    close(*both(model, run))


@torch.no_grad()
def test_compiled(model):
    torch._dynamo.reset()
    tokens = ids(tokens=5)  # within every window, so that there is no mask to read
    model.set_attn_implementation("eager")
    expected = model(tokens).logits
    model.set_attn_implementation("vlmkern")
    actual = torch.compile(model, backend="aot_eager")(tokens).logits
    close(actual, expected)


def test_what_a_mask_does_not_say_goes_to_sdpa():
    register()
    config, build, _ = MODELS["llama"]
    model = build(config(**SIZES)).eval()
    # two documents in one row
    documents = torch.tensor([[0] * 9 + [1] * 10])
    mask = (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(19, 19).tril().bool()
    tokens = ids(1)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("vlmkern")
        with pytest.warns(
            UserWarning, match="LlamaAttention does not run on the op, as it has a mask of another shape"
        ):
            actual = model(tokens, attention_mask=mask).logits
    assert torch.equal(actual, expected)


class TestReading:
    @staticmethod
    def mask(queries, keys, firsts, end, window=None):
        place = torch.arange(end - queries, end)[:, None]
        key = torch.arange(keys)
        seen = (key <= place) & (key >= torch.tensor(firsts)[:, None, None])
        if window:
            seen &= key > place - window
        return seen[:, None]

    @pytest.mark.parametrize("window", [None, 4])
    @pytest.mark.parametrize(("queries", "keys", "end"), [(9, 9, 9), (4, 9, 9), (4, 20, 13), (9, 20, 9)])
    @pytest.mark.parametrize("firsts", [[0, 0], [0, 3], [2, 2]])
    def test_causal(self, window, queries, keys, end, firsts):
        seen = self.mask(queries, keys, firsts, end, window)
        hidden = torch.finfo(torch.bfloat16).min
        for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, hidden)):
            read = masks.read(mask, window)
            assert read.causal and set(read.last) == {end}
            assert read.window == (-1 if window is None else window - 1)
            rebuilt = self.mask(queries, keys, read.first, end, window)
            assert torch.equal(rebuilt, seen)

    def test_padding_alone(self):
        seen = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
        seen[0, ..., :4] = seen[1, ..., 2:7] = True
        assert masks.read(seen, None) == masks.Visible([0, 2], [4, 7], False, -1)

    def test_what_no_visible_says(self):
        causal = self.mask(9, 9, [0, 0], 9)
        prefix = causal.clone()
        prefix[..., :4] = True
        hole = causal.clone()
        hole[..., 5] = False
        shifted = self.mask(9, 12, [0, 0], 9) | self.mask(9, 12, [0, 0], 12)
        shifted[1] = self.mask(9, 12, [0, 0], 9)[1]
        wrong_window = self.mask(9, 9, [0, 0], 9, 4)
        biased = torch.zeros(2, 1, 9, 9).masked_fill(~causal, -torch.inf) + 0.5
        nothing = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
        by_head = causal.repeat(1, 3, 1, 1)
        for mask in (prefix, hole, shifted, biased, nothing, by_head, causal[0]):
            assert masks.read(mask, None) is None
        assert masks.read(wrong_window, None) is None and masks.read(wrong_window, 5) is None
        assert masks.read(causal.expand(2, 3, 9, 9), None).causal

    def test_a_mask_that_changes_is_read_again(self):
        mask = self.mask(9, 9, [0, 0], 9)
        assert masks.read(mask, None).causal
        mask[..., 5] = False
        assert masks.read(mask, None) is None
