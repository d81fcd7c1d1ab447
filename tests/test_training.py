"""Training a jina-vlm through the ops: convergence, frozen parts, memory kept for the backward, the paper's rates."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmkern import use_backend
from vlmkern.examples import colours
from vlmkern.models.jina_vlm import JinaVLM
from vlmkern.models.jina_vlm.training import FINAL, PAPER, learning_rate_factor, make_optimizer, parameter_groups
from vlmkern.nn import VisionLanguageConnector


def trained(backend, steps=80, **options):
    model = JinaVLM.random(colours.tiny_config(), seed=0)
    with use_backend(backend):
        losses = colours.train(model, steps, **options)
    return model, losses


@pytest.fixture(scope="module")
def reference():
    return trained("reference")[1]


def test_learns_what_the_reference_learns(reference):
    model, losses = trained("auto")
    assert losses[0] > 2 and losses[-1] < 0.1
    # float32 sums in another order: the curves part by rounding, which training amplifies
    for ours, theirs in zip(losses, reference, strict=True):
        assert abs(ours - theirs) <= 2e-3 + 0.01 * theirs
    assert colours.accuracy(model, seed=1) == 1.0


def test_learns_in_mixed_precision(reference):
    model, losses = trained("auto", autocast=True)
    assert losses[-1] < 0.1
    assert abs(sum(losses) - sum(reference)) <= 0.15 * sum(reference)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_frozen_tower():
    inputs, answers = next(colours.make_batches(0))
    whole = JinaVLM.random(colours.tiny_config(), seed=0)
    frozen = JinaVLM.random(colours.tiny_config(), seed=0)
    for name, parameter in frozen.model.vision_model.named_parameters():
        parameter.requires_grad_("vl_connector" in name)
    for model in (whole, frozen):
        F.cross_entropy(model(**inputs)[:, -3:-1].flatten(0, 1), answers.flatten()).backward()
    for (name, expected), (_, actual) in zip(whole.named_parameters(), frozen.named_parameters(), strict=True):
        if actual.requires_grad and expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert actual.grad is None
    assert parameter_groups(frozen)["tower"] == [] and parameter_groups(whole)["tower"]
    assert [group["name"] for group in make_optimizer(frozen, 10)[0].param_groups] == ["connector", "decoder"]


class EagerConnector(nn.Module):
    """The connector as eager code has it, on the parameters of ours."""

    def __init__(self, connector):
        super().__init__()
        self.connector = connector

    def forward(self, features, mask):
        pool, projector = self.connector.pooling, self.connector.projector
        x = torch.cat(features, dim=-1)
        x = x + self.connector.pad_embed[1] * (mask < 1).unsqueeze(-1)
        x = F.pad(x.unflatten(1, pool.grid), (0, 0, 0, 1, 0, 1))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        q = F.linear(x.mean(1, keepdim=True), pool.q_w.weight, pool.q_b)
        k, v = F.linear(x, pool.kv_w.weight, torch.cat([pool.k_b, pool.v_b])).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        pooled = pool.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
        value, gate = projector.up(pooled).chunk(2, dim=-1)
        return projector.down(F.silu(gate) * value).unflatten(0, (len(mask), -1))


def test_connector_keeps_at_most_half_of_what_eager_keeps():
    # bytes at 13 crops follow from those at 2: everything is linear in crops
    connector = VisionLanguageConnector(
        2304, num_heads=16, head_dim=72, pooled_size=1152, mlp_size=6144, output_size=2048, grid=(27, 27)
    ).to(torch.bfloat16)
    for parameter in connector.parameters():
        nn.init.normal_(parameter, std=0.02)
    features = [torch.randn(2, 729, 1152, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    mask = torch.ones(2, 729)
    mask[1] = -1
    own = {t.untyped_storage().data_ptr() for t in (*connector.parameters(), *features)}

    def kept(module):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(features, mask)
        return sum(size for pointer, (size, _) in storages.items() if pointer not in own), out

    ours, actual = kept(connector)
    eager, expected = kept(EagerConnector(connector))
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()
    assert ours <= eager / 2, f"{ours} bytes against {eager}"


def test_rates_are_the_papers():
    model = JinaVLM.random(colours.tiny_config(), seed=0)
    groups = parameter_groups(model)
    listed = [id(p) for group in groups.values() for p in group]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    optimizer, schedule = make_optimizer(model, steps=200)
    assert [(g["name"], g["betas"]) for g in optimizer.param_groups] == [(name, (0.9, 0.95)) for name in PAPER]
    rates = []
    for _ in range(200):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for column, pace, rising in zip(zip(*rates, strict=True), PAPER.values(), (20, 2, 20), strict=True):
        assert column[0] == pytest.approx(pace.peak / rising)
        assert max(column) == column[rising - 1] == pytest.approx(pace.peak)
        assert column[-1] == pytest.approx(FINAL * pace.peak)
        middle = rising + (199 - rising) / 2
        expected = (column[math.floor(middle)] + column[math.ceil(middle)]) / 2
        assert expected == pytest.approx(pace.peak * (1 + FINAL) / 2, rel=1e-3)
    assert learning_rate_factor(500, 200, 0.1) == pytest.approx(FINAL)


def test_recipe_says_what_is_wrong():
    model = JinaVLM.random(colours.tiny_config(), seed=0)
    with pytest.raises(ValueError, match="steps: got 0"):
        make_optimizer(model, 0)
    with pytest.raises(ValueError, match="expected one for connector"):
        make_optimizer(model, 10, {"tower": PAPER["tower"]})
    with pytest.raises(ValueError, match="warm-up of 2"):
        make_optimizer(model, 10, PAPER | {"decoder": PAPER["decoder"]._replace(warmup=2)})
    with pytest.raises(ValueError, match="all frozen"):
        make_optimizer(model.requires_grad_(False), 10)


def no_windows(config, tiles):
    """Inputs of a text whose picture is padding: every crop blank, every window dropped."""
    vision = config.vision
    return {
        "input_ids": torch.tensor([[1, 2, 3, 4]]),
        "crops": torch.full((1, tiles, vision.num_patches, vision.patch_dim), -1.0),
        "image_masks": torch.full((1, tiles, vision.num_patches), -1.0),
        "image_input_idx": torch.full((1, tiles, config.windows_per_crop), -10_000),
    }


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("tiles", [0, 1, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_batch_without_windows_trains_the_decoder_as_its_text_alone(backend, tiles, autocast):
    config = colours.tiny_config()
    padded, plain = JinaVLM.random(config), JinaVLM.random(config)
    inputs = no_windows(config, tiles)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = [padded(**inputs).square().mean(), plain(inputs["input_ids"]).square().mean()]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, actual), (_, expected) in zip(padded.named_parameters(), plain.named_parameters(), strict=True):
        if "vision_model" not in name:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=0, msg=name)
        elif "post_lnorm" not in name:
            # zeros and not None: processes that train together wait for every parameter's gradient
            assert actual.grad.abs().max() == 0, name
    optimizer, _ = make_optimizer(padded, 1)
    optimizer.step()
    assert all(p.isfinite().all() for p in padded.parameters())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("indexed", [False, True])
def test_gradients_of_no_tiles(backend, indexed):
    config = colours.tiny_config()
    model, inputs = JinaVLM.random(config), no_windows(config, 0)
    with use_backend(backend):
        rows = model.encode_images(
            inputs["crops"], inputs["image_masks"], inputs["image_input_idx"] if indexed else None
        )
        assert rows.shape == (1, 0, config.windows_per_crop, config.text.hidden_size)
        rows.sum().backward()
    assert all(p.grad.abs().max() == 0 for p in model.model.vision_model.vl_connector.parameters())


def test_a_sequence_without_windows_beside_one_with_a_picture():
    config = colours.tiny_config()
    alone, both = JinaVLM.random(config), JinaVLM.random(config)
    picture = no_windows(config, 2)
    picture["crops"] = torch.rand(picture["crops"].shape)
    picture["image_masks"] = torch.ones_like(picture["image_masks"])
    picture["image_input_idx"][0, 1, :2] = torch.tensor([1, 2])
    blank = no_windows(config, 2)
    alone(**picture).square().sum().backward()
    both(**{name: torch.cat([picture[name], blank[name]]) for name in picture})[0].square().sum().backward()
    for (name, actual), (_, expected) in zip(both.named_parameters(), alone.named_parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
