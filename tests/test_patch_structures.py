"""`vlmkern.patch` on modules that are nobody's but torch's: as timm, open_clip and torch itself have them."""

from __future__ import annotations

import copy

import pytest
import torch
from support import low_precision_close
from test_backends import run_python
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vit_structures import DropPath, OpenClipBlock, TimmAttention, TimmBlock

import vlmkern

X = torch.randn(3, 11, 64)


class Ops(TorchDispatchMode):
    """Names of vlmkern's ops as they are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlmkern":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def patched(module):
    """A patched copy, and the module itself."""
    module.eval()
    ours = copy.deepcopy(module)
    report = vlmkern.patch(ours)
    return ours, module, report


BLOCKS = {
    "timm": lambda: TimmBlock(scale=False),
    "timm_layer_scale": TimmBlock,
    "timm_norms_of_heads": lambda: TimmBlock(norm=True),
    "timm_drop_path": lambda: TimmBlock(drop_path=0.3),
    "open_clip": OpenClipBlock,
    "open_clip_layer_scale": lambda: OpenClipBlock(scale=True),
    "open_clip_tokens_first": lambda: OpenClipBlock(batch_first=False),
}


@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
class TestBlocks:
    def test_results_and_gradients_stay(self, build):
        ours, plain, report = patched(build())
        kinds = sorted(what.split()[0] for what in report.values())
        assert kinds in (["MLP", "attention", "block"], ["MLP", "block", "nn.MultiheadAttention,"]), str(report)
        found = []
        for module in (ours, plain):
            x = X.clone().requires_grad_()
            with Ops() as calls:
                y = module(x)
            grads = torch.autograd.grad(y.square().sum(), (x, *module.parameters()))
            found.append((y, grads, calls.names))
        names = [name.removesuffix("_keep") for name in found[0][2]]
        assert names.count("attention") == 1 and names.count("linear") == 4 and not found[1][2]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
        for a, e in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, build, dtype):
        ours, plain, _ = patched(build().to(dtype))
        x = X.to(dtype)
        low_precision_close(ours(x), lambda t: copy.deepcopy(plain).to(t)(x.to(t)))

    def test_undone_to_the_bit(self, build):
        ours, plain, report = patched(build())
        assert vlmkern.unpatch(ours) == len(report)
        with Ops() as calls:
            assert torch.equal(ours(X), plain(X))
        assert not calls.names

    def test_masks_go_to_the_module(self, build):
        ours, plain, _ = patched(build())
        tokens = X.shape[1] if getattr(getattr(plain, "attn", None), "batch_first", True) else X.shape[0]
        mask = torch.zeros(tokens, tokens).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        with Ops() as calls:
            found = ours(X, attn_mask=mask)
        assert "attention" not in calls.names
        torch.testing.assert_close(found, plain(X, attn_mask=mask), rtol=1e-5, atol=1e-5)

    def test_a_pickled_copy_is_patched(self, build, tmp_path):
        ours, _, _ = patched(build())
        torch.save(ours, tmp_path / "block.pt")
        with Ops() as calls:
            found = torch.load(tmp_path / "block.pt", weights_only=False)(X)
        assert "attention" in calls.names and torch.equal(found, ours(X))


def test_paths_are_dropped_in_training():
    """By the module's own code, in both of its halves."""
    ours, plain, _ = patched(TimmBlock(drop_path=0.5))
    ours.train(), plain.train()
    torch.manual_seed(3)
    with Ops() as calls:
        found = ours(X)
    torch.manual_seed(3)
    torch.testing.assert_close(found, plain(X), rtol=1e-5, atol=1e-5)
    assert "attention" in calls.names, "the attention inside drops nothing"
    assert not torch.equal(plain(X), plain(X))


