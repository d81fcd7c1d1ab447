"""FLOPs by part and KV bytes of one picture: a table derived elsewhere, digit by digit, and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmkern.efficiency import MODELS, picture_efficiency
from vlmkern.efficiency.architectures import ARCHITECTURES
from vlmkern.efficiency.costs import LANGUAGE_PARTS, VISION_PARTS, flops_by_part

PARTS = (*VISION_PARTS, *LANGUAGE_PARTS)

PAPER_LIMIT = {"max_pixels": 16384 * 28 * 28}

# model, size, options; total, the parts' shares, vision : language in TFLOP, decimal MB of keys and values
PICTURES = [
    ("towervision-2b", {}, "26.55", "0.0 5.5 1.7 10.3 0.3 13.3 9.1 59.7", "4.75:21.81", "503"),
    ("towervision-9b", {}, "92.37", "0.0 1.6 0.5 3.0 0.2 19.2 8.5 67.1", "4.84:87.53", "1626"),
    ("towervideo-2b", {}, "50.58", "0.1 12.7 4.0 23.8 0.7 9.2 7.9 41.5", "20.91:29.67", "668"),
    ("idefics2-8b", {"split": False}, "7.29", "0.1 14.3 22.6 26.7 11.3 4.8 0.1 20.1", "5.47:1.82", "9"),
    ("idefics2-8b", {"padded": True}, "32.84", "0.1 15.9 25.1 29.7 12.6 3.2 0.1 13.4", "27.35:5.48", "43"),
    ("idefics2-8b", {}, "15.75", "0.1 13.7 13.5 25.6 12.4 6.6 0.3 27.9", "10.27:5.48", "43"),
    ("qwen2-vl-2b", {}, "10.61", "0.1 15.8 24.7 31.6 0.6 3.1 0.9 23.2", "7.72:2.89", "29"),
    ("qwen2-vl-7b", {}, "21.87", "0.1 7.7 12.0 15.3 0.4 8.0 1.0 55.5", "7.75:14.13", "57"),
    ("qwen2-vl-7b", PAPER_LIMIT, "73.03", "0.0 6.4 27.6 12.7 0.3 6.4 2.2 44.3", "34.38:38.66", "159"),
    ("internvl2.5-1b", {}, "12.36", "0.1 21.7 10.9 43.4 0.2 2.4 4.0 17.2", "9.44:2.92", "41"),
    ("internvl2.5-8b", {}, "60.03", "0.0 4.5 2.2 8.9 0.4 15.2 5.0 63.7", "9.63:50.40", "436"),
    ("internvl2.5-26b", {}, "289.95", "0.0 16.9 2.7 33.9 0.3 9.9 2.3 33.9", "156.06:133.89", "655"),
    ("internvl2.5-78b", {}, "648.13", "0.0 7.6 1.2 15.2 0.2 12.7 2.3 60.9", "156.43:491.70", "1091"),
]

# of videos, which have no command: patches of each segment, tokens with their markers
VIDEOS = [
    ("qwen2-vl-7b", [26 * 42] * 60, 16382, "364.74", "0.1 7.5 3.2 15.1 0.4 7.4 14.9 51.4", "95.82:268.92", "939"),
    ("internvl2.5-8b", [1024] * 32, 8256, "157.99", "0.0 4.2 2.1 8.4 0.3 14.1 11.5 59.4", "23.70:134.28", "1082"),
]


def assert_digits(value, printed, unit=1.0):
    """`value` rounds to what is printed; a tie at the next digit may have gone either way."""
    digits = len(printed.partition(".")[2])
    assert abs(value / unit - float(printed)) <= 0.5001 * 10**-digits, (value / unit, printed)


def assert_row(flops, total, shares, split, kv_bytes, megabytes):
    assert list(flops) == list(PARTS)
    whole = sum(flops.values())
    assert_digits(whole, total, 1e12)
    for part, share in zip(PARTS, shares.split(), strict=True):
        assert_digits(100 * flops[part] / whole, share)
    vision, language = split.split(":")
    assert_digits(sum(flops[part] for part in VISION_PARTS), vision, 1e12)
    assert_digits(sum(flops[part] for part in LANGUAGE_PARTS), language, 1e12)
    assert_digits(kv_bytes, megabytes, 1e6)


@pytest.mark.parametrize("model,options,total,shares,split,megabytes", PICTURES)
def test_pictures_to_the_derived_digits(model, options, total, shares, split, megabytes):
    size = (1764, 1232) if options is PAPER_LIMIT else (1024, 768)
    found = picture_efficiency(model, *size, **options)
    assert_row(found["flops"], total, shares, split, found["kv_cache_bytes"], megabytes)
    assert found["vision_flops"] == sum(found["flops"][part] for part in VISION_PARTS)
    assert found["language_flops"] == sum(found["flops"][part] for part in LANGUAGE_PARTS)


@pytest.mark.parametrize("model,segments,tokens,total,shares,split,megabytes", VIDEOS)
def test_videos_to_the_derived_digits(model, segments, tokens, total, shares, split, megabytes):
    architecture = ARCHITECTURES[model]
    flops = flops_by_part(architecture, segments, tokens + 64)
    assert_row(flops, total, shares, split, architecture.decoder.kv_bytes(tokens), megabytes)


def test_jina_vlm_to_the_derived_digits():
    """The row is of 24 tower blocks, 182 tokens a crop and a projector as wide as the pooling; released are 25, 1,744
    tokens for 12 tiles and the decoder's width."""
    released = ARCHITECTURES["jina-vlm"]
    assert released.encoder.layers == 25 and released.connector.out == 2048
    derived = released._replace(
        encoder=released.encoder._replace(layers=24), connector=released.connector._replace(out=1152)
    )
    flops = flops_by_part(derived, [729] * 13, 182 * 13 + 64)
    kv_bytes = released.decoder.kv_bytes(182 * 13)
    assert_row(flops, "15.47", "0.1 15.6 4.9 29.2 1.5 11.1 4.4 33.2", "7.94:7.53", kv_bytes, "271")


