"""Everything here needs vLLM: `make test-vllm` runs it in an environment of its own, elsewhere it is skipped."""

from pathlib import Path

import pytest
from vllm_support import write_checkpoint

from vlmkern.integrations.vllm import unsupported

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    problem = unsupported()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if problem is not None:
                item.add_marker(pytest.mark.skip(reason=f"make test-vllm runs this: {problem}"))


@pytest.fixture(scope="session")
def served_checkpoint(tmp_path_factory):
    """A directory that vLLM can serve on CPUs."""
    return write_checkpoint(tmp_path_factory.mktemp("served") / "checkpoint")
