"""The processor: where picture blocks land, how batches are padded, and that text never becomes a token."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import make_no_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from vlmkern.images import ImageError
from vlmkern.models.jina_vlm.image_processor import JinaVLMImageProcessor
from vlmkern.models.jina_vlm.processor import JinaVLMProcessor

EOS = "<|endoftext|>"
NAMES = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>"]
ARGUMENTS = [name + "_token_id" for name in ("im_start", "im_end", "im_patch", "im_col", "image", "im_slice")]
BOS_ID, FIRST_ID, PATCH_ID = 0, 300, 302
ROLE_TEMPLATE = """
{%- for message in messages %}
    {{- ('' if loop.first and not always_start_with_space else ' ') + message.role.capitalize() + ': ' }}
    {%- for part in message.content %}
        {{- image_prompt_token if part.type == 'image' else part.text }}
    {%- endfor %}
{%- endfor %}
{{- ' Assistant:' if add_generation_prompt }}"""


def make_tokenizer(special=True):
    """Byte-level: id 0 is BOS and EOS, ids 1 to 256 are bytes, and the picture tokens start at 300."""
    vocabulary = [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [f"unused{i}" for i in range(FIRST_ID - len(vocabulary))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in [EOS, *NAMES]])
    assert [tokenizer.token_to_id(name) for name in NAMES] == list(range(FIRST_ID, FIRST_ID + 6))
    return tokenizer


def make_processor(tokenizer=None, **options):
    ids = dict(zip(ARGUMENTS, range(FIRST_ID, FIRST_ID + 6), strict=True))
    images = JinaVLMImageProcessor(**ids, bos_token_id=BOS_ID, eos_token_id=BOS_ID)
    return JinaVLMProcessor(tokenizer or make_tokenizer(), images, **options)


def picture(width=64, height=64, level=100):
    return np.full((height, width, 3), level, np.uint8)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def text_ids(text):
    """One id a byte, whatever the text says."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [1 + alphabet.index(symbol) for piece, _ in pieces for symbol in piece]


def check_positions(batch):
    """Positions of every row hit the patch tokens of that row, each once."""
    for ids, positions in zip(batch["input_ids"], batch["image_input_idx"], strict=True):
        kept = positions[positions >= 0]
        assert torch.equal(kept.sort().values, (ids == PATCH_ID).nonzero()[:, 0])
        assert torch.all(positions[positions < 0] == -10_000)


def test_text_only(processor):
    batch = processor("Hello")
    assert batch["input_ids"].tolist() == [[BOS_ID, *text_ids("Hello")]]
    assert batch["attention_mask"].tolist() == [[1] * 6]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["crops"] is batch["image_masks"] is batch["image_input_idx"] is None
    assert list(batch) == ["input_ids", "crops", "image_masks", "image_input_idx", "attention_mask"]
    assert processor("")["input_ids"].tolist() == [[BOS_ID]]


def test_a_marker_gives_way_to_the_block(processor):
    image = picture(800, 600)
    inputs = processor.image_processor.preprocess(image)
    batch = processor(" User: <|image|>What? Assistant:", image)
    before, after = text_ids(" User: "), text_ids("What? Assistant:")
    assert batch["input_ids"].tolist() == [[BOS_ID, *before, *inputs.tokens.tolist(), *after]]
    offset = 1 + len(before)
    expected = torch.where(inputs.image_input_idx < 0, -10_000, inputs.image_input_idx + offset)
    assert torch.equal(batch["image_input_idx"], expected[None])
    assert torch.equal(batch["crops"], inputs.crops[None])
    assert torch.equal(batch["image_masks"], inputs.image_masks[None])
    assert batch["attention_mask"].all()
    check_positions(batch)