def test_jina_vlm_as_released():
    found = picture_efficiency("jina-vlm", 1024, 768)
    assert found["image_tokens"] == 1744 and found["kv_cache_bytes"] == 1744 * 28 * 2 * 8 * 128 * 2
    assert_digits(found["vision_flops"], "8.288", 1e12)
    assert_digits(found["language_flops"], "5.472", 1e12)


def test_keys():
    for model in MODELS:
        found = picture_efficiency(model, 640, 480)
        assert list(found) == [
            "model",
            "width",
            "height",
            "image_tokens",
            "flops",
            "vision_flops",
            "language_flops",
            "kv_cache_bytes",
        ]
        assert (found["model"], found["width"], found["height"]) == (model, 640, 480)
        assert list(found["flops"]) == list(PARTS)
        numbers = [found["image_tokens"], found["kv_cache_bytes"], *found["flops"].values()]
        assert all(isinstance(number, int) and number > 0 for number in numbers)


@pytest.mark.parametrize(
    "model,size,options,message",
    [
        ("qwen2-vl", (640, 480), {}, r"^model: got 'qwen2-vl', expected one of jina-vlm, towervision-2b"),
        (None, (640, 480), {}, "^model: got None"),
        ("qwen2-vl-7b", (2010, 10), {}, "^qwen2-vl: .*aspect ratio of 201"),
        ("qwen2-vl-7b", (0, 10), {}, "width must be an integer"),
        ("qwen2-vl-7b", (640, 480), {"max_tiles": 3}, "expected one of min_pixels, max_pixels"),
        ("qwen2-vl-7b", (640, 480), {"padded": True}, "^qwen2-vl-7b: got padded=True, expected False"),
        ("towervideo-2b", (640, 480), {"frames": 0}, "^towervideo-2b: frames must be an integer of at least 1, got 0"),
        ("towervideo-2b", (640, 480), {"max_tiles": 3}, "^towervideo-2b: got option 'max_tiles'"),
    ],
)
def test_what_is_refused(model, size, options, message):
    with pytest.raises(ValueError, match=message):
        picture_efficiency(model, *size, **options)


# what transformers' own modules dispatch at true widths, on the meta device


