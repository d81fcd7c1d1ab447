"""Machine facts for the saved JSON, and one seed for all cases."""

import os

import pytest
import torch

import vlmkern


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["vlmkern"] = vlmkern.__version__
    machine_info["isa"] = vlmkern.backends()["native"]["isa"]
    machine_info["held_to"] = os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