def test_modules_that_only_look_alike_are_left_alone():
    class Gated(TimmAttention):
        def forward(self, x, attn_mask=None):
            return super().forward(x, attn_mask) * x.sigmoid()

    class Rotated(TimmAttention):
        def forward(self, x, rope):
            return super().forward(x * rope)

    class Holder(DropPath):
        def __init__(self):
            super().__init__(0.1)
            self.weight = nn.Parameter(torch.ones(64))

    holding = TimmBlock()
    holding.drop_path1 = Holder()
    model = nn.ModuleDict({"gated": Gated(64, 4, False), "rotated": Rotated(64, 4, False), "holding": holding})
    report = vlmkern.patch(model.eval())
    assert set(report) == {"holding.attn", "holding.mlp"}
    assert "differs" in report.passed_over["gated"] and "rotated" in report.passed_over
    assert "Holder" in report.passed_over["holding"]


class TestMultiheadAttention:
    def pair(self, **options):
        return patched(nn.MultiheadAttention(64, 4, **options))

    @pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"batch_first": True, "bias": False}])
    def test_self_attention(self, options):
        ours, plain, report = self.pair(**options)
        assert list(report) == ["MultiheadAttention"]
        with Ops() as calls:
            found = ours(X, X, X, need_weights=False)
        expected = plain(X, X, X, need_weights=False)
        assert calls.names == ["linear", "attention", "linear"] and found[1] is None is expected[1]
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"batch_first": True, "bias": False}])
    @pytest.mark.parametrize("tokens", [1, 3, 11])
    def test_cross_attention(self, options, tokens):
        ours, plain, _ = self.pair(**options)
        x = torch.randn(3, tokens, 64) if options.get("batch_first") else torch.randn(tokens, 11, 64)
        with Ops() as calls:
            found = ours(x, X, X, need_weights=False)[0]
        assert calls.names == ["linear", "linear", "attention", "linear"]
        torch.testing.assert_close(found, plain(x, X, X, need_weights=False)[0], rtol=1e-5, atol=1e-5)

    def test_what_else_it_can_do_is_left_to_it(self):
        ours, plain, _ = self.pair(batch_first=True)
        other = torch.randn(3, 11, 64)
        padding = torch.zeros(3, 11, dtype=torch.bool)
        padding[1, 7:] = True
        calls = [
            ((X, X, X), {}),
            ((X, X, X), {"need_weights": True}),
            ((X, other, other + 1), {"need_weights": False}),
            ((X, X, X + 1), {"need_weights": False}),
            ((X, X, X), {"need_weights": False, "key_padding_mask": padding}),
            ((X[0], X[0], X[0]), {"need_weights": False}),
        ]
        for args, options in calls:
            with Ops() as seen:
                found = ours(*args, **options)
            assert not seen.names
            for a, e in zip(found, plain(*args, **options), strict=True):
                assert (a is None) == (e is None) and (a is None or torch.equal(a, e))

    def test_dropout(self):
        ours, _, _ = self.pair(batch_first=True, dropout=0.5)
        ours.train()
        with Ops() as calls:
            ours(X, X, X, need_weights=False)
        assert not calls.names

    @pytest.mark.parametrize("options", [{"kdim": 32, "vdim": 32}, {"add_bias_kv": True}, {"add_zero_attn": True}])
    def test_other_forms_are_passed_over(self, options):
        report = vlmkern.patch(nn.MultiheadAttention(64, 4, batch_first=True, **options).eval())
        assert not report and "MultiheadAttention" in report.passed_over

    def test_hooks_of_its_projection_run(self):
        ours, plain, _ = self.pair(batch_first=True)
        expected = plain(X, X, X, need_weights=False)[0]
        ours.out_proj.register_forward_hook(lambda *_: None)
        with Ops() as calls:
            found = ours(X, X, X, need_weights=False)[0]
        assert not calls.names and torch.equal(found, expected)


def test_nothing_of_transformers_is_imported():
    code = (
        "import sys, torch, vlmkern; model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(),"
        " torch.nn.Linear(16, 8)).eval(); report = vlmkern.patch(model); assert len(report) == 1, str(report);"
        " assert vlmkern.unpatch(model) == 1; assert 'transformers' not in sys.modules"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
