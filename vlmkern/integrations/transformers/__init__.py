"""vlmkern in transformers' models: `register()` for an attention implementation, `patch(model)` for whole blocks.

Needs transformers >= 4.57 (`pip install 'vlmkern[transformers]'`).
"""

from importlib import metadata as _metadata

try:
    _found = _metadata.version("transformers")
except _metadata.PackageNotFoundError as error:
    raise ImportError(
        "vlmkern.integrations.transformers needs transformers >= 4.57: pip install 'vlmkern[transformers]'"
    ) from error
if tuple(int(part) for part in _found.split(".")[:2]) < (4, 57):
    raise ImportError(
        f"vlmkern.integrations.transformers: got transformers {_found}, expected >= 4.57:"
        " pip install 'vlmkern[transformers]'"
    )

from ..patching import PatchReport, patch, unpatch
from .attention import register

__all__ = ["PatchReport", "patch", "register", "unpatch"]
