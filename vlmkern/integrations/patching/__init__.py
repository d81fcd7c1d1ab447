"""Swapping modules of others' models for ones that run on the ops, in place, and back: `vlmkern.patch`.

`patching` finds candidates and tries them, `swapped` is what a swapped module runs, and each of the other files has a
kind of module: how it is recognised, when it is left alone, and what it is computed with (`swap` says how).
"""

from .patching import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