def test_several_pictures_keep_their_order(processor):
    images = [picture(64, 64, 10), picture(900, 300, 20)]
    first, second = (processor.image_processor.preprocess(image) for image in images)
    batch = processor("a<|image|>bc<|image|>d", images)
    expected = [BOS_ID, *text_ids("a"), *first.tokens.tolist(), *text_ids("bc"), *second.tokens.tolist()]
    assert batch["input_ids"].tolist() == [expected + text_ids("d")]
    assert torch.equal(batch["crops"][0], torch.cat([first.crops, second.crops]))
    # each picture's own last tile is marked
    assert batch["image_masks"][0, :, 0].tolist() == [1, -1, 1, 1, 1, -1]
    check_positions(batch)
    assert batch["image_input_idx"][0, 2].min() == 2 + 424 + 2 + 1


def test_without_markers_pictures_come_first(processor):
    images = [picture(64, 64), picture(900, 300), picture(64, 64)]
    blocks = torch.cat([processor.image_processor.preprocess(image).tokens for image in images])
    batch = processor("text", images)
    assert batch["input_ids"].tolist() == [[BOS_ID, *blocks.tolist(), *text_ids("text")]]
    check_positions(batch)
    assert [batch["image_input_idx"][0, crop].min().item() for crop in (0, 2, 6)] == [2, 426, 426 + 704]


@pytest.mark.parametrize(("markers", "images"), [(1, 0), (2, 1), (1, 2), (3, 0)])
def test_counts_must_match(processor, markers, images):
    with pytest.raises(ValueError, match=rf"{markers} <\|image\|> marker\(s\), but {images} image\(s\)"):
        processor("x" + "<|image|>" * markers, [picture()] * images)


