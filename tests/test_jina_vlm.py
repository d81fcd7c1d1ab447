"""Behaviour of the jina-vlm assembly: what is computed and what is skipped, caches, batches, generation, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import load_arrays

from vlmkern.models.jina_vlm import JinaVLM, JinaVLMConfig, JinaVLMImageProcessor

N, P, M = 729, 588, 196


@pytest.fixture(scope="module")
def config():
    tiny = JinaVLMConfig.tiny()
    return dataclasses.replace(
        tiny,
        vision=dataclasses.replace(tiny.vision, hidden_size=32, num_heads=2, head_dim=16, mlp_size=48, num_layers=11),
        connector=dataclasses.replace(tiny.connector, num_heads=2, head_dim=16, mlp_size=40),
    )


@pytest.fixture(scope="module")
def model(config):
    return JinaVLM.random(config, seed=1)


@pytest.fixture
def tower_calls(model):
    """Numbers of crops that the tower was run on."""
    calls = []
    handle = model.model.vision_model.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    yield calls
    handle.remove()


def index(*kept_rows, tiles):
    """image_input_idx [1, T, M] with the given (tile, window) pairs kept, at positions 1, 2, ..."""
    idx = torch.full((1, tiles, M), -10000)
    for position, (tile, window) in enumerate(kept_rows, start=1):
        idx[0, tile, window] = position
    return idx


class TestVision:
    @torch.no_grad()
    def test_blocks_behind_the_last_feature_never_run(self, model):
        vision = model.model.vision_model
        assert vision.config.feature_slots == (8, 2)
        unused = [*vision.layers[9:], vision.post_lnorm]
        for module in unused:
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
        assert model.encode_images(torch.rand(1, 1, N, P), torch.ones(1, 1, N)).isfinite().all()

    @torch.no_grad()
    def test_dropped_windows_are_zero_and_kept_ones_unchanged(self, model):
        crops, masks = torch.rand(1, 3, N, P) * 2 - 1, torch.ones(1, 3, N)
        masks[0, -1] = -1
        idx = index((0, 0), (2, 5), (2, 195), tiles=3)
        everything = model.encode_images(crops, masks)
        some = model.encode_images(crops, masks, idx)
        kept = idx >= 0
        torch.testing.assert_close(some[kept], everything[kept], rtol=1e-5, atol=1e-5)
        assert some[~kept].abs().max() == 0

    @torch.no_grad()
    def test_crops_without_kept_windows_are_not_run(self, model, tower_calls):
        crops, masks = torch.rand(1, 3, N, P) * 2 - 1, torch.ones(1, 3, N)
        model.encode_images(crops, masks, index((0, 3), (2, 5), tiles=3))
        assert sum(tower_calls) == 2

    @torch.no_grad()
    def test_the_tower_runs_once_for_thumbnail_and_tile_of_a_small_image(self, model, tower_calls):
        inputs = JinaVLMImageProcessor().preprocess(torch.randint(0, 256, (60, 50, 3), dtype=torch.uint8).numpy())
        crops, masks = inputs.crops[None], inputs.image_masks[None]
        out = model.encode_images(crops, masks, inputs.image_input_idx[None])
        assert sum(tower_calls) == 1
        pixel = crops[0, 1, 0, 0].item()
        crops[0, 1, 0, 0] = pixel + 1e-6
        apart = model.encode_images(crops, masks, inputs.image_input_idx[None])
        assert sum(tower_calls) == 3
        torch.testing.assert_close(out, apart, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_blank_crops_give_the_same_rows_whatever_the_tower_makes_of_them(self, model):
        crops, masks = torch.full((1, 1, N, P), -1.0), torch.ones(1, 1, N)
        rows = model.encode_images(crops, masks)
        # all windows hold zero slots only, but for pad_embed, which mask 1 leaves out
        torch.testing.assert_close(rows, rows[:, :, :1].expand_as(rows))

    @torch.no_grad()
    def test_no_images(self, model):
        out = model.encode_images(
            torch.empty(0, 2, N, P), torch.empty(0, 2, N), torch.empty(0, 2, M, dtype=torch.int64)
        )
        assert out.shape == (0, 2, M, model.config.text.hidden_size)
        out = model.encode_images(torch.rand(1, 1, N, P), torch.ones(1, 1, N), index(tiles=1))
        assert out.shape == (1, 1, M, model.config.text.hidden_size) and out.abs().max() == 0

    def test_gradients_reach_the_tower(self, config):
        model = JinaVLM.random(config)
        idx = index((0, 0), (0, 7), tiles=1)
        ids = torch.randint(0, 500, (1, 6))
        model(ids, torch.rand(1, 1, N, P), torch.ones(1, 1, N), idx).square().mean().backward()
        vision = model.model.vision_model
        assert vision.layers[0].attn.qkv_w.weight.grad.abs().max() > 0
        assert vision.layers[9].attn.qkv_w.weight.grad is None


class TestDecoder:
    @torch.no_grad()
    def test_chunked_prefill_and_decode_equal_one_pass(self, model):
        ids = torch.randint(0, 500, (2, 11))
        expected = model(ids)
        cache = model.new_cache(2, 11)
        pieces = [model(ids[:, start:end], cache=cache) for start, end in ((0, 4), (4, 5), (5, 9), (9, 10), (10, 11))]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)
        assert cache.length == 11

    @torch.no_grad()
    def test_padding_changes_nothing(self, model):
        ids = torch.randint(0, 500, (1, 7))
        padded = torch.cat([torch.full((1, 3), -1), ids], 1)
        logits = model(padded)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[:, 3:], model(ids), rtol=1e-4, atol=1e-4)
        masked = model(torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1), attention_mask=padded != -1)
        torch.testing.assert_close(masked[:, 3:], logits[:, 3:])

    @torch.no_grad()
    def test_extended_ids_read_the_second_table(self, model):
        embedding = model.model.language_model.embedding
        base = model.config.text.vocab_size
        ids = torch.tensor([0, base - 1, base, base + 3])
        expected = torch.cat([embedding.embedding[[0, -1]], embedding.new_embedding[[0, 3]]])
        assert torch.equal(embedding(ids), expected)

    def test_cache_holds_grouped_heads_only(self, model):
        text = model.config.text
        cache = model.new_cache(3, 50)
        assert cache.nbytes == 2 * text.num_layers * 3 * text.num_kv_heads * 50 * text.head_dim * 4

    def test_logits_cover_the_base_vocabulary(self, model):
        assert model(torch.tensor([[1, 2]])).shape == (1, 2, model.config.text.vocab_size)


class TestMerge:
    @torch.no_grad()
    def test_rows_are_added_to_the_tokens_own_embeddings(self, model):
        ids = torch.randint(0, 500, (1, 6))
        idx = index((0, 4), (0, 9), tiles=1)
        crops, masks = torch.rand(1, 1, N, P), torch.ones(1, 1, N)
        seen = []
        handle = model.model.language_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(ids, crops, masks, idx)
        handle.remove()
        expected = model.model.language_model.embedding(ids).clone()
        rows = model.encode_images(crops, masks)
        expected[0, 1] += rows[0, 0, 4]
        expected[0, 2] += rows[0, 0, 9]
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_each_image_goes_to_its_own_sequence(self, model):
        ids = torch.randint(0, 500, (2, 6))
        idx = torch.cat([index((0, 4), tiles=1), index((0, 4), (0, 5), tiles=1)])
        crops, masks = torch.rand(2, 1, N, P), torch.ones(2, 1, N)
        together = model(ids, crops, masks, idx)
        for b in range(2):
            alone = model(ids[b : b + 1], crops[b : b + 1], masks[b : b + 1], idx[b : b + 1])
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-4)


class TestGenerate:
    def test_batch_of_different_lengths_equals_one_by_one(self, checkpoint_dir):
        model = JinaVLM.from_pretrained(checkpoint_dir("tiny378"))
        arrays = load_arrays("tiny378_64x64")
        image = {name: arrays[name] for name in ("crops", "image_masks", "image_input_idx")}
        ids, text = arrays["input_ids"], load_arrays("tiny378_text")["input_ids"]
        pad = ids.shape[1] - text.shape[1]
        batch = torch.cat([ids, torch.cat([torch.full((1, pad), -1), text], 1)])
        padded = {
            "crops": torch.cat([image["crops"], torch.full_like(image["crops"], -1)]),
            "image_masks": torch.cat([image["image_masks"], torch.full_like(image["image_masks"], -1)]),
            "image_input_idx": torch.cat([image["image_input_idx"], torch.full_like(image["image_input_idx"], -10000)]),
        }
        together = model.generate(batch, **padded, max_new_tokens=8)
        alone = torch.cat([model.generate(ids, **image, max_new_tokens=8), model.generate(text, max_new_tokens=8)])
        assert torch.equal(together, alone)

    def test_eos_fills_the_row_and_ends_early(self, model):
        ids = torch.randint(0, 500, (3, 5))
        free = model.generate(ids, max_new_tokens=12)
        eos = free[0, 2].item()
        stopped = model.generate(ids, max_new_tokens=12, eos_token_id=eos)
        for row, full in zip(stopped, free, strict=True):
            hits = (full == eos).nonzero()
            end = hits[0, 0].item() if len(hits) else len(row)
            assert torch.equal(row[: end + 1], full[: end + 1][: len(row)])
            assert (row[end:] == eos).all()
        one = model.generate(ids[:1], max_new_tokens=12, eos_token_id=[eos, 9999])
        assert one.shape[1] == (free[0] == eos).nonzero()[0, 0] + 1

    def test_nothing_to_do(self, model):
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=0).shape == (1, 0)
        assert model.generate(torch.empty(0, 4, dtype=torch.int64), max_new_tokens=3).shape == (0, 0)

    def test_bfloat16(self, config):
        model = JinaVLM.random(config, dtype=torch.bfloat16)
        idx = index((0, 4), (0, 9), tiles=1)
        new = model.generate(
            torch.randint(0, 500, (1, 6)), torch.rand(1, 1, N, P), torch.ones(1, 1, N), idx, max_new_tokens=3
        )
        assert new.shape == (1, 3)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_errors(model, call):
    run = model if call == "forward" else lambda *a, **k: model.generate(*a, **k, max_new_tokens=2)
    ids = torch.tensor([[1, 2, 3]])
    crops, masks, idx = torch.rand(1, 1, N, P), torch.ones(1, 1, N), index((0, 4), tiles=1)
    limit = model.config.text.vocab_size + model.config.text.additional_vocab_size
    cases = [
        ((ids[0],), {}, r"input_ids: got torch.int64 of shape \[3\]"),
        ((ids.float(),), {}, "input_ids: got torch.float32"),
        ((ids + limit,), {}, "input_ids: got ids from"),
        ((ids - 9,), {}, "input_ids: got ids from -8"),
        ((ids,), {"attention_mask": torch.ones(1, 2)}, r"attention_mask: got shape \[1, 2\]"),
        ((ids, crops), {}, "image_masks: got None"),
        ((ids, crops[..., :5], masks, idx), {}, r"crops: got shape \[1, 1, 729, 5\]"),
        ((ids, crops, masks[:, :, :5], idx), {}, r"image_masks: got shape \[1, 1, 5\]"),
        ((ids, crops, masks, idx[..., :5]), {}, r"image_input_idx: got shape \[1, 1, 5\]"),
        (
            (ids, crops, masks, idx + 7),
            {},
            "image_input_idx: got an index of 8, expected below the prompt's length, 3",
        ),
        ((torch.cat([ids, ids]), crops, masks, idx), {}, "crops: got a batch of 1, expected 2"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            run(*arguments, **options)


def test_generate_errors(model):
    for mask in ([[1, 1, 0]], [[1, 0, 1]]):
        with pytest.raises(ValueError, match="attention_mask: got padding"):
            model.generate(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor(mask))
    with pytest.raises(ValueError, match="without tokens"):
        model.generate(torch.tensor([[-1, -1], [1, 2]]))
    with pytest.raises(ValueError, match="without tokens"):
        model.generate(torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_new_tokens: got 3 prompt"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40960)
    with pytest.raises(ValueError, match="max_new_tokens: got -1"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=-1)


def test_full_cache_raises(model):
    cache = model.new_cache(1, 3)
    model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match=r"cache: got 2 \+ 2 tokens, expected at most max_len = 3"):
        model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="input_ids: got a batch of 2, expected 1"):
        model(torch.tensor([[1], [2]]), cache=model.new_cache(1, 3))


def test_random_weights_depend_on_the_seed_only(config):
    first, again, other = (JinaVLM.random(config, seed=s).state_dict() for s in (3, 3, 4))
    low = JinaVLM.random(config, seed=3, dtype=torch.bfloat16).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and tensor.isfinite().all()
        assert torch.equal(low[name], tensor.bfloat16())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["model.language_model.layers.0.attn.q_b"].abs().max() == 0
    assert not torch.equal(
        first["model.vision_model.layers.0.attn.out.weight"],
        first["model.vision_model.layers.1.attn.out.weight"],
    )


def test_released_inventory():
    """Names and sizes of the released checkpoint: 705 tensors, 2,481,141,616 parameters."""
    with torch.device("meta"):
        state = JinaVLM().state_dict()
    assert len(state) == 705 and sum(t.numel() for t in state.values()) == 2_481_141_616
    for name, shape in {
        "model.vision_model.patch_embed.proj.weight": (1152, 588),
        "model.vision_model.pos_embed": (729, 1152),
        "model.vision_model.layers.26.attn.qkv_w.weight": (3456, 1152),
        "model.vision_model.vl_connector.pad_embed": (2, 2304),
        "model.vision_model.vl_connector.pooling.kv_w.weight": (2304, 2304),
        "model.vision_model.vl_connector.projector.up.weight": (12288, 1152),
        "model.language_model.embedding.new_embedding": (128, 2048),
        "model.language_model.layers.27.attn.qkv_w.weight": (4096, 2048),
        "model.language_model.layers.27.attn.k_lnorm.weight": (128,),
        "lm_head.weight": (151936, 2048),
    }.items():
        assert tuple(state[name].shape) == shape
