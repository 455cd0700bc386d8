"""Words of 32 bits in MLIR with Python's operators, for code that is written for one thread."""

from collections.abc import Callable

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith


class Word:
    """An i32 of MLIR with the operators of an unsigned integer."""

    def __init__(self, value: ir.Value):
        self.value = value

    def _apply(self, operation: Callable, other: "Word | int", *, reverse: bool = False) -> "Word":
        pair = (self.value, to_value(other))
        return Word(operation(*(pair[::-1] if reverse else pair)))

    def __and__(self, other):
        return self._apply(arith.andi, other)

    def __or__(self, other):
        return self._apply(arith.ori, other)

    def __xor__(self, other):
        return self._apply(arith.xori, other)

    def __add__(self, other):
        return self._apply(arith.addi, other)

    def __sub__(self, other):
        return self._apply(arith.subi, other)

    def __mul__(self, other):
        return self._apply(arith.muli, other)

    def __floordiv__(self, other):
        return self._apply(arith.divui, other)

    def __mod__(self, other):
        return self._apply(arith.remui, other)

    def __lshift__(self, other):
        return self._apply(arith.shli, other)

    def __rshift__(self, other):
        return self._apply(arith.shrui, other)

    def __invert__(self):
        return self._apply(arith.xori, 0xFFFFFFFF)


def i32() -> ir.Type:
    """The type of a word."""
    return ir.IntegerType.get_signless(32)


def to_value(word: Word | int) -> ir.Value:
    """The MLIR value of a word or of a constant."""
    if isinstance(word, Word):
        return word.value
    return arith.constant(i32(), word - (1 << 32) if word >= 1 << 31 else word)