def counted(module, *args, **kwargs):
    """FLOPs by torch's counter of a module's own products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def on_meta(build):
    with torch.device("meta"):
        return build().eval()


def tower(encoder, views):
    parts = encoder.patch_embed, encoder.projections, encoder.attention, encoder.mlps
    return sum(part(views) for part in parts)


def test_siglip_counts_as_torch_counts_it():
    transformers = pytest.importorskip("transformers")
    encoder = ARCHITECTURES["towervision-2b"].encoder
    config = transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
        attn_implementation="eager",
    )
    model = on_meta(lambda: transformers.SiglipVisionModel(config))
    pixels = torch.empty(3, 3, 384, 384, device="meta")
    assert counted(model, pixel_values=pixels) == tower(encoder, [729] * 3)


@pytest.mark.parametrize("name", ["internvl2.5-1b", "internvl2.5-26b"])
def test_internvit_counts_as_torch_counts_it(name):
    transformers = pytest.importorskip("transformers")
    encoder = ARCHITECTURES[name].encoder
    config = transformers.InternVLVisionConfig(
        hidden_size=encoder.width,
        intermediate_size=encoder.mlp,
        num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads,
        attn_implementation="eager",
    )
    model = on_meta(lambda: transformers.InternVLVisionModel(config))
    pixels = torch.empty(2, 3, 448, 448, device="meta")
    assert counted(model, pixel_values=pixels) == tower(encoder, [1024] * 2)


def test_qwen2_vl_merger_counts_as_torch_counts_it():
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    merger = on_meta(lambda: modeling.PatchMerger(dim=3584, context_dim=1280))
    patches = torch.empty(3996, 1280, device="meta")
    assert counted(merger, patches) == ARCHITECTURES["qwen2-vl-7b"].connector.flops([3996])


def test_idefics2_connector_counts_as_torch_counts_it():
    """Projection and one layer of the perceiver, of which there are three; its mask would need values."""
    modeling = pytest.importorskip("transformers.models.idefics2.modeling_idefics2")
    from transformers import Idefics2Config

    config = Idefics2Config(
        vision_config={"hidden_size": 1152, "intermediate_size": 4304},
        perceiver_config={"hidden_size": 4096},
        text_config={"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336},
        attn_implementation="eager",
    )
    connector = on_meta(lambda: modeling.Idefics2Connector(config))
    layers = connector.perceiver_resampler.layers
    patches = torch.empty(2, 972, 1152, device="meta")
    latents, context = (torch.empty(2, rows, 4096, device="meta") for rows in (64, 972))
    flops = counted(connector.modality_projection, patches) + sum(counted(layer, latents, context) for layer in layers)
    assert flops == ARCHITECTURES["idefics2-8b"].connector.flops([972, 972])


@pytest.mark.parametrize(
    "name,kind",
    [("qwen2-vl-2b", "Qwen2"), ("qwen2-vl-7b", "Qwen2"), ("towervision-9b", "Gemma2"), ("idefics2-8b", "Mistral")],
)
def test_decoders_count_as_torch_counts_them(name, kind):
    """Of one layer: a model's own mask would need values. What is counted knows no causality."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    decoder = ARCHITECTURES[name].decoder._replace(window=None)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=decoder.width,
        intermediate_size=decoder.mlp,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
    )
    config._attn_implementation = "eager"
    layer = on_meta(lambda: getattr(modeling, f"{kind}DecoderLayer")(config, 0))
    states = torch.empty(1, 200, decoder.width, device="meta")
    rotary = torch.empty(2, 1, 200, decoder.head_dim, device="meta").unbind(0)
    flops = decoder.projections(200) + 2 * decoder.attention(200) + decoder.mlps(200)
    assert decoder.layers * counted(layer, states, position_embeddings=rotary) == flops


def test_windows_hide_what_they_hide():
    """Half of the square less half of the square beyond the window, against counting pairs one by one."""
    decoder = ARCHITECTURES["towervision-2b"].decoder._replace(layers=1, windowed_layers=1, window=40)
    for tokens in (1, 39, 40, 41, 150):
        pairs = sum(min(place, 40) for place in range(1, tokens + 1))
        # the halves leave out half of the diagonal and of the window's edge
        edge = tokens / 2 - max(0, tokens - 40) / 2
        assert decoder.attention(tokens) == 4 * (pairs - edge) * 8 * 256
