"""Makes bfloat16 right in Triton's interpreter, which truncates where the hardware rounds to nearest even, and calls between jitted
functions quick (3.6.0 to 3.9.0).

Import with TRITON_INTERPRET=1 before any kernel runs. The interpreter holds a bfloat16 as its bits in a uint16; arithmetic and
casts are done here on the float32 numbers they stand for. It replaces the language's functions by its own at a kernel's launch and
again at every call of a jitted function, which takes a third of all time: here, only where they are not replaced yet.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 from the bits of bfloat16."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 from float32, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _mend() -> None:
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    binary, unary, convert = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, to):
        if source.dtype.scalar == to.scalar:
            return TensorHandle(source.data, to.scalar)
        if _is_bf16(source):
            return cast_impl(self, _wide(source), to)
        if to.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def binary_op(self, left, right, operation):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary(self, left, right, operation)
        result = operation(widen(left.data), widen(right.data))
        return TensorHandle(result, tl.int1) if operation in COMPARISONS else TensorHandle(narrow(result), tl.bfloat16)

    def unary_op(self, value, operation):
        return TensorHandle(narrow(operation(widen(value.data))), tl.bfloat16) if _is_bf16(value) else unary(self, value, operation)

    def fp_to_fp(self, source, to, rounding=None):
        floats = {tl.bfloat16, tl.float32, tl.float16}
        if tl.bfloat16 in (source.dtype.scalar, to.scalar) and {source.dtype.scalar, to.scalar} <= floats:
            return cast_impl(self, source, to)
        return convert(self, source, to, rounding)

    InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op = cast_impl, binary_op
    InterpreterBuilder.unary_op, InterpreterBuilder.create_fp_to_fp = unary_op, fp_to_fp
    InterpreterBuilder.create_dot = lambda self, a, b, d, *rest: dot(self, _wide(a), _wide(b), d, *rest)
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(InterpreterBuilder, f"create_{name}", lambda self, source, to: cast_impl(self, source, to))


def _quicken() -> None:
    call = InterpretedFunction.__call__

    def quick_call(self, *args, **kwargs):
        languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        replaced = not any(tl.core.is_builtin(language.load) for language in languages)
        return self.rewrite()(*args, **kwargs) if replaced else call(self, *args, **kwargs)

    InterpretedFunction.__call__ = quick_call


_mend()
_quicken()
