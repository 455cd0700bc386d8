"""Problems that vnm is timed on: (m, n, k) x V x M, and where they come from."""

import dataclasses
import itertools

from pallas_kernels.vnm.shapes import Stored, stored

SIZES = ((16384, 4096, 4096), (8192, 16384, 2048), (4096, 4096, 4096), (1024, 4096, 4096))
"""Those that Spatha, the public kernel for older GPUs, was measured on too: an FFN's products, and two small ones."""
BLOCKS = (64, 128)
PATTERN_MS = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """out[m, n] = A[m, k] b[k, n] with A of the pattern pattern_v:2:pattern_m."""

    m: int
    n: int
    k: int
    pattern_v: int
    pattern_m: int

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k} V={self.pattern_v} M={self.pattern_m}"

    @property
    def stored(self) -> Stored:
        return stored(self.m, self.k, self.pattern_v, self.pattern_m)


def cases() -> dict[str, Case]:
    """Every size with every block height and M."""
    found = (Case(*size, v, m) for size, v, m in itertools.product(SIZES, BLOCKS, PATTERN_MS))
    return {case.name: case for case in found}
