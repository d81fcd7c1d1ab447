"""What a picture costs, on the command line: one system, all of them, one released model; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vlmkern.cli import main
from vlmkern.efficiency import MODELS, SYSTEMS, image_tokens, picture_efficiency
from vlmkern.models.jina_vlm import JinaVLMImageProcessor
from vlmkern.models.jina_vlm.tiling_picture import draw_tiling


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (1024, 768), (90, 120, 60)).save(path)
    return str(path)


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0 and err == ""
    return json.loads(out)


def assert_refused(result, *parts):
    status, out, err = result
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("vlmkern: error: "), err
    for part in parts:
        assert part in err


def assert_argument_refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    assert_refused((stop.value.code, captured.out, captured.err))
    assert len(captured.err) < 350


@pytest.mark.parametrize("model", [system for system in SYSTEMS if system != "jina-vlm"])
def test_tokens_of_one_model(capsys, photo, model):
    assert run_json(capsys, "tokens", photo, "--model", model) == image_tokens(model, 1024, 768)


def test_tokens_of_jina_vlm_keep_their_keys(capsys, photo):
    counts = run_json(capsys, "tokens", photo)
    assert counts == run_json(capsys, "tokens", photo, "--model", "jina-vlm")
    assert counts == JinaVLMImageProcessor().describe(1024, 768)
    by_option = run_json(capsys, "tokens", photo, "--option", "max_crops=3")
    assert by_option == run_json(capsys, "tokens", photo, "--max-crops", "3") != counts


def test_tokens_of_all(capsys, photo):
    found = run_json(capsys, "tokens", photo, "--model", "all")
    assert found == [image_tokens(system, 1024, 768) for system in SYSTEMS]
    few = run_json(capsys, "tokens", photo, "--model", "all", "--max-crops", "2")
    assert few[0] == image_tokens("jina-vlm", 1024, 768, max_crops=2) and few[1:] == found[1:]


@pytest.mark.parametrize("width", [80, 120])
def test_tokens_of_all_as_a_table(capsys, photo, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, _ = run(capsys, "tokens", photo, "--model", "all")
    lines = out.splitlines()
    assert status == 0 and max(map(len, lines)) <= width and "…" not in out
    for system in SYSTEMS:
        (row,) = (line for line in lines if line.strip().startswith(system) and "in transformers" not in line)
        counts = image_tokens(system, 1024, 768)
        assert all(f" {counts[key]:,} " in row for key in ("views", "patches", "image_tokens"))
    assert "18,200 patches, 58.6% of them padding" in out


def test_options_reach_the_model(capsys, photo):
    for model, settings in (
        ("qwen2-vl", {"max_pixels": 200_704}),
        ("internvl2.5", {"max_tiles": 6}),
        ("idefics2", {"split": False}),
        ("towervision", {"max_tiles": 1}),
    ):
        arguments = [part for key, value in settings.items() for part in ("--option", f"{key}={str(value).lower()}")]
        found = run_json(capsys, "tokens", photo, "--model", model, *arguments)
        assert found == image_tokens(model, 1024, 768, **settings) != image_tokens(model, 1024, 768)


def test_pictures(capsys, photo, tmp_path):
    page = tmp_path / "page.png"
    sizes = {}
    for model in (*SYSTEMS, "all"):
        status, out, _ = run(capsys, "tokens", photo, "--model", model, "--picture", str(page))
        assert status == 0 and out
        with Image.open(page) as drawn:
            sizes[model] = drawn.size
            if model == "jina-vlm":
                assert np.array_equal(np.asarray(drawn), np.asarray(draw_tiling(photo, JinaVLMImageProcessor())))
    assert sizes["all"][0] == 1680 and sizes["all"][1] > sizes["idefics2"][1]


def test_pictures_that_cannot_be_written(capsys, photo, tmp_path):
    for model in ("jina-vlm", "qwen2-vl", "all"):
        for name in ("none/page.png", "page.nothing"):
            path = str(tmp_path / name)
            assert_refused(run(capsys, "tokens", photo, "--model", model, "--picture", path))


def test_tokens_refuse_what_the_processors_refuse(capsys, tmp_path):
    strip = tmp_path / "strip.png"
    Image.new("RGB", (2010, 10)).save(strip)
    for model in ("qwen2-vl", "jina-vlm", "all"):
        assert_refused(run(capsys, "tokens", str(strip), "--model", model), "aspect ratio of 201, the limit is 200")
    assert run_json(capsys, "tokens", str(strip), "--model", "towervision")["views"] == 7
    line = tmp_path / "line.png"
    Image.new("RGB", (100, 1)).save(line)
    assert_refused(run(capsys, "tokens", str(line), "--model", "idefics2"), "idefics2: ", "cannot be split")


def test_options_that_do_not_fit_the_model(capsys, photo):
    for arguments, message in (
        (["--model", "qwen2-vl", "--max-crops", "3"], "--max-crops: got 3 with --model qwen2-vl"),
        (["--model", "all", "--option", "max_tiles=3"], "--option: got --model all"),
        (["--model", "qwen2-vl", "--option", "max_tiles=3"], "qwen2-vl: got option 'max_tiles'"),
        (["--option", "split=false"], "jina-vlm: got option 'split'"),
        (["--model", "idefics2", "--option", "split=1"], "split must be True or False, got 1"),
        (["--model", "internvl2.5", "--option", "max_tiles=0"], "max_tiles must be an integer from 1 to 256, got 0"),
    ):
        assert_refused(run(capsys, "tokens", photo, *arguments), message)


def test_bad_arguments(capsys):
    for value in ("", "=", "max_tiles", "max_tiles=", "max_tiles=x", "max_tiles=-1", "width=3", "9" * 5000):
        assert_argument_refused(capsys, "tokens", "a.png", "--option", value)
        assert_argument_refused(capsys, "efficiency", "--option", value)
    for value in ("", "x", "1024", "1024x", "x768", "1024X768", "-1x5", "1e3x5", "1.5x5", "9" * 5000 + "x3", "3x4x5"):
        assert_argument_refused(capsys, "efficiency", "--model", "qwen2-vl-2b", "--image", value)
    assert_argument_refused(capsys, "tokens", "a.png", "--model", "qwen")
    assert_argument_refused(capsys, "efficiency", "--model", "qwen2-vl", "--image", "3x4")


@pytest.mark.parametrize("model", MODELS)
def test_efficiency_of_one_model(capsys, model):
    found = run_json(capsys, "efficiency", "--model", model, "--image", "1024x768")
    assert found == picture_efficiency(model, 1024, 768)
    status, out, _ = run(capsys, "efficiency", "--model", model, "--image", "1024x768")
    total = found["vision_flops"] + found["language_flops"]
    assert status == 0 and f"{total / 1e12:,.3f}" in out and f"{found['image_tokens']:,} image tokens" in out


def test_efficiency_with_options(capsys):
    base = ("efficiency", "--model", "idefics2-8b", "--image", "1024x768")
    assert run_json(capsys, *base, "--padded") == picture_efficiency("idefics2-8b", 1024, 768, padded=True)
    assert run_json(capsys, *base, "--option", "split=false") == picture_efficiency(
        "idefics2-8b", 1024, 768, split=False
    )


def test_efficiency_refuses(capsys):
    for arguments, message in (
        (["--model", "qwen2-vl-2b"], "--model: got no --image beside it"),
        (["--image", "3x4"], "--image: got no --model beside it"),
        (["--padded"], "--padded: got no --model beside it"),
        (["--option", "split=false"], "--option: got no --model beside it"),
        (["--model", "qwen2-vl-2b", "--image", "3x4", "--tiles", "3"], "--tiles: got 3 with --model"),
        (["--model", "qwen2-vl-2b", "--image", "3x4", "--sweep", "3"], "--sweep: got 3 with --model"),
        (["--model", "qwen2-vl-2b", "--image", "0x4"], "qwen2-vl: width must be an integer from 1 to"),
        (["--model", "qwen2-vl-2b", "--image", "4x1000"], "aspect ratio of 250, the limit is 200"),
        (["--model", "qwen2-vl-2b", "--image", "30x40", "--padded"], "got padded=True, expected False"),
    ):
        assert_refused(run(capsys, "efficiency", *arguments), message)