def test_batches_are_padded_on_the_left(processor):
    prompts = ["<|image|>short", "no picture, but quite some text", "<|image|>a<|image|>"]
    images = [picture(900, 300), None, [picture(), picture(64, 64, 0)]]
    batch = processor(prompts, images)
    alone = [processor(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    lengths = [single["input_ids"].shape[1] for single in alone]
    width = max(lengths)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, width)
    assert batch["crops"].shape == (3, 4, 729, 588) and batch["image_masks"].shape == (3, 4, 729)
    for row, (single, length) in enumerate(zip(alone, lengths, strict=True)):
        pad = width - length
        assert torch.all(batch["input_ids"][row, :pad] == -1)
        assert torch.equal(batch["input_ids"][row, pad:], single["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * pad + [1] * length
        crops = 0 if single["crops"] is None else single["crops"].shape[1]
        if crops:
            assert torch.equal(batch["crops"][row, :crops], single["crops"][0])
            assert torch.equal(batch["image_masks"][row, :crops], single["image_masks"][0])
            positions = single["image_input_idx"][0]
            shifted = torch.where(positions < 0, positions, positions + pad)
            assert torch.equal(batch["image_input_idx"][row, :crops], shifted)
        assert torch.all(batch["crops"][row, crops:] == -1) and torch.all(batch["image_masks"][row, crops:] == -1)
        assert torch.all(batch["image_input_idx"][row, crops:] == -10_000)
    check_positions(batch)


def test_default_dtype_and_device_do_not_matter(processor):
    expected = processor("<|image|>x", picture(900, 300))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            batch = processor("<|image|>x", picture(900, 300))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in batch.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


def test_batches_without_pictures(processor):
    batch = processor(["a", "bcd"])
    assert batch["input_ids"].tolist() == [[-1, -1, BOS_ID, *text_ids("a")], [BOS_ID, *text_ids("bcd")]]
    assert batch["crops"] is None


def test_ways_to_hand_over_pictures(processor, tmp_path):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    expected = processor("<|image|>x", picture())
    for images in (path, [path], (picture(),), [[picture()]], torch.from_numpy(picture()), path.read_bytes()):
        for name, value in processor("<|image|>x", images).items():
            assert torch.equal(value, expected[name]), name
    batch = processor(["<|image|>x", "<|image|>x"], [path, [path]])
    assert torch.equal(batch["crops"], expected["crops"].expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    ("prompt", "images", "error"),
    [
        (["a", "b"], [None], ValueError),
        (["a"], picture(), ValueError),
        (["a"], "picture.png", ValueError),
        (None, None, TypeError),
        ([1], None, TypeError),
        (b"bytes", None, TypeError),
        ("<|image|>", 5, TypeError),
        ("<|image|>", "missing.png", ImageError),
    ],
)
def test_malformed_calls(processor, prompt, images, error):
    with pytest.raises(error):
        processor(prompt, images)


def test_empty_batch(processor):
    batch = processor([])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (0, 0) and batch["crops"] is None


@pytest.mark.parametrize("name", [EOS, *NAMES[:4], NAMES[5]])
def test_special_tokens_in_text_are_spelled_out(processor, name):
    text = f"before {name} after"
    assert processor(text)["input_ids"].tolist() == [[BOS_ID, *text_ids(text)]]


def test_ids_reserved_for_pictures_are_refused():
    # a tokenizer that does not mark its picture tokens as special turns text into them
    processor = make_processor(make_tokenizer(special=False))
    with pytest.raises(ValueError, match=r"id 302 \('<im_patch>'\).* 300 on are reserved"):
        processor("see <im_patch>")
    # nothing was read for a prompt that is refused
    with pytest.raises(ValueError, match="reserved"):
        processor("<|image|><im_col>", "missing.png")


@pytest.mark.parametrize("special", [True, False])
def test_one_eos_at_the_end_is_dropped(special):
    processor = make_processor(make_tokenizer(special))
    assert processor("done" + EOS)["input_ids"].tolist() == [[BOS_ID, *text_ids("done")]]
    assert processor(EOS)["input_ids"].tolist() == [[BOS_ID]]
    batch = processor("<|image|>" + EOS, picture())
    assert batch["input_ids"].shape == (1, 1 + 424)
    last = text_ids(EOS) if special else [BOS_ID]
    assert processor("done" + EOS + EOS)["input_ids"].tolist() == [[BOS_ID, *text_ids("done"), *last]]


def test_an_ordinary_token_with_the_eos_id_is_dropped_too():
    ids = dict(zip(ARGUMENTS, range(FIRST_ID, FIRST_ID + 6), strict=True))
    full_stop = text_ids(".")[0]
    images = JinaVLMImageProcessor(**ids, bos_token_id=BOS_ID, eos_token_id=full_stop)
    batch = JinaVLMProcessor(make_tokenizer(), images)("a.b..")
    assert batch["input_ids"].tolist() == [[BOS_ID, *text_ids("a.b.")]]


def test_the_callers_tokenizer_is_left_alone():
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, BOS_ID)])
    processor = make_processor(tokenizer)
    assert processor("much longer than three")["input_ids"].shape[1] == 1 + len("much longer than three")
    assert not tokenizer.encode_special_tokens and tokenizer.truncation and tokenizer.padding
    assert tokenizer.encode("<im_patch>").ids[:2] == [BOS_ID, PATCH_ID]
    # and what the caller does to it later changes nothing here
    tokenizer.add_special_tokens(["much"])
    assert processor("much")["input_ids"].tolist() == [[BOS_ID, *text_ids("much")]]


def test_threads_may_share_a_processor(processor):
    prompts = [f"{i} {EOS} <|image|> {NAMES[i % 4]}!" for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda prompt: processor(prompt, picture())["input_ids"], prompts))
    for prompt, ids in zip(prompts, results, strict=True):
        assert torch.equal(ids, processor(prompt, picture())["input_ids"])
        assert (ids == BOS_ID).sum() == 1


