"""The README's examples run as printed, and its tables name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vlmkern
from vlmkern.dispatch import table

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def example(heading, which=0):
    """The code under a heading."""
    _, section = README.split(f"\n## {heading}\n")
    return re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)[which]


def test_what_pictures_cost():
    *code, tokens, flops = example("Two commands").strip().splitlines()
    scope = {}
    exec("\n".join(code), scope)
    for line in (tokens, flops):
        expression, said = line.split("  # ")
        assert eval(expression, scope) == pytest.approx(float(said.split(";")[0]), rel=1e-3)


def test_the_drop_in_example_runs():
    scope = {}
    exec(example("Drop-in"), scope)
    assert scope["out"].shape == (10, 16, 72)


def test_the_model_example_names_what_exists(checkpoint_dir):
    code = example("Drop-in", 1)
    from vlmkern.models.jina_vlm import JinaVLM, JinaVLMProcessor

    for name in re.findall(r"JinaVLM\.(\w+)|model\.(generate)", code):
        assert hasattr(JinaVLM, "".join(name))
    for name in re.findall(r"processor\.(\w+)\(", code):
        assert hasattr(JinaVLMProcessor, name)


def test_the_patching_example_runs():
    scope = {}
    exec(example("In others' models"), scope)
    assert len(scope["report"]) == 3 * 12 + 2  # twelve blocks of three modules, and the pooling head's two


def test_the_training_example_runs():
    scope = {}
    exec(example("Training"), scope)
    assert [group["name"] for group in scope["optimizer"].param_groups] == ["tower", "connector", "decoder"]


def test_the_op_table_is_complete():
    table = {op for op in vlmkern.backends()["reference"]["ops"] if not op.endswith("_bwd")}
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) >= table


def test_every_environment_variable_is_documented():
    root = Path(vlmkern.__file__).parent
    used = set()
    for source in [*root.rglob("*.py"), *(root.parent / "csrc").rglob("*.cpp")]:
        used |= set(re.findall(r"\"(VLMKERN_[A-Z_]+)\"", source.read_text(encoding="utf-8")))
    assert used and used <= set(re.findall(r"`(VLMKERN_\w+)`", README))


def test_the_table_of_kernels_is_what_dispatch_says():
    if not vlmkern.backends()["native"]["available"]:
        pytest.skip(vlmkern.backends()["native"]["reason"])
    pytest.importorskip("triton")
    assert table.markdown() in README
