"""Packed sparse matrices as frozen pytrees: validate, unpack, and an exact round trip."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import metadata as hardware
from pallas_kernels import tile_order
from pallas_kernels.array_types import Array, Float
from pallas_kernels.pack import reference as pack
from pallas_kernels.sparse24.reference import to_dense
from pallas_kernels.tile_order import from_tiles, to_tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse24:
    """A 2:4 matrix: of each four neighbours along `axis` two are stored, with their positions.

    Packed with `axis` as the contraction: rows R are the other axis, columns C run along `axis`, both padded with
    zeros to a multiple of 64, the tensor core's tile.

    Attributes:
      values: [R/64, C/64, 8, 256] stored entries, tile by tile (`pallas_kernels.tile_order`), in order of position.
      metadata: [R/64, C/64, 128] uint32 positions in hardware order (`pallas_kernels.metadata`).
      shape: logical shape of the unpacked matrix.
      axis: 0 or 1, the axis of the logical matrix along which 2:4 runs.
    """

    values: Any  # no shape annotations here: transformations rebuild pytrees around batched or absent leaves
    metadata: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def pack(cls, dense: Float[Array, "rows columns"], axis: int = 1) -> "Sparse24":
        """Keep two of each four entries along `axis` by magnitude, ties to the lower index.

        Exact where at most two of each four are non-zero: then `to_dense` returns the input (a -0.0 that is not
        stored comes back as +0.0).

        Raises:
          ValueError: the length along `axis` is no multiple of 4, or `dense` has not two axes.
        """
        if dense.ndim != 2 or axis not in (0, 1):
            raise ValueError(f"Sparse24.pack takes a matrix and axis 0 or 1; got shape {dense.shape}, {axis=}.")
        if dense.shape[axis] % 4:
            raise ValueError(f"axis {axis} of shape {dense.shape} is no multiple of 4; pad the matrix first.")
        a = dense if axis == 1 else dense.T
        pad = [(0, -size % hardware.TILE) for size in a.shape]
        a = jnp.pad(a, pad)
        values, positions = pack.compress24(a, pack.select24(a))
        return cls(to_tiles(values), hardware.pack_positions(positions), (dense.shape[0], dense.shape[1]), axis)

    def to_dense(self) -> Float[Array, "rows columns"]:
        """The logical matrix; +0.0 where nothing is stored."""
        rows, columns = self.shape if self.axis == 1 else self.shape[::-1]
        a = to_dense(from_tiles(self.values), self.metadata)[:rows, :columns]
        return a if self.axis == 1 else a.T

    def validate(self) -> None:
        """Raise ValueError unless sizes agree and every group stores two positions in ascending order."""
        rows, columns = self.shape if self.axis == 1 else self.shape[::-1]
        tiles = tuple(-(-size // hardware.TILE) for size in (rows, columns))
        if self.values.shape != (*tiles, *tile_order.SHAPE):
            raise ValueError(f"values of shape {self.values.shape}; {self.shape=} needs {(*tiles, *tile_order.SHAPE)}.")
        if self.metadata.shape != (*tiles, 128) or self.metadata.dtype != jnp.uint32:
            raise ValueError(
                f"metadata of shape {self.metadata.shape} and {self.metadata.dtype}; needs {(*tiles, 128)}, uint32."
            )
        positions = hardware.unpack_positions(self.metadata)
        wrong = positions[..., 0] >= positions[..., 1]
        if wrong.any():
            row, group = (int(i) for i in jnp.argwhere(wrong)[0])
            low, high = (int(p) for p in positions[row, group])
            raise ValueError(
                f"group {group} of row {row} stores positions ({low}, {high}); they must ascend. "
                "Was it packed with another layout?"
            )