def test_chat_in_the_built_in_format(processor):
    assert processor.chat("What is this?") == " User: <|image|>What is this? Assistant:"
    assert processor.chat("Hi", num_images=0) == " User: Hi Assistant:"
    assert processor.chat("Both?", 2) == " User: <|image|><|image|>Both? Assistant:"
    messages = [
        {"role": "user", "content": "<|image|>What?"},
        {"role": "assistant", "content": "A cat."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
    ]
    rendered = " User: <|image|>What? Assistant: A cat. User: And <|image|>?"
    assert processor.apply_chat_template(messages, add_generation_prompt=False) == rendered
    assert processor.apply_chat_template(messages) == rendered + " Assistant:"
    assert make_processor(always_start_with_space=False).chat("Hi", 0) == "User: Hi Assistant:"


def test_chat_in_the_checkpoints_format():
    for start in (True, False):
        built_in = make_processor(always_start_with_space=start)
        templated = make_processor(chat_template=ROLE_TEMPLATE, always_start_with_space=start)
        assert templated.chat("What?", 2) == built_in.chat("What?", 2)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 + messages }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set _ = messages.append(1) %}", "SecurityError"),
        ("no marker", "0 image marker"),
        ("<|image|><|image|>", "2 image marker"),
    ],
)
def test_templates_that_fail(template, reason):
    with pytest.raises(ValueError, match=reason):
        make_processor(chat_template=template).chat("What?")


def test_templates_get_no_text_to_forge_tokens_with():
    processor = make_processor(chat_template="[{{ bos_token }}{{ eos_token }}]")
    assert processor.chat("What?", 0) == "[]"


@pytest.mark.parametrize("number", [-1, 1.0, True, "1"])
def test_bad_numbers_of_images(processor, number):
    with pytest.raises(ValueError, match="num_images"):
        processor.chat("What?", number)


