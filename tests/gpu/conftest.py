"""Tests of this directory need a CUDA device, or, in a rehearsal, the interpreter in its place. They are run on
machines that have no more than torch, triton, pytest and rich, so nothing of the rest of the suite is asked for."""

import pytest
import torch

from vlmkern.kernels._interpreter import interpreting


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or interpreting():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
