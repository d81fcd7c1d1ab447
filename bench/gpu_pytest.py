"""A pytest plugin that writes the outcome of each test to a ledger, and leaves out tests that it has."""

from __future__ import annotations

import time
from typing import Any

import pytest
from gpu_ledger import Ledger

# later tests of a process that has seen one of these say nothing
FATAL = ("CUDA error", "illegal memory access", "unspecified launch failure")


class Recorder:
    """The plugin.

    Attributes:
        lost: whether the process can no longer use its device.
    """

    def __init__(self, ledger: Ledger, until: float) -> None:
        self.ledger, self.until, self.lost = ledger, until, False
        self._found: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Those of bfloat16, and of no dtype, come first."""
        items.sort(key=lambda item: ("fp32" in item.nodeid) + 2 * ("fp16" in item.nodeid))
        self.ledger.announce([item.nodeid for item in items], "numerics")
        items[:] = [item for item in items if not self.ledger.settled(item.nodeid)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Notes that a test begins, unless the time is over."""
        if time.time() > self.until:
            pytest.exit("the step's time is over", returncode=0)
        self._found = {"outcome": "passed", "seconds": 0.0}
        self.ledger.begin(item.nodeid)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes how it ends."""
        found = self._found
        found["seconds"] = round(found["seconds"] + report.duration, 2)
        found |= dict(report.user_properties)
        if report.failed:
            text = report.longreprtext
            found |= {"outcome": "failed", "failed": text[-1500:]}
            self.lost = self.lost or any(words in text for words in FATAL)
        elif report.skipped:
            found["outcome"] = "skipped"
        if report.when == "teardown":
            self.ledger.end(report.nodeid, **found)
            if found["outcome"] == "failed":
                print(f"FAILED {report.nodeid}: {' '.join(found['failed'].split())[-300:]}", flush=True)
            if self.lost:
                pytest.exit("the device is lost", returncode=3)
