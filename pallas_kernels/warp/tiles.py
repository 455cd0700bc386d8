"""The tile that one block of warps computes, the one statement of its limits, and the default for each GPU."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.tiles import MAX_GROUPS, TILE_K, Problem
from pallas_kernels.warp.words import PTX_TYPE

WARP_TILE = 64
"""Rows and columns of the output in one warp's registers: 128 accumulators a thread."""
MMA_M, MMA_N, MMA_K = 16, 8, 32
STAGING_BYTES = 2048
"""Shared memory of a warp through which its result leaves: 16 rows of 128 bytes."""
OUT_TYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class WarpTile:
    """How one block of warps covers the output; each warp takes 64 x 64 of it.

    warps_m, warps_n: warps down and across; four or eight in all.
    stages: stages of 64 logical columns in flight.
    ahead: blocks of 8 columns of B that are in registers before they are multiplied.
    raster_m, raster_n: as in `tiles.TileConfig`.
    blocks_per_sm: blocks that share a multiprocessor.
    """

    warps_m: int = 4
    warps_n: int = 2
    stages: int = 4
    ahead: int = 2
    raster_m: int = 4
    raster_n: int = 1024
    blocks_per_sm: int = 1

    @property
    def tile_m(self) -> int:
        return self.warps_m * WARP_TILE

    @property
    def tile_n(self) -> int:
        return self.warps_n * WARP_TILE

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def a_bytes(self) -> int:
        """Stored values of a stage: half of its columns, two bytes each."""
        return self.tile_m * TILE_K

    @property
    def metadata_bytes(self) -> int:
        return self.tile_m * TILE_K // 8

    @property
    def stage_bytes(self) -> int:
        return self.a_bytes + self.metadata_bytes + 2 * TILE_K * self.tile_n

    @property
    def ring_bytes(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def smem_bytes(self) -> int:
        return self.ring_bytes + self.warps * STAGING_BYTES

    def violation(self, problem: Problem, gpu: device.Gpu | None = None) -> str | None:
        """THE statement of what a tile must satisfy on a GPU (None: this one): the first broken rule, or None."""
        if self.warps not in (4, 8) or min(self.warps_m, self.warps_n) < 1:
            return f"{self.warps_m=}, {self.warps_n=}: a block has four or eight warps"
        if self.stages < 2 or not 1 <= self.ahead <= WARP_TILE // MMA_N:
            return f"{self.stages=}, {self.ahead=}: at least two stages, and at most the 8 blocks of a step ahead"
        if min(self.raster_m, self.raster_n, self.blocks_per_sm) < 1:
            return f"{self.raster_m=}, {self.raster_n=}, {self.blocks_per_sm=}: at least one"
        if problem.v and problem.v % self.tile_m:
            return f"{self.tile_m=}, {problem.v=}: a tile that gathers lies in one block of v rows"
        limit = (gpu or device.current_or_assumed()).smem_bytes // self.blocks_per_sm
        # The contraction sorts its groups there: three words of each, in whole KiB.
        tables = -(-12 * problem.groups // 1024) * 1024 * (problem.mode == "contraction")
        if self.smem_bytes + tables > limit:
            return f"{self.smem_bytes + tables} bytes of shared memory exceed {limit}, what this GPU gives a block"
        return unsupported(problem)

    def check(self, problem: Problem) -> None:
        """Raise ValueError if this tile cannot serve the problem."""
        if violation := self.violation(problem):
            raise ValueError(f"{self} does not fit: {violation}")


def unsupported(problem: Problem) -> str | None:
    """What the warp kernels do not compute, whatever the tile, in words; or None."""
    p = problem
    if p.dtype not in PTX_TYPE or p.b_dtype != p.dtype or p.out_dtype not in OUT_TYPES:
        return f"{p.dtype=}, {p.b_dtype=}, {p.out_dtype=}: operands are {' or '.join(PTX_TYPE)}, both the same"
    if p.a != "sparse" or p.packing is not None:
        return f"{p}: products with a 2:4 matrix only; results are packed by the packing kernels"
    if p.v and (p.mode != "dense" or p.b_k_major or p.b_interleaved or p.m % p.v):
        return f"{p}: rows of B are gathered for whole blocks of v rows, without groups, from B [k, n]"
    if p.k % TILE_K:
        return f"{p.k=} is no multiple of {TILE_K}"
    if p.b_interleaved and (p.mode != "dense" or p.b_k_major):
        return f"{p}: rows of B [k, n] are interleaved for a whole product"
    if p.groups > MAX_GROUPS:
        return f"{p.groups=}: at most {MAX_GROUPS} groups, one per thread of a warpgroup"
    itemsize = jnp.dtype(p.out_dtype).itemsize
    if p.out_shape[1] * itemsize % 16 or p.out_shape[0] % 8:
        return f"{p.out_shape}: rows of the output are multiples of 16 bytes, and there are a multiple of 8 of them"
    return None


def check_types(values: str, b: str) -> None:
    """Raise NotImplementedError for operands that `mma.sp` is not written for here, FP8 among them."""
    if values not in PTX_TYPE or values != b:
        raise NotImplementedError(
            f"the warp kernels multiply {' or '.join(PTX_TYPE)}, both operands the same; got {values} and {b}. "
            f"Cast, or use implementation='reference'."
        )


# The larger tile reads less of shared memory and L2 for each product; what fits is tried in this order. Only Hopper's
# order was measured (docs/gpus.md).
_TILES = (
    WarpTile(4, 2, stages=4),
    WarpTile(2, 2, stages=3, raster_m=8),
    WarpTile(2, 2, stages=2, raster_m=8),
    WarpTile(1, 4, stages=3, raster_m=1 << 10),
    WarpTile(1, 4, stages=2, raster_m=1 << 10),
)


def choose(problem: Problem, gpu: device.Gpu | None = None) -> WarpTile:
    """The tile for a problem on a GPU (None: this one): the first default that fits.

    Raises:
      ValueError: none does.
    """
    for tile in _TILES:
        if tile.violation(problem, gpu) is None:
            return tile
    raise ValueError(f"no tile fits {problem}: {_TILES[-1].violation(problem, gpu)}")
