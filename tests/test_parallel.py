"""`vlmkern.parallel`, DDP and FSDP2 on two processes against one; the checks are in tests/parallel_worker.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import CHECKS, RANKS

from vlmkern.nn import SwiGLUMLP

WORKER = Path(__file__).parent / "parallel_worker.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), folder], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    errors = []
    for worker in workers:
        try:
            errors.append(worker.communicate(timeout=240)[1])
        except subprocess.TimeoutExpired:
            worker.kill()
            errors.append(worker.communicate()[1])
    results = [folder / f"{rank}.json" for rank in range(RANKS)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in results], errors


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_equal_one(found, check):
    results, errors = found
    for rank, result in enumerate(results):
        assert check in result, f"rank {rank} did not get so far: {errors[rank][-2000:]}"
        assert not result[check], f"rank {rank}: {result[check]}"


def test_without_torch_distributed():
    from vlmkern.parallel import tensor_parallel

    with pytest.raises(RuntimeError, match="not initialised, expected init_process_group"):
        tensor_parallel(SwiGLUMLP(4, 4), None)


def test_the_package_imports_no_torch_distributed():
    program = "import sys, vlmkern, vlmkern.models.jina_vlm\nprint([m for m in sys.modules if 'vlmkern.parallel' in m])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_readme_example_names_what_exists():
    import vlmkern.parallel

    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    names = re.search(r"from vlmkern.parallel import (.*)", readme)[1].split(", ")
    assert names and all(hasattr(vlmkern.parallel, name) for name in names)
    assert torch.distributed.is_available()
