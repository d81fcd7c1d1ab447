"""The suites of tests/interpreted: Triton kernels on CPU, each in a process of its own, as TRITON_INTERPRET must be set
before triton is first imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SUITES = sorted((Path(__file__).parent / "interpreted").glob("check_*.py"))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem.removeprefix("check_"))
def test_interpreted(suite):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_files=check_*.py", str(suite)],
        # numpy and torch on many threads are slower on blocks of this size
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    # pytest's last line, so that the log says how much ran
    print(result.stdout.strip().splitlines()[-1])
