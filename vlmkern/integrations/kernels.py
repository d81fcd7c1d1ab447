"""The package as a repository for Hugging Face's `kernels` library, to be loaded from a folder or uploaded as it is."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import torch

from .. import __version__
from ..dispatch.extension import reason_unavailable

_LEFT_OUT = ("__pycache__", "*.pyc", "cli", "examples", "data", "models", "efficiency", "integrations")


def write_repository(path: str | Path) -> Path:
    """Writes `build/<variant>/` for this machine's torch and platform under a folder: ops, layers and kernels with the
    compiled extension, without models and commands.

    Args:
        path: the repository; created if needed, an earlier variant of the same name is replaced.

    Returns:
        The variant's folder.

    Example:
        write_repository("vlmkern-kernels")
        kernel = kernels.get_local_kernel(Path("vlmkern-kernels"))
        mapping = {"SwiGLUMLP": {"cpu": kernels.LocalLayerRepository(
            repo_path=Path("vlmkern-kernels"), layer_name="SwiGLUMLP")}}
    """
    variant = Path(path) / "build" / variant_name()
    if variant.exists():
        shutil.rmtree(variant)
    source = Path(__file__).parent.parent
    shutil.copytree(source, variant, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    if reason_unavailable() is None:
        # an editable install keeps the extension elsewhere
        from .. import _C

        shutil.copy(_C.__file__, variant)
    backend = variant.name.split("-")[2].rstrip("0123456789")
    metadata = {
        "name": "vlmkern",
        "id": f"_vlmkern_{variant.name}_{__version__}".replace("-", "_").replace(".", "_"),
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": {"cu": "cuda"}.get(backend, backend)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    return variant


def variant_name() -> str:
    """Name of this machine's build variant, such as torch213-cxx11-cpu-x86_64-linux."""
    major, minor = torch.__version__.split(".")[:2]
    backend = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    return f"torch{major}{minor}-cxx11-{backend}-{platform.machine()}-{platform.system().lower()}"
