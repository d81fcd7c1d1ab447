"""Tiny models of transformers with one input each, a count of the ops that a call of theirs runs, and comparisons."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from vlmkern.integrations.transformers import patch  # noqa: E402

TOWER = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = 3  # the id of an image token


class Calls(TorchDispatchMode):
    """Names of vlmkern's ops as they are called, and how many linear layers added a residual."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.residuals = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlmkern":
            name = func._schema.name.split("::")[1]
            self.names.append(name)
            self.residuals += name == "linear" and args[4] is not None
        return func(*args, **(kwargs or {}))


def siglip(**changes):
    config = transformers.SiglipVisionConfig(**(TOWER | {"image_size": 42} | changes))
    return transformers.SiglipVisionModel(config).eval(), {"pixel_values": torch.randn(2, 3, 42, 42)}


def siglip2():
    config = transformers.Siglip2VisionConfig(**TOWER, num_patches=9)
    inputs = {
        "pixel_values": torch.randn(2, 9, 588),
        "pixel_attention_mask": torch.ones(2, 9, dtype=torch.long),
        "spatial_shapes": torch.tensor([[3, 3], [3, 3]]),
    }
    return transformers.Siglip2VisionModel(config).eval(), inputs


def idefics2():
    config = transformers.Idefics2Config(
        vision_config=TOWER | {"image_size": 42},
        text_config=TEXT | {"model_type": "mistral"},
        perceiver_config={"resampler_n_latents": 2, "resampler_depth": 1, "hidden_size": 32, "num_key_value_heads": 2}
        | {"resampler_n_heads": 4, "resampler_head_dim": 8},
        image_token_id=IMAGE,
    )
    return transformers.Idefics2ForConditionalGeneration(config).eval(), {
        "input_ids": torch.tensor([[5, IMAGE, IMAGE, 7, 9]]),
        "pixel_values": torch.randn(1, 1, 3, 42, 42),
    }


def idefics3():
    config = transformers.Idefics3Config(
        vision_config=TOWER | {"image_size": 56},
        text_config=TEXT | {"model_type": "llama"},
        scale_factor=2,
        image_token_id=IMAGE,
    )
    return transformers.Idefics3ForConditionalGeneration(config).eval(), {
        "input_ids": torch.tensor([[5, *[IMAGE] * 4, 7, 9]]),
        "pixel_values": torch.randn(1, 1, 3, 56, 56),
    }


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config=TOWER | {"model_type": "siglip_vision_model", "image_size": 42, "vision_use_head": False},
        text_config=TEXT | {"model_type": "gemma", "head_dim": 8},
        projection_dim=32,
        image_token_index=IMAGE,
    )
    return transformers.PaliGemmaForConditionalGeneration(config).eval(), {
        "input_ids": torch.tensor([[*[IMAGE] * 9, 1, 5, 7]]),
        "pixel_values": torch.randn(1, 3, 42, 42),
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "token_type_ids": torch.zeros(1, 12, dtype=torch.long),
    }


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=TOWER | {"model_type": "siglip_vision_model", "image_size": 42},
        text_config=TEXT | {"model_type": "llama"},
        image_grid_pinpoints=[[42, 42]],
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaNextForConditionalGeneration(config).eval(), {
        # 9 tokens of the picture, 9 of its one tile and 3 ends of line
        "input_ids": torch.tensor([[5, *[IMAGE] * 21, 7]]),
        "pixel_values": torch.randn(1, 2, 3, 42, 42),
        "image_sizes": torch.tensor([[42, 42]]),
    }


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 32, "num_heads": 4},
        text_config=MROPE | {"model_type": "qwen2_vl_text"},
        **QWEN_TOKENS,
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval(), _qwen_inputs(1176)


def qwen2_5_vl():
    # two windows in the one picture, and a block that sees it whole
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 56},
        text_config=MROPE | {"model_type": "qwen2_5_vl_text"},
        **QWEN_TOKENS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval(), _qwen_inputs(1176)


