"""The namespace of the ops, `torch.ops.vlmkern.*`: the one file that knows it."""

from __future__ import annotations

import re

import torch

# a copy of the package that is loaded under another name, as the `kernels` library does, registers ops of its own
NAMESPACE = re.sub(r"\W", "_", __package__)

library = torch.library.Library(NAMESPACE, "FRAGMENT")
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """An op's qualified name."""
    return f"{NAMESPACE}::{name}"
