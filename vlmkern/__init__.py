"""Fused attention, attention-pooling and SwiGLU kernels for vision-language models, as torch custom ops.

`vlmkern.ops` holds the ops, `vlmkern.nn` modules over them, `vlmkern.layers` forwards for the modules of others,
`vlmkern.models` the models assembled from those. Importing the package loads the CPU extension, but neither Triton nor
a GPU driver.
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from . import layers, ops
from .dispatch import BackendUnavailable, backends, explain, extension, use_backend
from .packing import PackReport, pack, unpack

__all__ = [
    "BackendUnavailable",
    "PackReport",
    "PatchReport",
    "__version__",
    "backends",
    "explain",
    "layers",
    "ops",
    "pack",
    "patch",
    "unpack",
    "unpatch",
    "use_backend",
]

if TYPE_CHECKING:
    from .integrations.patching import PatchReport, patch, unpatch

extension.load()


def __getattr__(name: str) -> Any:
    # what is above the models is imported when it is asked for, and may be left out of a copy of the package
    if name not in ("PatchReport", "patch", "unpatch"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations import patching

    return getattr(patching, name)