def qwen3_vl():
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(
        vision_config=vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        text_config=MROPE | {"model_type": "qwen3_vl_text", "head_dim": 8},
        **QWEN_TOKENS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config).eval(), _qwen_inputs(1536)


MROPE = TEXT | {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}


def _qwen_inputs(channels):
    """A picture of 24 patches, which become 6 tokens, and one of 16, 4 tokens."""
    inputs = {
        "input_ids": torch.tensor([[9, 5, *[IMAGE] * 6, 6, 5, *[IMAGE] * 4, 6, 7, 8]]),
        "pixel_values": torch.randn(40, channels),
        "image_grid_thw": torch.tensor([[1, 6, 4], [1, 4, 4]]),
    }
    if not transformers.__version__.startswith("4."):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def internvl(**changes):
    vision = TOWER | {"image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True} | changes
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=TEXT | {"model_type": "qwen2"}, image_token_id=IMAGE
    )
    return transformers.InternVLForConditionalGeneration(config).eval(), {
        "input_ids": torch.tensor([[5, *[IMAGE] * 4, 7, 9]]),
        "pixel_values": torch.randn(1, 3, 56, 56),
    }


def internvl_6b():
    """With norms of queries and keys, and RMSNorm in place of layer norm."""
    return internvl(use_qk_norm=True, norm_type="rms_norm")


def gemma3():
    config = transformers.Gemma3Config(
        vision_config=TOWER | {"image_size": 56, "vision_use_head": False},
        text_config=TEXT | {"head_dim": 8, "sliding_window": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval(), {
        "input_ids": torch.tensor([[2, 5, *[IMAGE] * 4, 7, 9]]),
        "pixel_values": torch.randn(1, 3, 56, 56),
        "token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
    }


def gemma2():
    config = transformers.Gemma2Config(**TEXT, head_dim=8, sliding_window=4)
    return transformers.Gemma2ForCausalLM(config).eval(), {"input_ids": torch.randint(7, 120, (2, 7))}


def dinov2(**changes):
    config = transformers.Dinov2Config(**(PLAIN | {"mlp_ratio": 2} | changes))
    return transformers.Dinov2Model(config).eval(), {"pixel_values": torch.randn(2, 3, 28, 28)}


def dinov2_swiglu():
    return dinov2(use_swiglu_ffn=True, drop_path_rate=0.2)


def vit():
    config = transformers.ViTConfig(**PLAIN, intermediate_size=96)
    return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 28, 28)}


def clip():
    config = transformers.CLIPVisionConfig(**PLAIN, intermediate_size=96)
    return transformers.CLIPVisionModel(config).eval(), {"pixel_values": torch.randn(2, 3, 28, 28)}


PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def qwen3():
    config = transformers.Qwen3Config(**TEXT, head_dim=8)
    return transformers.Qwen3ForCausalLM(config).eval(), {"input_ids": torch.randint(4, 120, (2, 7))}


def outputs(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def blocks(model):
    """The blocks of a SigLIP tower, wherever a version of transformers keeps them."""
    return getattr(model, "vision_model", model).encoder.layers


def siglip_pair(**changes):
    """A patched SigLIP, one like it that is not, and their input."""
    model, inputs = siglip(**changes)
    plain = copy.deepcopy(model)
    patch(model)
    return model, plain, inputs


def run(model, inputs):
    """Result, gradients and calls of a model."""
    model.zero_grad()
    with Calls() as calls:
        result = model(**inputs).last_hidden_state
        result.square().sum().backward()
    return result.detach(), [p.grad for p in model.parameters() if p.grad is not None], calls


def assert_alike(model, plain, inputs):
    (actual, grads, calls), (expected, expected_grads, _) = run(model, inputs), run(plain, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for a, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
    return calls


def half(value):
    """Half of a result, for hooks that can be told by it."""
    return (value[0] * 0.5, *value[1:]) if isinstance(value, tuple) else value * 0.5
