"""Makes Triton's CPU interpreter (TRITON_INTERPRET=1) numerically right for bfloat16.

The interpreter keeps bfloat16 blocks as 16-bit integers. As of triton 3.6 to 3.9 a dot of such blocks
multiplies bit patterns, arithmetic and reductions work on bit patterns, and float32 -> bfloat16 truncates.
After `patch_interpreter()`, dots widen to float32, casts round to nearest even, and what would still work on bit
patterns raises instead of returning wrong numbers: kernels cast to float32 first, as they would for speed.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def interpreting() -> bool:
    """Whether kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def patch_interpreter() -> None:
    """Applies the corrections once; does nothing unless kernels are interpreted."""
    if not interpreting():
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_vlmkern_patched", False):
        return
    builder._vlmkern_patched = True
    _patch_casts(interpreter, builder)
    _patch_dot(interpreter, builder)
    _refuse_bit_arithmetic(interpreter, builder)
    _patch_index(interpreter)


def _is_bf16(handle: Any) -> bool:
    import triton.language as tl

    return handle.dtype.scalar == tl.bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _patch_casts(interpreter: Any, builder: type) -> None:
    import triton.language as tl

    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if _is_bf16(src) and target != tl.bfloat16:
            return plain_cast(self, interpreter.TensorHandle(_widen(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and not _is_bf16(src):
            return interpreter.TensorHandle(_narrow(src.data), target)
        return plain_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _patch_dot(interpreter: Any, builder: type) -> None:
    import triton.language as tl

    plain = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        a, b = (interpreter.TensorHandle(_widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return plain(self, a, b, accumulator, *rest)

    builder.create_dot = create_dot


def _refuse_bit_arithmetic(interpreter: Any, builder: type) -> None:
    def guarded(plain: Any) -> Any:
        def operation(self: Any, *operands: Any) -> Any:
            if any(isinstance(x, interpreter.TensorHandle) and _is_bf16(x) for x in operands):
                raise TypeError(
                    "bfloat16 arithmetic in Triton's interpreter works on bit patterns: cast to float32 first"
                )
            return plain(self, *operands)

        return operation

    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, guarded(getattr(builder, name)))

    reductions = interpreter.ReduceScanOpInterface
    plain_check = reductions.check_tensor

    def check_tensor(self: Any, inputs: Any) -> Any:
        for value in inputs if isinstance(inputs, (tuple, list)) else (inputs,):
            if _is_bf16(value.handle):
                raise TypeError(
                    "bfloat16 reductions in Triton's interpreter work on bit patterns: cast to float32 first"
                )
        return plain_check(self, inputs)

    reductions.check_tensor = check_tensor


def _patch_index(interpreter: Any) -> None:
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        # scalars are arrays of one element, which numpy >= 2.4 no longer converts to int
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
