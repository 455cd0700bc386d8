"""The problem a kernel solves and the tile it solves it in: frozen data, and the one statement of the constraints."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.device import HOPPER_SMEM_BYTES
from pallas_kernels.epilogue import Epilogue

Mode = Literal["dense", "rows", "columns", "contraction"]
"""What the groups split: nothing, the rows of A (tokens), the columns of B (tokens), or the contraction (tokens)."""
AForm = Literal["sparse", "k_major", "m_major"]
"""A is 2:4 along k, or dense as an array [m, k] or [k, m]."""

GRANULE = 64
"""Rows, and logical columns of A, that one metadata word per thread covers: groups start at multiples of it."""
TILE_K = 64
"""Logical columns of A in one stage: what one metadata word per thread covers."""
MAX_TILE = 256
"""The copy engine's largest box side."""
MAX_GROUPS = 128
GROUP_TABLE_BYTES = 2048
"""The contraction's sorted groups in shared memory: group, start and size of each, rounded up to 1 KiB."""
LOAD_REGISTERS = 40
"""Registers of a loading thread."""
GATHER_REGISTERS = 72
"""... where it copies rows of B itself."""
PACK_REGISTERS = 120
"""Registers of a thread that packs the result."""
GATHER_TILE_N = (64, 128, 256)
"""Columns of a tile whose rows of B are gathered: a warp copies whole rows (hopper/gather.py)."""
CHUNK_BYTES = 128
"""Bytes of a row of an output chunk: the widest swizzle of the copy engine."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """The result, transposed, is y1 or dy2 of the FFN and is packed in the epilogue instead of being stored.

    gradient: dy2, of which entries are taken where y1's were kept; else y1, of which two of four are kept.
    features, tokens: along what.
    interleaved: which tokens make a four (pack/activations.py).
    """

    gradient: bool
    features: bool
    tokens: bool
    interleaved: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """out[m, n] = A[m, k] B[k, n], A 2:4 along k unless `a` says else; all sizes are multiples of 64 (callers pad).

    With groups, out of group g is (rows) A[rows of g] B[g k : (g + 1) k], (columns) A[g-th part of m] B[:, columns
    of g], (contraction) A[:, columns of g] B[rows of g]. m and k are A's whole sizes, n is that of B.
    """

    m: int
    n: int
    k: int
    mode: Mode = "dense"
    groups: int = 1
    b_k_major: bool = False
    transpose_out: bool = False
    dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    epilogue: Epilogue = dataclasses.field(default_factory=Epilogue)
    v: int = 0
    packing: Packing | None = None
    b_interleaved: bool = False
    a: AForm = "sparse"

    @property
    def out_shape(self) -> tuple[int, int]:
        rows = {"columns": self.m // self.groups, "contraction": self.m * self.groups}.get(self.mode, self.m)
        return (self.n, rows) if self.transpose_out else (rows, self.n)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How one block of threads covers the output.

    warpgroup_m, warpgroup_n: the part of the output in one warpgroup's registers.
    warpgroups_m, warpgroups_n: warpgroups that compute; one more loads.
    stages: stages in flight.
    store_slots: output chunks per warpgroup that may be on their way to memory.
    raster_m, raster_n: tiles are computed in strips `raster_n` tiles wide, each strip in bands `raster_m` tiles
      high, each band column by column: tiles computed at the same time share rows of A and columns of B in L2.
    deferred: a tile's result is kept in registers in 16 bits and stored chunk by chunk between the products of the
      next tile, while the other warpgroup multiplies. Where the result has 32 bits, or the epilogue reads an array, it
      is stored at once all the same.
    gather_lag: where rows of B are gathered (hopper/gather.py), 0: the copies announce a stage themselves; else their
      threads do, after so many more stages were begun.
    """

    warpgroup_m: int = 64
    warpgroup_n: int = 256
    warpgroups_m: int = 2
    warpgroups_n: int = 1
    stages: int = 4
    store_slots: int = 2
    raster_m: int = 8
    raster_n: int = 1024
    deferred: bool = False
    gather_lag: int = 0

    @property
    def tile_m(self) -> int:
        return self.warpgroup_m * self.warpgroups_m

    @property
    def tile_n(self) -> int:
        return self.warpgroup_n * self.warpgroups_n

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute."""
        return self.warpgroups_m * self.warpgroups_n

    def load_registers(self, problem: Problem) -> int:
        """Registers that a loading thread keeps."""
        return GATHER_REGISTERS if problem.v else LOAD_REGISTERS

    def compute_registers(self, problem: Problem) -> int:
        """Registers a computing thread may use once the loading warpgroup has given its own away."""
        left = 512 - self.load_registers(problem) - (0 if problem.packing is None else PACK_REGISTERS)
        return min(240, left // self.warpgroups // 8 * 8)

    def chunks(self, problem: Problem) -> int:
        """Output chunks in shared memory for each warpgroup: where the result is packed, all of its part."""
        return self.store_slots if problem.packing is None else self.warpgroup_m * self.warpgroup_n // GRANULE**2

    def smem_bytes(self, problem: Problem) -> int:
        sparse = problem.a == "sparse"
        a = self.tile_m * TILE_K * (1 if sparse else 2)  # half of the columns or all, two bytes each
        metadata = self.tile_m * TILE_K // 8 if sparse else 0
        b = self.tile_n * TILE_K * 2
        chunk = GRANULE * CHUNK_BYTES
        barriers = 1024
        return self.stages * (a + metadata + b) + self.warpgroups * self.chunks(problem) * chunk + barriers

    def index_bytes(self) -> int:
        """Shared memory of the ring's indices where rows are gathered, a word for each of a stage's, in whole KiB."""
        return -(-self.stages * TILE_K * 4 // 1024) * 1024

    def violation(self, problem: Problem) -> str | None:
        """THE statement of what a tile must satisfy: the first broken rule in words, or None."""
        if self.warpgroup_m not in (64, 128):
            return f"{self.warpgroup_m=}: a warpgroup takes 64 or 128 rows"
        if self.warpgroup_n % 64 or not 64 <= self.warpgroup_n <= 256:
            return f"{self.warpgroup_n=}: the instruction takes up to 256 columns, the swizzle a multiple of 64"
        if max(self.tile_m, self.tile_n) > MAX_TILE:
            return f"{self.tile_m=}, {self.tile_n=}: the copy engine moves boxes of at most {MAX_TILE} a side"
        if self.warpgroups not in (1, 2):
            return f"{self.warpgroups=}: the register file holds the accumulators of one or two warpgroups"
        if self.warpgroup_m * self.warpgroup_n > 128 * 192:
            return f"{self.warpgroup_m} x {self.warpgroup_n}: more than 192 accumulators a thread would spill"
        if self.deferred and self.warpgroup_m * self.warpgroup_n > 128 * 128:
            return f"{self.warpgroup_m} x {self.warpgroup_n}, deferred: two results of a thread would spill"
        if min(self.raster_m, self.raster_n) < 1:
            return f"{self.raster_m=}, {self.raster_n=}: a strip is at least one tile wide and a band one tile high"
        if self.stages < 2 or self.store_slots < 1:
            return f"{self.stages=}, {self.store_slots=}: at least two stages and one slot are needed"
        if not 0 <= self.gather_lag <= self.stages - 2:
            return f"{self.gather_lag=}, {self.stages=}: two stages must be with the tensor core or on the way there"
        tables = GROUP_TABLE_BYTES * (problem.mode == "contraction") + self.index_bytes() * bool(problem.v)
        if self.smem_bytes(problem) + tables > HOPPER_SMEM_BYTES:
            return f"{self.smem_bytes(problem) + tables} bytes of shared memory exceed {HOPPER_SMEM_BYTES}"
        if problem.groups > MAX_GROUPS:
            return f"{problem.groups=}: at most {MAX_GROUPS} groups, one per thread of a warpgroup"
        if problem.v and (problem.v % self.tile_m or self.tile_n not in GATHER_TILE_N):
            return (
                f"{self.tile_m=}, {self.tile_n=}, {problem.v=}: a tile that gathers lies in one block of v rows and "
                f"has {', '.join(map(str, GATHER_TILE_N))} columns"
            )
        if problem.v and (problem.mode != "dense" or problem.b_k_major or problem.m % problem.v):
            return f"{problem}: rows of B are gathered for whole blocks of v rows, without groups, from B [k, n]"
        packs = problem.packing is not None
        if packs and not (problem.mode in ("dense", "columns") and problem.b_k_major and problem.transpose_out):
            return f"{problem}: what is packed are weights times tokens [n, k], whole or by columns, token-major"
        if packs and (problem.epilogue != Epilogue() or problem.out_dtype != problem.dtype):
            return f"{problem}: what is packed passes through no other epilogue, and is rounded to the operands' type"
        if problem.a != "sparse" and not packs and problem.mode == "dense":
            return f"{problem}: a dense product is XLA's, unless it runs over groups or its result is packed"
        if packs and self.warpgroups == 2 and self.warpgroup_n > 192:
            return f"{self.warpgroup_n=}: four warpgroups begin with 128 registers a thread, too few for that product"
        if problem.b_interleaved and (problem.mode != "dense" or problem.b_k_major or problem.v):
            return f"{problem}: rows of B [k, n] are interleaved for a whole product"
        if problem.mode == "rows" and problem.k % TILE_K:
            return f"{problem.k=} is no multiple of {TILE_K}: a step would reach into the next group's B"
        return None

    def check(self, problem: Problem) -> None:
        """Raise ValueError if this tile cannot serve the problem."""
        if violation := self.violation(problem):
            raise ValueError(f"{self} does not fit: {violation}")


def chunk_columns(out_dtype: str) -> int:
    """Elements in a row of an output chunk."""
    return CHUNK_BYTES // jnp.dtype(out_dtype).itemsize
