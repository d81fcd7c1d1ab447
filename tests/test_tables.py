"""VLMKERN_TABLES: tables of one's own before the shipped ones."""

from __future__ import annotations

import json

import pytest
import torch
from tune_support import NAME, fresh_tables

pytest.importorskip("triton")

from vlmkern.kernels import _launch

__all__ = ["fresh_tables"]

pytestmark = pytest.mark.usefixtures("fresh_tables")

SHAPE = {"rows": 2548, "features": 6144}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMKERN_TABLES", str(tmp_path))
    return tmp_path


def chosen(name=NAME, shape=SHAPE):
    return _launch.select(name, torch.empty(1, dtype=torch.bfloat16, device="meta"), **shape)


def put(folder, **change):
    table = _launch.table(NAME, 90) | change
    path = folder / "sm_90" / f"{NAME}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(table))
    return path


def test_a_table_there_wins(folder):
    config = {"BLOCK": 128, "num_warps": 1}
    put(folder, entries=[{"bits": 16, "shape": SHAPE, "config": config}])
    assert chosen() == config
    # what it has none for is as shipped
    shipped = json.loads((_launch.TABLES / "sm_90" / "swiglu_mlp_bwd_kernel.json").read_text())
    assert chosen("swiglu_mlp_bwd_kernel") == shipped["default"]["16"]
    assert _launch.table(NAME, 80)["entries"] == []


def test_a_folder_that_is_given_goes_before(folder, tmp_path_factory):
    put(folder, source="of the variable")
    other = tmp_path_factory.mktemp("other")
    assert _launch.table(NAME, 90, other)["source"] == "of the variable"
    put(other, source="of the folder")
    assert _launch.table(NAME, 90, other)["source"] == "of the folder"


def test_it_is_read_once(folder, monkeypatch):
    assert chosen()["BLOCK"] == 2048
    monkeypatch.setenv("VLMKERN_TABLES", "/no/such/folder")
    assert chosen(shape=SHAPE | {"rows": 9}) is not None


def test_empty_is_none(monkeypatch):
    monkeypatch.setenv("VLMKERN_TABLES", "")
    assert chosen()["BLOCK"] == 2048


@pytest.mark.parametrize("kind", ["none", "file"])
def test_no_directory(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLMKERN_TABLES", str(tmp_path / kind))
    with pytest.raises(ValueError, match=f"VLMKERN_TABLES: got '{tmp_path / kind}', expected a directory"):
        chosen()


CONFIG = {"BLOCK": 128, "num_warps": 1}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kernel": "other"}, f"expected the table of {NAME} for sm_90"),
        ({"arch": 80}, f"expected the table of {NAME} for sm_90"),
        ({"source": None}, 'expected "source"'),
        ({"default": {"16": CONFIG}}, '"default": got null for 32 bits'),
        ({"default": {"16": {"num_warps": 4}, "32": CONFIG}}, '"default": got {"num_warps": 4} for 16 bits'),
        ({"entries": [{"bits": 16, "shape": SHAPE}]}, '"entries": got {"bits": 16'),
        ({"entries": [{"bits": 8, "shape": SHAPE, "config": CONFIG}]}, '"entries": got {"bits": 8'),
        ({"entries": [{"bits": 16, "shape": {}, "config": CONFIG}]}, '"entries": got {"bits": 16'),
        ({"entries": [{"bits": 16, "shape": SHAPE, "config": {"BLOCK": "1"}}]}, '"entries": got {"bits": 16'),
        ({"entries": [{"bits": 16, "shape": {"rows": 0}, "config": CONFIG}]}, "expected positive integers"),
        ({"entries": [{"bits": 16, "shape": {"tokens": 1}, "config": CONFIG}]}, "expected rows, features"),
        ({"entries": [3]}, '"entries": got 3'),
    ],
)
def test_a_table_that_is_none(folder, change, said):
    put(folder, **change)
    with pytest.raises(ValueError) as error:
        chosen()
    assert said in str(error.value) and (str(folder) in str(error.value) or "the table of" in str(error.value))


def test_no_json(folder):
    path = put(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path}: is not JSON"):
        chosen()