@pytest.mark.parametrize(
    "message",
    [
        "hello",
        {"content": "no role"},
        {"role": "", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": ["text"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "user", "content": [{"type": "text", "text": "a <|image|> smuggled in"}]},
    ],
)
def test_malformed_messages(processor, message):
    with pytest.raises(ValueError, match=r"message|part"):
        processor.apply_chat_template([message])


def test_questions_cannot_smuggle_in_a_marker(processor):
    with pytest.raises(ValueError, match="image marker"):
        processor.chat("What is <|image|>?")


def test_decode(processor):
    ids = [*text_ids(" A cät"), BOS_ID, BOS_ID]
    assert processor.decode(ids) == " A cät"
    assert processor.decode(torch.tensor(ids)) == processor.decode(np.array(ids)) == " A cät"
    assert processor.decode(torch.tensor([ids, [-1] * len(ids)])) == [" A cät", ""]
    assert processor.decode([ids, text_ids("x")]) == [" A cät", "x"]
    assert processor.decode([torch.tensor(ids), torch.tensor([PATCH_ID, -1])]) == [" A cät", ""]
    assert processor.decode([]) == ""
    assert make_processor(make_tokenizer(special=False)).decode(ids) == " A cät"


def test_decode_inverts_encoding(processor):
    text = "naïve 東京 <im_start> \n tab\t end"
    assert processor.decode(processor(text)["input_ids"]) == [text]


def test_from_pretrained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        JinaVLMProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        JinaVLMProcessor.from_pretrained(tmp_path / "nowhere")
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    plain = JinaVLMProcessor.from_pretrained(tmp_path, bos_token_id=0)
    # the tokenizer knows its own picture ids
    assert plain.image_processor.image_token_ids == tuple(range(FIRST_ID, FIRST_ID + 6))
    assert not plain.image_processor.do_resize and plain.chat("Hi", 0) == " User: Hi Assistant:"

    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": True, "im_slice_token_id": 400}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"always_start_with_space": False}))
    (tmp_path / "chat_template.jinja").write_text("T" + ROLE_TEMPLATE)
    full = JinaVLMProcessor.from_pretrained(tmp_path, max_crops=3)
    assert full.image_processor.do_resize and full.image_processor.max_crops == 3
    assert full.image_processor.image_token_ids == (300, 301, 302, 303, 304, 400)
    assert full.chat("Hi", 0) == "TUser: Hi Assistant:"


def test_tokenizer_may_be_a_path(tmp_path):
    path = tmp_path / "tokenizer.json"
    make_tokenizer().save(str(path))
    assert torch.equal(make_processor(path)("Hi")["input_ids"], make_processor()("Hi")["input_ids"])
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        make_processor(path)
    with pytest.raises(ValueError, match="image_token"):
        make_processor(image_token="")


def test_released_ids_are_the_default():
    processor = JinaVLMProcessor(make_tokenizer())
    batch = processor("<|image|>", picture())
    assert batch["input_ids"][0, :3].tolist() == [151643, 151936, 151938]
    assert batch["input_ids"].shape == (1, 425)


@pytest.fixture
def directory(tmp_path):
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "huge", "not UTF-8"])
def test_checkpoint_files_that_are_none(directory, name, kind):
    path = directory / name
    if not make_no_file(path, kind):
        path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        JinaVLMProcessor.from_pretrained(directory)
    reasons = {"directory": "is a directory", "huge": "expected at most", "not UTF-8": "utf-8|not a tokenizer"}
    assert re.search(reasons.get(kind, "not a regular file"), str(caught.value))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("preprocessor_config.json", {"max_crops": "12"}, "max_crops must be an integer from 1 to 256, got '12'"),
        ("preprocessor_config.json", {"base_input_size": 14 * 10**8}, "base_size must be small enough"),
        (
            "preprocessor_config.json",
            {"min_pixels": 10**12, "max_pixels": 10**12},
            "min_pixels must be an integer",
        ),
        ("preprocessor_config.json", {"im_start_token_id": 2**63}, "im_start_token_id must be an integer from 0"),
        ("preprocessor_config.json", {"interpolation": "x" * 10_000}, "interpolation must be 'bilinear'"),
        ("preprocessor_config.json", {"overlap_margins": [[4], 4]}, "overlap_margins"),
        ("processor_config.json", {"always_start_with_space": "false"}, "must be true or false, got 'false'"),
        ("processor_config.json", {"always_start_with_space": [1]}, r"must be true or false, got \[1\]"),
    ],
)
def test_settings_that_are_refused_name_the_file(directory, name, content, message):
    (directory / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{re.escape(str(directory / name))}: .*{message}") as caught:
        JinaVLMProcessor.from_pretrained(directory)
    assert len(str(caught.value)) < 600


def test_arguments_that_win_over_the_file_are_named_beside_it(directory):
    (directory / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json with max_crops given: max_crops must be"):
        JinaVLMProcessor.from_pretrained(directory, max_crops=0)


def test_mutated_files(directory):
    """Bytes of a good checkpoint's files changed at random: each loads or is refused by its name."""
    (directory / "preprocessor_config.json").write_text(json.dumps({"do_resize": True, "max_crops": 9, "pooling_h": 2}))
    (directory / "processor_config.json").write_text(json.dumps({"always_start_with_space": False}))
    whole = {path: path.read_bytes() for path in sorted(directory.iterdir())}
    rng, refused = random.Random(0), 0
    for path, content in whole.items():
        for _ in range(100):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] = rng.choice(b'0123456789-eE.,:"[]{} ntfx\\\xff')
            path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
            try:
                JinaVLMProcessor.from_pretrained(directory)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 800
                refused += 1
        path.write_bytes(content)
    assert 100 < refused < 300


def test_tokenizer_files_on_which_the_library_panics(tmp_path):
    tokenizer = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
    # longer than any token that it should be cut from
    tokenizer["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json \("):
        JinaVLMProcessor.from_pretrained(tmp_path)


def test_text_that_the_tokenizer_has_no_ids_for():
    processor = make_processor(Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")))
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode the text \(.*UNK"):
        processor("b")
