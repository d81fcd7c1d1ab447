"""Patched models under autocast: the dtypes that they have without the ops, and errors that are no larger."""

import copy

import pytest
import torch
from jina_remote import Vision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers_models import Calls, blocks, siglip

from vlmkern.integrations.transformers import patch
from vlmkern.nn import functional

LOW = [torch.bfloat16, torch.float16]
NOISE = 1.1


def error(values, exact):
    """Root mean square over all tensors of a list."""
    squares = sum((v.double() - e).square().sum() for v, e in zip(values, exact, strict=True))
    return (squares / sum(e.numel() for e in exact)).sqrt()


@pytest.fixture
def models():
    """A patched SigLIP, one like it that is not, the same in float64, and eight pictures."""
    plain, _ = siglip()
    model = copy.deepcopy(plain)
    patch(model)
    return model, plain, copy.deepcopy(plain).double(), torch.randn(8, 3, 42, 42)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_dtypes_and_errors(models, low):
    model, plain, wide, pixels = models
    with torch.no_grad():
        exact = wide(pixels.double(), output_hidden_states=True).hidden_states
        with torch.autocast("cpu", low):
            expected = plain(pixels, output_hidden_states=True).hidden_states
            with Calls() as calls:
                actual = model(pixels, output_hidden_states=True).hidden_states
    assert calls.names.count("attention") == 2
    assert [t.dtype for t in actual] == [t.dtype for t in expected] == [torch.float32] * len(exact)
    assert error(actual, exact) <= NOISE * error(expected, exact)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_gradients(models, low):
    model, plain, wide, pixels = models
    wide(pixels.double()).last_hidden_state.square().mean().backward()
    errors = []
    for each in (model, plain):
        each.train()
        with torch.autocast("cpu", low):
            result = each(pixels).last_hidden_state
        assert result.dtype == torch.float32
        result.square().mean().backward()
        pairs = [(p, e) for p, e in zip(each.parameters(), wide.parameters(), strict=True) if e.grad is not None]
        assert all(p.grad.dtype == torch.float32 for p, _ in pairs)
        errors.append(error([p.grad for p, _ in pairs], [e.grad for _, e in pairs]))
    assert errors[0] <= NOISE * errors[1]


@pytest.mark.parametrize("weights", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("inner", ["", "self_attn", "mlp"])
def test_each_module(models, inner, low, weights):
    model, plain, wide, _ = models
    x = torch.randn(4, 9, 48).to(weights)
    modules = [blocks(each)[0].get_submodule(inner) for each in (model, plain, wide)]
    modules[0].to(weights), modules[1].to(weights)
    # as rounded to the weights' dtype
    modules[2].load_state_dict(modules[1].state_dict())
    modules[2].double()

    def result(module, x):
        given = (x,) if inner == "mlp" else (x, None)
        out = module(*given)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        if not inner and weights not in (torch.float32, low):
            # the two halves add up to float32, which torch's layer norm does not take with weights in half
            for module in modules[:2]:
                with torch.autocast("cpu", low), pytest.raises(RuntimeError, match="mixed dtype"):
                    result(module, x)
            return
        exact = result(modules[2], x.double())
        with torch.autocast("cpu", low):
            actual, expected = (result(module, x) for module in modules[:2])
    assert actual.dtype == expected.dtype
    assert error([actual], [exact]) <= NOISE * error([expected], [exact])


def test_autocast_off_inside(models):
    model, plain, _, pixels = models
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        actual, expected = (each(pixels).last_hidden_state for each in (model, plain))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # a half that autocast left goes into a float32 layer: an error, as without the ops
    messages = []
    for each in (model, plain):
        with pytest.raises(RuntimeError) as raised:
            blocks(each)[0].mlp(torch.randn(1, 2, 48).bfloat16())
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_jina_vlm_from_remote_code(low):
    plain = Vision().eval()
    model, wide = copy.deepcopy(plain), copy.deepcopy(plain).double()
    patch(model)
    patches = torch.randn(8, 3, 15, 24)
    masks = torch.tensor([0, 1, -1, 0.5, 1]).repeat(9).view(1, 3, 15).expand(8, -1, -1)
    with torch.no_grad():
        exact = wide(patches.double(), masks.double())
        with torch.autocast("cpu", low):
            actual, expected = model(patches, masks), plain(patches, masks)
    assert actual.dtype == expected.dtype
    assert error([actual], [exact]) <= NOISE * error([expected], [exact])


@pytest.mark.parametrize("stream", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("low", [None, *LOW], ids=str)
def test_blocks_on_cuda(monkeypatch, stream, low):
    """Dtypes on a pretended device: under autocast norms are called, and a sum is left to the ops in its own dtype."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: low is not None and kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: low)
    called, summed_inside = [], []

    class Norm(nn.LayerNorm):
        def forward(self, x):
            called.append(x.dtype)
            return torch.empty_like(x, dtype=torch.float32 if low else x.dtype)

    def part(x, residual):
        """What the ops return of these: the dtype of autocast, whatever the residual has."""
        product = x.to(low or x.dtype)
        summed_inside.append(residual is not None)
        return product if residual is None else product + residual.to(product.dtype)

    with torch.no_grad(), FakeTensorMode():
        x = torch.empty(2, 5, 16, device="cuda", dtype=stream)
        norms = [Norm(16, device="cuda", dtype=stream) for _ in range(2)]
        with Calls() as calls:
            result = functional.pre_norm_block(x, norms[0], part, norms[1], part)
    if low is None:
        assert calls.names == ["add_layer_norm"] and len(called) == 1 and summed_inside == [False, True]
        assert result.dtype == stream
    else:
        assert not calls.names and len(called) == 2 and summed_inside == [stream == low] * 2
        assert result.dtype == torch.promote_types(stream, low)
