"""How the checks of tests/interpreted are reported: each by itself, even where its process does not live to do so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CONFTEST = Path(__file__).parent / "interpreted" / "conftest.py"

SUITE = """
import os
import pytest
from vlmkern.kernels._interpreter import interpreting

@pytest.mark.parametrize("size", [1, 2, 3])
def test_sizes(size):
    assert interpreting() and size != 2, "two is wrong"

@pytest.fixture
def broken():
    raise ValueError("a broken fixture")

def test_of_a_fixture(broken):
    pass

def test_left_out():
    pytest.skip("of no use here")

@pytest.mark.skipif("DIES" not in os.environ, reason="lives")
def test_that_dies():
    os.abort()

def test_behind():
    pass
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "check_sample.py").write_text(SUITE)

    def run(*arguments, **env):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *arguments]
        kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        result = subprocess.run(command, cwd=tmp_path, env=kept | env, capture_output=True, text=True, timeout=300)
        return result, dict(re.findall(r"^check_sample\.py::(\S+) (\w+)", result.stdout, re.MULTILINE))

    return run


def test_each_check_is_reported_by_name(run):
    result, outcomes = run()
    assert result.returncode == 1
    assert outcomes == {
        "test_sizes[1]": "PASSED",
        "test_sizes[2]": "FAILED",
        "test_sizes[3]": "PASSED",
        "test_of_a_fixture": "ERROR",
        "test_left_out": "SKIPPED",
        "test_that_dies": "SKIPPED",
        "test_behind": "PASSED",
    }
    assert "two is wrong" in result.stdout and "a broken fixture" in result.stdout and "of no use" in result.stdout


def test_what_is_selected_runs_alone(run):
    result, outcomes = run("-k", "sizes and not 2")
    assert result.returncode == 0 and outcomes == {"test_sizes[1]": "PASSED", "test_sizes[3]": "PASSED"}
    result, outcomes = run("check_sample.py::test_behind")
    assert result.returncode == 0 and outcomes == {"test_behind": "PASSED"}


def test_a_check_that_ends_the_process_fails_and_so_do_those_behind_it(run):
    result, outcomes = run("-k", "size or dies or behind", DIES="1")
    assert result.returncode == 1
    assert outcomes["test_that_dies"] == outcomes["test_behind"] == "FAILED"
    assert outcomes["test_sizes[3]"] == "PASSED" and "ended with status -6" in result.stdout
