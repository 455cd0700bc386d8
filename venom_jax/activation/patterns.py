"""Which share of a token's activations stays: N of every M neighbours, or a number of them anywhere."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Scope = Literal["token", "batch"]

MAX_M = 64


@dataclass(frozen=True)
class NM:
    """Of every block of ``m`` neighbouring inputs exactly ``n`` stay.

    Raises:
      ValueError: unless 0 < n <= m <= 64.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n <= self.m <= MAX_M:
            raise ValueError(f"pattern {self.n}:{self.m}: N:M needs 0 < N <= M <= {MAX_M}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> Fraction:
        """The share of the inputs that stays."""
        return Fraction(self.n, self.m)

    def kept(self, size: int) -> int:
        """How many of ``size`` inputs stay.

        Raises:
          ValueError: ``size`` is no multiple of M.
        """
        if size % self.m:
            raise ValueError(f"a layer of {size} inputs is no multiple of {self.m}, as the pattern {self} needs")
        return size // self.m * self.n

    @property
    def index_bits(self) -> Fraction:
        """Bits an input that tell which ones stay: a number for the block's choice, rounded up."""
        return Fraction((math.comb(self.m, self.n) - 1).bit_length(), self.m)


@dataclass(frozen=True)
class Unstructured:
    """The share ``ratio`` of a token's inputs falls, wherever they stand; floor(I (1 - ratio)) stay.

    scope "batch" takes the largest of all tokens of a call together, as the published code does for some criteria:
    a token then keeps more or fewer, and which ones depends on the other tokens.

    Raises:
      ValueError: unless 0 <= ratio < 1.
    """

    ratio: float
    scope: Scope = "token"

    def __post_init__(self):
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio = {self.ratio}: the share of inputs to prune lies in [0, 1)")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope = {self.scope!r}: use one of {', '.join(map(repr, get_args(Scope)))}")

    def __str__(self) -> str:
        return f"{self.ratio * 100:g}%" + ("" if self.scope == "token" else " of the batch")

    @property
    def density(self) -> Fraction:
        """The share of the inputs that stays, before rounding down."""
        return 1 - Fraction(str(self.ratio))

    def kept(self, size: int) -> int:
        """How many of ``size`` inputs stay.

        Raises:
          ValueError: none does.
        """
        if not (kept := math.floor(size * self.density)):
            raise ValueError(f"pruning {self} of {size} inputs keeps none; prune less")
        return kept

    @property
    def index_bits(self) -> Fraction:
        """Bits an input that tell which ones stay: one, a bitmask."""
        return Fraction(1 if self.ratio else 0)


Pattern = NM | Unstructured


def parse_pattern(text: str) -> Pattern:
    """`8:16` or `50%`, the share that is pruned.

    Raises:
      ValueError: neither of the two, or out of range.
    """
    if found := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(\d{1,2}(?:\.\d{1,6})?)%", text):
        return Unstructured(float(Fraction(found[1]) / 100))
    raise ValueError(f"pattern {text!r}: write N:M, such as 8:16, or the share to prune, such as 50%")
