"""Runs the checks of this directory, Triton kernels on CPU, in the interpreter, and reports each as a test of its own.

TRITON_INTERPRET must be set before triton is first imported. Where it is not, the checks are collected as tests are,
but those of a file run in a process of its own, started at the first of them, whose reports are given here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlmkern.kernels._interpreter import interpreting

# where the process writes its reports to
REPORTS = "VLMKERN_TEST_REPORTS"
# seconds for a file, which takes two minutes at most, on a machine with other work to do
LIMIT = 900

collect_ignore_glob = [] if find_spec("triton") else ["check_*.py"]

_reports: dict[Path, dict[str, list[pytest.TestReport]]] = {}
_config: pytest.Config


def pytest_configure(config):
    global _config
    _config = config


def pytest_collect_file(file_path, parent):
    # those named on the command line are collected whatever they are called
    if file_path.match("check_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_runtest_logreport(report):
    if REPORTS in os.environ:
        row = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        with open(os.environ[REPORTS], "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    # pytest asks for every item of a session, not for those of this directory alone
    if interpreting() or Path(__file__).parent not in item.path.parents:
        return None
    if item.path not in _reports:
        _reports[item.path] = _run([other for other in item.session.items if other.path == item.path])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports[item.path][item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run(items: list[pytest.Item]) -> dict[str, list[pytest.TestReport]]:
    """Reports of items of one file, by their ids; a failure of its own for what the process did not live to report."""
    root = items[0].config.rootpath
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={root}"]
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "reports"
        # numpy and torch on many threads are slower on blocks of this size
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", REPORTS: str(rows)}
        try:
            ids = [item.nodeid for item in items]
            child = subprocess.run(
                [*command, *ids], cwd=root, env=env, capture_output=True, text=True, errors="replace", timeout=LIMIT
            )
            end, output = f"ended with status {child.returncode}", child.stdout + child.stderr
        except subprocess.TimeoutExpired as error:
            end, output = f"was stopped after {LIMIT} s", (error.stdout or b"").decode(errors="replace")
        found: dict[str, list[pytest.TestReport]] = {item.nodeid: [] for item in items}
        for line in rows.read_text(encoding="utf-8").splitlines() if rows.exists() else ():
            report = _config.hook.pytest_report_from_serializable(config=_config, data=json.loads(line))
            # JSON has lists alone, where pytest asks for tuples
            report.location = tuple(report.location)
            if isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)
            found[report.nodeid].append(report)
    for item in items:
        reports = found[item.nodeid]
        if not reports or reports[-1].when != "teardown":
            told = f"the interpreter's process {end} before this was done:\n{output[-10_000:]}"
            reports.append(pytest.TestReport(item.nodeid, item.location, {}, "failed", told, "call"))
            # said once
            output = "see the first of these"
    return found
