"""The command line as a user meets it: tables, JSON, exit status, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import make_no_file
from tokenizers import Tokenizer, models, pre_tokenizers

import vlmkern
from vlmkern.cli import main
from vlmkern.dispatch import table as support
from vlmkern.models.jina_vlm import JinaVLM, JinaVLMConfig


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    # noise: tiles of one colour would be the same picture, for which the tower runs once
    Image.effect_noise((640, 480), 90).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint with a tokenizer, as a released one is laid out."""
    directory = tmp_path_factory.mktemp("checkpoint")
    JinaVLM.random(JinaVLMConfig.tiny()).save_pretrained(directory)
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 512)}
    words |= {w: i for i, w in enumerate(["User", ":", "Assistant", "Describe", "this", "image", "."], start=1)}
    tokenizer = Tokenizer(models.WordLevel({w: i for w, i in words.items() if i < 512}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = ("im_start", "im_end", "im_patch", "im_col", "image", "im_slice")
    ids = {f"{name}_token_id": 512 + i for i, name in enumerate(names)} | {
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(ids))
    return directory


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments):
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out)


def test_tokens(capsys, photo):
    assert run_json(capsys, "tokens", photo) == {
        "width": 640,
        "height": 480,
        "tiling": [2, 2],
        "crops": 5,
        "pooled_windows": 980,
        "kept_windows": 772,
        "patch_tokens": 772,
        "total_tokens": 814,
    }
    assert run_json(capsys, "tokens", photo, "--max-crops", "1")["total_tokens"] == 424
    status, out, _ = run(capsys, "tokens", photo)
    assert status == 0 and "2 x 2" in out and "814" in out


def test_efficiency(capsys):
    report = run_json(capsys, "efficiency")
    assert report["tiles"] == 12 and len(report["rows"]) == 12
    rows = {(row["convention"], row["quantity"]): row for row in report["rows"]}
    assert rows["exact", "prefill_flops"]["ratio"] == pytest.approx(5.063, abs=1e-3)
    assert {row["source"] for row in report["rows"]} <= {"measured", "formula"}
    status, out, _ = run(capsys, "efficiency", "--tiles", "6")
    assert status == 0 and "prefill FLOPs" in out


def test_info(capsys):
    report = run_json(capsys, "info")
    assert (
        {"native", "triton", "versions"} <= set(report)
        and "ops" not in report
        and report["versions"]["torch"] == torch.__version__
    )
    status, out, _ = run(capsys, "info")
    assert status == 0 and "reference" in out
    if report["native"]["available"]:
        assert set(report["native"]["routes"]) == {"float32", "bfloat16", "float16"}
        assert "products as on" in out and report["native"]["family"].split(",")[0] in out


def test_info_of_ops(capsys):
    """What is printed is what is asked: one table for all who read it."""
    report = run_json(capsys, "info", "--ops")
    assert report["ops"] == support.rows()
    of_linear = {
        row["isa"]: row["bfloat16"] for row in report["ops"] if (row["op"], row["backend"]) == ("linear", "native")
    }
    if vlmkern.backends()["native"]["available"]:
        assert of_linear["avx512"] is None and of_linear["avx2"] is None
        (no_float64,) = {row["float64"] for row in report["ops"] if (row["op"], row["backend"]) == ("linear", "native")}
        assert no_float64 == "it has no kernel for torch.float64"
    status, out, _ = run(capsys, "info", "--ops")
    assert status == 0 and all(row["op"] in out for row in report["ops"])


def test_demo_with_random_weights(capsys, photo, tmp_path):
    report = run_json(
        capsys, "demo", photo, "--size", "tiny", "--max-new-tokens", "3", "--report", str(tmp_path / "out")
    )
    assert len(report["new_ids"]) == 3 and report["image_tokens"] == 814
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert set(stages) == {"image processing", "weights", "vision tower", "connector", "prefill", "decode"}
    assert stages["vision tower"]["tokens"] == 5 * 729 and stages["connector"]["tokens"] == 772
    assert stages["decode"]["tokens"] == 2 and all(stage["ms"] > 0 for stage in stages.values())
    assert {error["op"] for error in report["op_errors"]} == {"attention", "attention_pool", "linear", "swiglu_mlp"}
    assert all(0 < error["max_error"] < 0.02 * error["max_value"] for error in report["op_errors"])
    assert Image.open(report["picture"]).width >= 1000
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["new_ids"] == report["new_ids"]


def test_demo_table_and_note_on_the_prompt(capsys, photo, tmp_path):
    status, out, err = run(
        capsys,
        "demo",
        photo,
        "--size",
        "tiny",
        "--max-new-tokens",
        "1",
        "--prompt",
        "hi",
        "--report",
        str(tmp_path),
    )
    assert status == 0 and "vision tower" in out and "random (tiny)" in out
    assert "--prompt is not used" in err


def test_demo_with_a_checkpoint(capsys, photo, checkpoint, tmp_path):
    options = ("--checkpoint", str(checkpoint), "--max-new-tokens", "3", "--report", str(tmp_path))
    report = run_json(capsys, "demo", photo, *options)
    assert isinstance(report["answer"], str) and 1 <= len(report["new_ids"]) <= 3
    status, out, _ = run(capsys, "demo", photo, *options, "--prompt", "this image")
    assert status == 0 and "Answer:" in out


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "directory", "ratio"])
@pytest.mark.parametrize("command", ["tokens", "demo"])
def test_bad_images(capsys, tmp_path, photo, kind, command):
    path = tmp_path / "bad.png"
    content = {"empty": b"", "text": b"not a picture", "truncated": Path(photo).read_bytes()[:200]}
    if kind == "directory":
        path.mkdir()
    elif kind == "ratio":
        Image.new("RGB", (1000, 2)).save(path)
    elif kind in content:
        path.write_bytes(content[kind])
    options = ["--size", "tiny", "--report", str(tmp_path / "out")] if command == "demo" else []
    status, out, err = run(capsys, command, str(path), *options)
    assert status == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("vlmkern: error: ") and "Traceback" not in err


