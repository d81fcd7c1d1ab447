"""The package as Hugging Face's `kernels` library loads it: a folder, under a name of its own, layers into models."""

import inspect
import os

import pytest
import torch
from torch import nn

from vlmkern import layers, ops
from vlmkern.integrations.kernels import variant_name, write_repository

os.environ["HF_HUB_OFFLINE"] = "1"
kernels = pytest.importorskip("kernels")

LAYERS = [layers.SelfAttention, layers.GeluTanhMLP, layers.SwiGLUMLP, layers.RMSNorm]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("repository")
    assert write_repository(path).name == variant_name()
    return path


@kernels.use_kernel_forward_from_hub("TestSwiGLU")
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(12, 20, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@kernels.use_kernel_forward_from_hub("TestAttention")
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(12, 12) for _ in range(4))
        self.num_heads, self.scale = 2, 0.3

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        q, k, v = (
            p(hidden_states).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=self.scale)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x, mask=None):
        return self.mlp(x + self.attention(x, attention_mask=mask)[0])


def test_loads_beside_the_installed_package(repository):
    kernel = kernels.get_local_kernel(repository)
    assert kernel.ops is not ops and kernel.backends().keys() == {"reference", "native", "triton"}
    x = torch.randn(1, 5, 2, 8)
    assert torch.equal(kernel.ops.attention(x, x, x), ops.attention(x, x, x))
    with kernel.use_backend("native"):
        assert torch.equal(kernel.ops.attention(x, x, x), ops.attention(x, x, x))


@pytest.mark.parametrize("mode", ["inference", "training", "compile"])
def test_kernelize(repository, mode):
    model, x = Model(), torch.randn(2, 5, 12)
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask |= torch.eye(5, dtype=torch.bool)
    expected = model(x), model(x, mask)
    grads = torch.autograd.grad(expected[0].sum(), model.parameters())
    modes = {
        "inference": kernels.Mode.INFERENCE,
        "training": kernels.Mode.TRAINING,
        "compile": kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE,
    }
    with kernels.use_kernel_mapping(
        {
            name: {"cpu": kernels.LocalLayerRepository(repository, layer_name=layer)}
            for name, layer in (("TestSwiGLU", "SwiGLUMLP"), ("TestAttention", "SelfAttention"))
        }
    ):
        model = kernels.kernelize(model, mode=modes[mode], device="cpu")
    assert model.mlp.forward.__func__ is not MLP.forward and model.attention.forward.__func__ is not Attention.forward
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if mode == "compile" else model
    torch.testing.assert_close(run(x), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(x, mask), expected[1], rtol=1e-5, atol=1e-5)
    for actual, gradient in zip(torch.autograd.grad(model(x).sum(), model.parameters()), grads, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layers_are_pure(layer):
    assert layer.__init__ is nn.Module.__init__ and layer.has_backward and layer.can_torch_compile
    extra = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert extra == {"has_backward", "can_torch_compile"}


def test_gelu_layer():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    host, x = Host(), torch.randn(3, 6)
    expected = host.fc2(nn.functional.gelu(host.fc1(x), approximate="tanh"))
    torch.testing.assert_close(layers.GeluTanhMLP.forward(host, x), expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_layer():
    """With the parameters of transformers' own modules, under the names that these have there."""
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    host = qwen3.Qwen3RMSNorm(24, eps=1e-3)
    nn.init.normal_(host.weight)
    for x in (torch.randn(3, 24), torch.randn(2, 5, 3, 4, 24)[:, :, 1]):
        torch.testing.assert_close(layers.RMSNorm.forward(host, x), host(x), rtol=1e-5, atol=1e-6)


def test_no_import_names_the_package(repository):
    """Relative imports only: a copy must not reach into an installed package of another version."""
    for file in (repository / "build" / variant_name()).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "from vlmkern" not in text and "import vlmkern" not in text, file
