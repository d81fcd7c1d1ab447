"""vLLM's own SigLIP tower on vlmkern's attention."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch


@pytest.fixture(scope="module")
def siglip():
    """build() is a SigLIP tower of two blocks with heads of 72, of the same weights every time."""
    import socket

    from transformers import SiglipVisionConfig
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.models.siglip import SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=144, intermediate_size=200, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )

    def build():
        with set_current_vllm_config(VllmConfig()):
            model = SiglipVisionModel(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        for module in model.modules():
            # what vLLM's loader does once weights are there
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        return model.eval()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel()
        yield build
        destroy_model_parallel()
        destroy_distributed_environment()


@contextlib.contextmanager
def overridden(present=None):
    """Models built inside use our attention (or the class `present` that was there first)."""
    from vllm.model_executor.custom_op import op_registry_oot

    from vlmkern.integrations.vllm.attention import install

    op_registry_oot.pop("MMEncoderAttention", None)
    try:
        if present is not None:
            op_registry_oot["MMEncoderAttention"] = present
        install()
        install()
        yield op_registry_oot["MMEncoderAttention"]
    finally:
        op_registry_oot.pop("MMEncoderAttention", None)


@pytest.fixture
def calls(monkeypatch):
    """Shapes that reached vlmkern's attention."""
    from vlmkern.integrations.vllm import attention

    seen, real = [], attention.ops.attention

    def spy(q, k, v, **kwargs):
        seen.append(tuple(q.shape))
        return real(q, k, v, **kwargs)

    monkeypatch.setattr(attention.ops, "attention", spy)
    return seen


@torch.no_grad()
def test_a_siglip_tower_gives_the_same_through_our_kernel(siglip, calls):
    pixels = torch.randn(3, 3, 56, 56)
    theirs = siglip()
    expected = theirs(pixels)
    assert calls == []
    with overridden() as ours:
        model = siglip()
    used = [module for module in model.modules() if isinstance(module, ours)]
    assert len(used) == 2
    torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)
    assert calls == [(3, 16, 2, 72)] * 2


@pytest.mark.parametrize("case", ["packed", "grouped heads", "longer keys", "float64"])
@torch.no_grad()
def test_the_rest_is_left_to_the_replaced_class(siglip, calls, case):
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    heads, kv_heads, keys, dtype = 4, 4, 10, torch.float32
    more = {}
    if case == "packed":
        more["cu_seqlens"] = torch.tensor([0, 4, 10], dtype=torch.int32)
    elif case == "grouped heads":
        kv_heads = 2
    elif case == "longer keys":
        keys = 12
    else:
        dtype = torch.float64
    arguments = {"num_heads": heads, "head_size": 8, "num_kv_heads": kv_heads}
    plain = MMEncoderAttention(**arguments)
    with overridden():
        ours = MMEncoderAttention(**arguments)
    assert type(ours) is not type(plain)
    q = torch.randn(1, 10, heads, 8, dtype=dtype)
    k, v = (torch.randn(1, keys, kv_heads, 8, dtype=dtype) for _ in range(2))
    torch.testing.assert_close(ours(q, k, v, **more), plain(q, k, v, **more))
    assert calls == []


def test_whoever_was_first_stays(siglip, caplog):
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    class Other(MMEncoderAttention):
        pass

    with caplog.at_level(logging.WARNING, logger="vllm.vlmkern"):
        logging.getLogger("vllm").propagate, before = True, logging.getLogger("vllm").propagate
        with overridden(present=Other) as kept:
            assert kept is Other
        logging.getLogger("vllm").propagate = before
    assert "Other already, which is kept" in caplog.text


@pytest.mark.parametrize("value", ["1", "0", None])
def test_the_variable_decides_and_registering_twice_does_no_harm(monkeypatch, value):
    from vllm.model_executor.custom_op import op_registry_oot

    from vlmkern.integrations.vllm import register
    from vlmkern.integrations.vllm.attention import VlmkernEncoderAttention

    monkeypatch.delenv("VLMKERN_VLLM_ATTENTION", raising=False)
    if value is not None:
        monkeypatch.setenv("VLMKERN_VLLM_ATTENTION", value)
    try:
        register()
        register()
        expected = VlmkernEncoderAttention if value == "1" else None
        assert op_registry_oot.get("MMEncoderAttention") is expected
    finally:
        op_registry_oot.pop("MMEncoderAttention", None)