def test_bad_checkpoints(capsys, photo, tmp_path, checkpoint):
    for options in (
        ("--checkpoint", str(tmp_path / "none")),
        ("--checkpoint", str(tmp_path)),
        ("--checkpoint", str(checkpoint), "--prompt", "two <|image|> markers"),
    ):
        status, out, err = run(capsys, "demo", photo, *options, "--report", str(tmp_path / "out"))
        assert status == 2 and out == "" and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["tokens"],
        ["efficiency", "--tiles", "0"],
        ["efficiency", "--tiles", "x"],
        ["tokens", "a.png", "--max-crops", "-1"],
        ["demo", "--size", "huge"],
        ["demo", "--max-new-tokens", "-1"],
        ["tokens", "a.png", "b\nc.png"],
        ["info", "--tiles", "3"],
        ["aot", "--arch", "75"],
    ],
)
def test_bad_arguments(capsys, arguments):
    assert_argument_refused(capsys, arguments)


def assert_argument_refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("vlmkern: error: ") and len(captured.err.splitlines()) == 1
    assert len(captured.err) < 350


NUMBERS = (
    ("efficiency", "--tiles"),
    ("efficiency", "--sweep"),
    ("tokens", "a.png", "--max-crops"),
    ("demo", "--max-new-tokens"),
    ("aot", "--arch"),
)


@pytest.mark.parametrize("option", NUMBERS)
def test_what_is_no_number(capsys, option):
    for value in ("", "-1", "1.5", "1e3", "nan", "inf", "0x10", "three", "-" + "9" * 5000, "9" * 5000):
        assert_argument_refused(capsys, [*option, value])


@pytest.mark.parametrize("option", NUMBERS[:3])
def test_numbers_of_tiles_that_cannot_be(capsys, option):
    for value in ("0", "257", "100000", "1000000000", "1" + "0" * 30):
        assert_argument_refused(capsys, [*option, value])


@pytest.mark.parametrize("value", ["256", "+12", " 7 "])
def test_numbers_of_tiles_at_the_limits(capsys, photo, value):
    assert run(capsys, "tokens", photo, "--max-crops", value)[0] == 0


def assert_refused(result, *parts):
    status, out, err = result
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("vlmkern: error: "), err
    for part in parts:
        assert part in err


def test_more_new_tokens_than_the_model_can_read(capsys, photo, checkpoint, tmp_path):
    for more in ((), ("--checkpoint", str(checkpoint))):
        for number in ("40960", "9" * 30):
            options = ("--size", "tiny", *more, "--max-new-tokens", number, "--report", str(tmp_path / "out"))
            assert_refused(run(capsys, "demo", photo, *options), "--max-new-tokens: got", "expected at most 401")


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "missing", "empty name", "huge"])
@pytest.mark.parametrize("command", ["tokens", "demo"])
def test_images_that_are_no_files(capsys, tmp_path, kind, command):
    path = {"device": Path("/dev/zero"), "directory": tmp_path, "empty name": ""}.get(kind, tmp_path / "image.png")
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "huge":
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    options = ["--size", "tiny", "--report", str(tmp_path / "out")] if command == "demo" else []
    expected = {"pipe": "not a regular file", "device": "not a regular file", "directory": "is a directory"}
    expected |= {"huge": "1099511627776 bytes, more than a picture"}
    assert_refused(run(capsys, command, str(path), *options), expected.get(kind, "no such file"))


@pytest.mark.parametrize("kind", ["file", "under a file", "picture is a directory", "figures are a pipe"])
def test_reports_that_cannot_be_written(capsys, photo, tmp_path, kind):
    report = tmp_path / "out"
    if kind in ("file", "under a file"):
        report.touch()
    else:
        report.mkdir()
    if kind == "under a file":
        report /= "below"
    elif kind == "picture is a directory":
        (report / "tiling.png").mkdir()
    elif kind == "figures are a pipe":
        os.mkfifo(report / "demo.json")
    assert_refused(run(capsys, "demo", photo, "--size", "tiny", "--report", str(report)), str(report))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "text", "nested"])
def test_checkpoints_of_files_that_are_none(capsys, photo, checkpoint, tmp_path, name, kind):
    directory = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, directory)
    path = directory / name
    if not make_no_file(path, kind):
        path.write_bytes(b"\xff{" if kind == "text" else b'{"a":{{' * 100_000)
    result = run(capsys, "demo", photo, "--checkpoint", str(directory), "--report", str(tmp_path / "out"))
    assert_refused(result, "template" if name.endswith("jinja") else str(path))


@pytest.mark.parametrize("command", ["aot", "tune"])
def test_kernels_that_there_are_none_of(capsys, monkeypatch, command):
    pytest.importorskip("triton")
    monkeypatch.setattr("vlmkern.tune.device_arch", lambda: 90)
    assert_refused(run(capsys, command, "--kernel", "none"), "--kernel: got 'none'")


def test_an_empty_checkpoint_name_is_not_taken_for_none(capsys, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run(capsys, "demo", photo, "--checkpoint", "", "--report", "out"), "no config.json")


def test_as_a_program(photo):
    result = subprocess.run(
        [sys.executable, "-m", "vlmkern", "tokens", photo, "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0 and json.loads(result.stdout)["crops"] == 5
    result = subprocess.run([sys.executable, "-m", "vlmkern", "tokens", "/no/such.png"], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
