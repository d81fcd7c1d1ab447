"""Copies of weights: only where they were asked for, and never stale."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import vlmkern
from vlmkern import ops, packing
from vlmkern.nn import AttentionPool, SwiGLUMLP

pytestmark = pytest.mark.skipif(not vlmkern.backends()["native"]["available"], reason="no native backend")

ROWS = 12  # more than the kernel for a few rows takes


class Linear(nn.Linear):
    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)


def exact(layer, x):
    return (x.double() @ layer.weight.double().T + layer.bias.double()).float()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


CHANGES = {
    "a column through data": lambda w: w.data[:, 1:].zero_(),
    "one element through data": lambda w: w.data[3, 5].add_(100),
    "a numpy alias": lambda w: w.detach().numpy().__setitem__((slice(None), 7), 3.0),
    "another thread's view": lambda w: w.detach().view(-1)[17:40].fill_(2.0),
}
SEEN = {
    "in place": lambda w: w.detach()[3, 5].add_(100),
    "in inference mode": lambda w: torch.inference_mode()(lambda: w.mul_(2))(),
    "copy_": lambda w: torch.no_grad()(lambda: w.copy_(torch.randn_like(w)))(),
    "data = new": lambda w: setattr(w, "data", torch.randn_like(w)),
    "data = new, twice": lambda w: [setattr(w, "data", torch.randn(32, 64)) for _ in range(2)],
    "set_": lambda w: torch.no_grad()(lambda: w.set_(torch.randn(32, 64)))(),
}


@pytest.mark.parametrize("change", [*CHANGES, *SEEN])
def test_a_bare_op_reads_its_arguments(change):
    layer, x = Linear(64, 32), torch.randn(ROWS, 64)
    for _ in range(3):
        first = layer(x).detach().clone()
    (CHANGES | SEEN)[change](layer.weight)
    for _ in range(3):
        close(layer(x), exact(layer, x))
    assert not torch.allclose(layer(x), first)


@pytest.mark.parametrize("change", SEEN)
def test_copies_follow_what_torch_sees(change):
    layer, x = Linear(64, 32).requires_grad_(False), torch.randn(ROWS, 64)
    report = vlmkern.pack(layer)
    for _ in range(3):
        close(layer(x), exact(layer, x))
    assert report.bytes >= layer.weight.nbytes
    SEEN[change](layer.weight)
    for _ in range(3):
        close(layer(x), exact(layer, x))


def test_an_optimizers_step():
    layer, x = Linear(64, 32), torch.randn(ROWS, 64)
    vlmkern.pack(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        close(layer(x), exact(layer, x))


def test_load_state_dict_functional_call_and_deepcopy():
    layer, other, x = Linear(64, 32), Linear(64, 32), torch.randn(ROWS, 64)
    vlmkern.pack(layer)
    layer(x)
    close(torch.func.functional_call(layer, dict(other.named_parameters()), (x,)), exact(other, x))
    close(layer(x), exact(layer, x))
    clone = copy.deepcopy(layer)
    clone.weight.data.zero_()
    close(clone(x), exact(clone, x))
    layer.load_state_dict(other.state_dict())
    close(layer(x), exact(other, x))


def test_packing_again_takes_what_torch_did_not_see():
    layer, x = Linear(64, 32).requires_grad_(False), torch.randn(ROWS, 64)
    vlmkern.pack(layer)
    layer(x)
    layer.weight.data[:, 1:] = 0
    vlmkern.pack(layer)
    close(layer(x), exact(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_how_often_a_module_was_called(dtype):
    pool = AttentionPool(32, 1, 16, 16, value_dim=32, grid=(5, 5), bias=False).to(dtype)
    mlp = SwiGLUMLP(64, 96, 32).to(dtype)
    features, x = list(torch.randn(2, 2, 25, 16).to(dtype)), torch.randn(ROWS, 64).to(dtype)
    for packed in (False, True):
        if packed:
            vlmkern.pack(pool)
            vlmkern.pack(mlp)
        with torch.no_grad():
            pooled, projected = [pool(features) for _ in range(4)], [mlp(x) for _ in range(4)]
        assert all(torch.equal(y, pooled[0]) for y in pooled)
        assert all(torch.equal(y, projected[0]) for y in projected)


def test_one_head_folds_its_weights():
    pool = AttentionPool(32, 1, 16, 16, value_dim=32, grid=(5, 5), bias=False).requires_grad_(False)
    features = list(torch.randn(2, 2, 25, 16))
    report = vlmkern.pack(pool)

    def check():
        with vlmkern.use_backend("reference"):
            expected = pool(features)
        close(pool(features), expected)

    check()
    folded = report.bytes
    assert folded >= 4 * (32 * 32 + 16 * 32)
    # a change of any of the weights is seen
    for parameter in pool.parameters():
        parameter.mul_(1.5)
        check()
        check()
    assert report.bytes == folded


def test_report_and_release():
    layer = Linear(64, 32)
    before = len(packing._copies)
    report = vlmkern.pack(nn.ModuleDict({"a": layer, "b": nn.Linear(4, 4, dtype=torch.float64)}))
    assert set(report.weights) == {"a.weight", "a.bias"} and set(report.passed_over) == {"b.weight", "b.bias"}
    assert "float64" in report.passed_over["b.weight"]
    assert report.bytes == 0 and report.most_bytes == layer.weight.nbytes + layer.bias.nbytes
    layer(torch.randn(ROWS, 64))
    assert report.bytes >= layer.weight.nbytes
    assert "2 weights may be copied, 0 released, 2 passed over" in str(report)
    assert vlmkern.unpack(layer) >= layer.weight.nbytes
    assert report.bytes == 0
    layer(torch.randn(ROWS, 64))
    assert report.bytes == 0

    vlmkern.pack(layer)
    layer(torch.randn(ROWS, 64))
    del layer, report
    gc.collect()
    assert len(packing._copies) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_weights_are_there_once(dtype):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.proj = SwiGLUMLP(64, 96, 32), nn.Linear(32, 48)
            self.trained, self.tied, self.again = nn.Linear(48, 48), nn.Linear(8, 8), nn.Linear(8, 8)
            self.again.weight = self.tied.weight

        def forward(self, x):
            x = ops.linear(self.mlp(x), self.proj.weight, self.proj.bias, activation="silu")
            return ops.linear(x, self.trained.weight, self.trained.bias)

    net = Net().to(dtype).requires_grad_(False)
    net.trained.requires_grad_(True)
    before = {name: p.clone() for name, p in net.named_parameters()}
    inputs = [torch.randn(rows, 64).to(dtype) for rows in (1, 3, ROWS)]
    expected = [net(x) for x in inputs]
    report = vlmkern.pack(net, release=True)
    if packing.routes.here(dtype) != "oneDNN":
        assert not report.released
        return
    assert set(report.released) == {"mlp.up.weight", "mlp.down.weight", "proj.weight"}
    assert report.released["proj.weight"] == net.proj.weight.numel() * dtype.itemsize
    assert not set(report.released) & (set(report.weights) | set(report.passed_over))
    for _ in range(2):
        for x, y in zip(inputs, expected, strict=True):
            actual = net(x)
            assert (actual - y).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * y.abs().max()
    for refused in (
        lambda: nn.functional.linear(torch.randn(5, 32).to(dtype), net.proj.weight),
        lambda: ops.linear(torch.randn(5, 32).to(dtype).requires_grad_(), net.proj.weight).sum().backward(),
        lambda: ops.linear(torch.randn(5, 32).double(), net.proj.weight),
        lambda: ops.attention_pool(
            [inputs[0]], net.proj.weight, None, *[net.proj.weight, None] * 2, grid=(1, 1), num_heads=1
        ),
        lambda: copy.deepcopy(net),
        lambda: net.state_dict() and torch.save(net.state_dict(), "/dev/null"),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            refused()
    assert vlmkern.unpack(net) >= sum(report.released.values())
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad == name.startswith("trained")
    assert all(torch.equal(net(x), y) for x, y in zip(inputs, expected, strict=True))


def test_weights_whose_changes_are_not_seen_are_passed_over(monkeypatch):
    with torch.inference_mode():
        layer = Linear(64, 32)
    assert "inference mode" in vlmkern.pack(layer).passed_over["weight"]
    layer = Linear(64, 32)
    layer.weight = nn.Parameter(torch.randn(64, 32).T)
    assert "transposed" in vlmkern.pack(layer).passed_over["weight"]
    monkeypatch.setenv("VLMKERN_PREPACK", "0")
    assert not vlmkern.pack(Linear(64, 32)).weights


def test_bad_input():
    for function in (vlmkern.pack, vlmkern.unpack):
        with pytest.raises(TypeError, match=r"model: got NoneType, expected a torch.nn.Module"):
            function(None)
