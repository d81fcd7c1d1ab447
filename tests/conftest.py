"""Fixtures shared by the suite."""

import os
import shutil

import pytest
import torch
from hypothesis import settings
from support import DATA

settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory):
    """checkpoint_dir("tiny378") is a checkpoint directory of that fixture."""

    def make(name):
        directory = tmp_path_factory.mktemp(name)
        shutil.copy(DATA / f"{name}.config.json", directory / "config.json")
        shutil.copy(DATA / f"{name}.safetensors", directory / "model.safetensors")
        return directory

    return make
