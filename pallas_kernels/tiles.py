"""The problem a kernel solves and the tile it solves it in: frozen data, and the one statement of the constraints."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels import tile_order
from pallas_kernels.device import HOPPER_SMEM_BYTES
from pallas_kernels.epilogue import Epilogue

Mode = Literal["dense", "rows", "columns", "contraction"]
"""What the groups split: nothing, the rows of A (tokens), the columns of B (tokens), or the contraction (tokens)."""
AForm = Literal["sparse", "k_major", "m_major"]
"""A is 2:4 along k, or dense as an array [m, k] or [k, m]."""

GRANULE = 64
"""Rows, and logical columns of A, that one metadata word per thread covers."""
TILE_K = 64
"""Logical columns of A in one stage of 16-bit operands: what one metadata word per thread covers."""
STAGE_BYTES = 128
"""Bytes of a row of B in one stage: the widest swizzle. 64 columns of 16 bits, 128 of 8."""
FP8 = ("float8_e4m3fn", "float8_e5m2")
"""Operands of 8 bits: any two may be multiplied."""
PROMOTE = 1024
"""Columns of A after which the sums of a product with a mean are promoted, unless the caller says else.

The tensor core keeps 13 fractional bits of a sum of 8-bit products and cuts the rest. Over 16384 columns of squares
times numbers with a mean that is a bias of 2 to 10 %; promoted every 1024 columns it is 0.2 to 0.5 % (docs/log.md).
"""
MAX_TILE = 256
"""The copy engine's largest box side."""
MAX_GROUPS = 128
SCALE_SLOTS = 4
"""Tiles whose scales may be in shared memory: one in the epilogue, one multiplied, and others ahead."""
ALIGNMENT = 1024
"""Bytes at a multiple of which each array in shared memory begins."""
BARRIER_BYTES = 8
STATIC_BYTES = 16
"""Shared memory that a kernel has beside what it asks for: the symbol that all of that hangs on, aligned."""
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
    b_type: str = ""
    """B's type where it is not A's: of 8 bits each may have its own."""
    promote: int = 0
    """Columns of A within which the tensor core's sums of 8-bit products must reach f32; 0: whenever."""

    @property
    def is_fp8(self) -> bool:
        """Whether the operands have 8 bits."""
        return self.dtype in FP8

    @property
    def tile_k(self) -> int:
        """Logical columns of A in one stage; groups of tokens start at multiples of it."""
        return tile_order.columns(self.dtype)

    @property
    def b_dtype(self) -> str:
        """B's type."""
        return self.b_type or self.dtype

    @property
    def packed_dtype(self) -> str:
        """The type to which a result that is packed is rounded before two of four are chosen."""
        return "bfloat16" if self.is_fp8 else self.dtype

    @property
    def scale_entries(self) -> tuple[int, int]:
        """Row scales (rows of A's side, over all groups) and column scales."""
        return self.m * (self.groups if self.mode == "contraction" else 1), self.n

    @property
    def stages_scales(self) -> bool:
        """Whether scales are copied to shared memory while the tile is multiplied (hopper/scales.py)."""
        e = self.epilogue
        return e.column_scale or (e.row_scale and self.is_fp8)

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
    promote: columns of A after which the tensor core's sums of 8-bit products are added to others in f32, a multiple
      of 256; 0: never.
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
    promote: int = 0

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
        """Shared memory that the kernel asks for: its arrays (`hopper.kernel._scratch`) and its barriers."""
        p, sparse = problem, problem.a == "sparse"
        parts = [
            self.stages * self.tile_m * STAGE_BYTES // (2 if sparse else 1),  # half of the columns or all
            self.stages * self.tile_m * p.tile_k // 8 if sparse else 0,
            self.stages * self.tile_n * STAGE_BYTES,
            self.warpgroups * self.chunks(p) * GRANULE * CHUNK_BYTES,
            2 * self.stages * BARRIER_BYTES,  # the ring's own
            3 * p.groups * 4 if p.mode == "contraction" else 0,
            self.stages * TILE_K * 4 if p.v else 0,
            SCALE_SLOTS * (self.tile_m + self.tile_n) * 4 if p.stages_scales else 0,
        ]
        return sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts) + self.barriers(p) * BARRIER_BYTES

    def barriers(self, problem: Problem) -> int:
        """Barriers beside the ring's: for slots that an operand or scales are read into, and for handing parts over."""
        slots = 0 if problem.is_fp8 and problem.epilogue.operand is None else self.warpgroups * self.store_slots
        slots += 2 * SCALE_SLOTS * problem.stages_scales
        return slots + (0 if problem.packing is None else 2 * self.warpgroups)

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
        copies = (2 if self.promote else 1) + (0.5 if self.deferred else 0)
        if self.promote and self.warpgroup_m * self.warpgroup_n * copies > 128 * 200:
            return f"{self.warpgroup_m} x {self.warpgroup_n}, {self.promote=}: two sums of a thread would spill"
        if self.promote % (2 * problem.tile_k) or (self.promote and not problem.is_fp8):
            return f"{self.promote=}, {problem.dtype}: an even number of stages, for operands of 8 bits"
        if problem.promote and not 0 < self.promote <= problem.promote:
            return f"{self.promote=}: the product wants its sums in f32 every {problem.promote} columns"
        if min(self.raster_m, self.raster_n) < 1:
            return f"{self.raster_m=}, {self.raster_n=}: a strip is at least one tile wide and a band one tile high"
        if self.stages < 2 or self.store_slots < 1:
            return f"{self.stages=}, {self.store_slots=}: at least two stages and one slot are needed"
        if not 0 <= self.gather_lag <= self.stages - 2:
            return f"{self.gather_lag=}, {self.stages=}: two stages must be with the tensor core or on the way there"
        limit = HOPPER_SMEM_BYTES - STATIC_BYTES
        if self.smem_bytes(problem) > limit:
            return f"{self.smem_bytes(problem)} bytes of shared memory exceed {limit}"
        if problem.groups > MAX_GROUPS:
            return f"{problem.groups=}: at most {MAX_GROUPS} groups, one per thread of a warpgroup"
        if problem.v and (problem.v % self.tile_m or self.tile_n not in GATHER_TILE_N):
            return (
                f"{self.tile_m=}, {self.tile_n=}, {problem.v=}: a tile that gathers lies in one block of v rows and "
                f"has {', '.join(map(str, GATHER_TILE_N))} columns"
            )
        if problem.v and (problem.mode != "dense" or problem.b_k_major or problem.m % problem.v):
            return f"{problem}: rows of B are gathered for whole blocks of v rows, without groups, from B [k, n]"
        if problem.v and problem.stages_scales:
            return f"{problem}: the warps that would fetch scales of columns gather rows of B"
        packs = problem.packing is not None
        if packs and not (problem.mode in ("dense", "columns") and problem.b_k_major and problem.transpose_out):
            return f"{problem}: what is packed are weights times tokens [n, k], whole or by columns, token-major"
        scales = dict.fromkeys(("row_scale", "column_scale", "powers_of_two"), False) if problem.is_fp8 else {}
        others: Any = {
            name: value for name, value in dataclasses.asdict(problem.epilogue).items() if name not in scales
        }
        if packs and (Epilogue(**others) != Epilogue() or problem.out_dtype != problem.packed_dtype):
            return f"{problem}: what is packed passes through no other epilogue, rounded to {problem.packed_dtype}"
        if problem.a != "sparse" and problem.mode == "dense" and not (packs or problem.is_fp8):
            return f"{problem}: a dense product is XLA's, unless it runs over groups or its result is packed"
        if packs and self.warpgroups == 2 and self.warpgroup_n > 192:
            return f"{self.warpgroup_n=}: four warpgroups begin with 128 registers a thread, too few for that product"
        if problem.b_interleaved and (problem.mode != "dense" or problem.b_k_major or problem.v):
            return f"{problem}: rows of B [k, n] are interleaved for a whole product"
        if (problem.mode == "rows" or problem.is_fp8) and problem.k % problem.tile_k:
            return f"{problem.k=} is no multiple of {problem.tile_k}: a step would reach into the next group's B"
        return self._fp8_violation(problem) if problem.is_fp8 else None

    def _fp8_violation(self, problem: Problem) -> str | None:
        """What `violation` says of operands of 8 bits alone."""
        if not problem.b_k_major or problem.a == "m_major":
            return f"{problem}: of 8 bits the tensor core reads A [m, k] and B [n, k] along k only"
        if problem.v or problem.b_interleaved:
            return f"{problem}: rows of B [k, n] are gathered or interleaved in 16 bits only"
        if problem.a != "sparse" and problem.mode in ("rows", "contraction"):
            return f"{problem}: a dense A of 8 bits is multiplied whole or by columns"
        return None

    def check(self, problem: Problem) -> None:
        """Raise ValueError if this tile cannot serve the problem."""
        if violation := self.violation(problem):
            raise ValueError(f"{self} does not fit: {violation}")


def chunk_columns(out_dtype: str) -> int:
    """Elements in a row of an output chunk."""
    return CHUNK_BYTES // jnp.dtype(out_dtype).itemsize
