"""The command line as a user meets it: tables, JSON, exit status, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from vlmkern.cli import main
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
    assert {"native", "triton", "cuda", "versions"} <= set(report) and report["versions"]["torch"] == torch.__version__
    status, out, _ = run(capsys, "info")
    assert status == 0 and "reference" in out


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
    ],
)
def test_bad_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_as_a_program(photo):
    result = subprocess.run(
        [sys.executable, "-m", "vlmkern", "tokens", photo, "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0 and json.loads(result.stdout)["crops"] == 5
    result = subprocess.run([sys.executable, "-m", "vlmkern", "tokens", "/no/such.png"], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
