"""Fused attention, attention-pooling and SwiGLU kernels for vision-language models, as torch custom ops.

`vlmkern.ops` holds the ops, `vlmkern.nn` modules over them, `vlmkern.layers` forwards for the modules of others,
`vlmkern.models` the models assembled from those. Importing the package loads no kernel backend and touches no GPU
driver.
"""

__version__ = "0.1.0"

from . import layers, ops
from ._backends import BackendUnavailable, backends, use_backend

__all__ = ["BackendUnavailable", "__version__", "backends", "layers", "ops", "use_backend"]
