"""Packed sparse matrices as frozen pytrees: validate, unpack, and an exact round trip."""

import dataclasses
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import metadata as hardware
from pallas_kernels import tile_order
from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.pack import reference as pack
from pallas_kernels.sparse24.reference import to_dense
from pallas_kernels.tile_order import from_tiles, to_tiles
from pallas_kernels.vnm import reference as vnm
from pallas_kernels.vnm.shapes import KEPT, Stored, stored
from venom_jax.pattern import Pattern


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
          ValueError: the length along `axis` is no multiple of 4, or `dense` is no matrix of floats.
        """
        check_matrix(dense)
        if axis not in (0, 1):
            raise ValueError(f"Sparse24.pack takes axis 0 or 1; got {axis=}.")
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
        _check_metadata(self.metadata, tiles)


class Kept(NamedTuple):
    """What a stored matrix keeps of the one it was made from."""

    density: Fraction
    """Stored entries over all entries: n / m."""
    energy: float
    """Share of the sum of squares that is stored."""
    columns: float
    """Share of the sum of squares in the chosen columns: what is kept before 2:4."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VNM:
    """A V:N:M matrix [R, C]: of each block of pattern.v x pattern.m four columns are kept, of those four two a row.

    The kept columns of a block of v rows, one block after another in ascending order, make the compressed matrix
    [R, 4 C / m], which is stored as a 2:4 matrix along its columns, both sizes padded (`pallas_kernels.vnm.shapes`).

    Attributes:
      values: [Rp/64, K/64, 8, 256] stored entries of the compressed matrix, tile by tile (`pallas_kernels.tile_order`);
        Rp is R rounded up to v, K is 4 C / m rounded up to 64.
      metadata: [Rp/64, K/64, 128] uint32, their positions among the four kept columns, in hardware order.
      columns: [Rp/v, K] int32, the column of the logical matrix that each compressed column is; C where it is padding.
      shape: (R, C).
      pattern: v, n and m.

    Source: Castro et al., arXiv 2310.02065.
    """

    values: Any  # no shape annotations here, as in Sparse24
    metadata: Any
    columns: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    pattern: Pattern = dataclasses.field(metadata={"static": True})

    @classmethod
    def pack(
        cls,
        dense: Float[Array, "R C"],
        columns: Int[Array, "blocks K"],
        pattern: Pattern,
        *,
        scores: Float[Array, "R C"] | None = None,
    ) -> "VNM":
        """Store two of each four kept entries of a row, by magnitude or by `scores`; ties go to the lower column.

        Exact where at most two of each four kept entries are non-zero and no others are: then `to_dense` returns the
        input (a -0.0 that is not stored comes back as +0.0).

        Args:
          columns: the kept columns, [ceil(R / v), 4 C / m], ascending inside each block (`venom_jax.prune`).

        Raises:
          ValueError: the pattern cannot be stored, `dense` is no matrix of floats, or sizes do not belong together.
        """
        check_matrix(dense)
        rows, num_columns = dense.shape
        sizes = stored(rows, num_columns, pattern.v, pattern.m)
        kept = KEPT * num_columns // int(pattern.m)
        if columns.shape != (sizes.blocks, kept) or not jnp.issubdtype(columns.dtype, jnp.integer):
            raise ValueError(
                f"columns of shape {columns.shape} and {columns.dtype}; {dense.shape} as {pattern} has "
                f"{(sizes.blocks, kept)}, integers."
            )
        if scores is not None and scores.shape != dense.shape:
            raise ValueError(f"scores of shape {scores.shape} for a matrix of shape {dense.shape}.")
        columns = jnp.pad(columns.astype(jnp.int32), ((0, 0), (0, sizes.columns - kept)), constant_values=num_columns)
        extra = ((0, sizes.rows - rows), (0, 0))
        compressed = vnm.gather_columns(jnp.pad(dense, extra), columns)
        ranked = compressed if scores is None else vnm.gather_columns(jnp.pad(scores, extra), columns)
        values, positions = pack.compress24(compressed, pack.select24(ranked))
        return cls(to_tiles(values), hardware.pack_positions(positions), columns, (rows, num_columns), pattern)

    def to_dense(self) -> Float[Array, "R C"]:
        """The logical matrix; +0.0 where nothing is stored."""
        rows, columns = self.shape
        return vnm.to_dense(self.values, self.metadata, self.columns, columns)[:rows]

    def take(self, dense: Float[Array, "R C"]) -> "VNM":
        """The entries of another matrix of this shape at the places that are stored here.

        Raises:
          ValueError: it has another shape.
        """
        self._check_same_shape(dense)
        padded = jnp.pad(dense, ((0, self.columns.shape[0] * self.pattern.v - dense.shape[0]), (0, 0)))
        compressed = vnm.gather_columns(padded, self.columns)
        values = to_tiles(pack.take24(compressed, hardware.unpack_positions(self.metadata)))
        return dataclasses.replace(self, values=values)

    def mask(self) -> Array:
        """True where an entry is stored, bool [R, C]; exactly n of each m in a row."""
        ones = jnp.ones_like(self.values)
        return dataclasses.replace(self, values=ones).to_dense() != 0

    def to_sparse24(self) -> Sparse24:
        """The same matrix as plain 2:4: every V:2:M matrix is one."""
        return Sparse24.pack(self.to_dense())

    @property
    def density(self) -> Fraction:
        return self.pattern.density

    def report(self, original: Float[Array, "R C"]) -> Kept:
        """What is kept of the matrix this one was made from (of a zero matrix, all).

        Raises:
          ValueError: `original` has another shape.
        """
        self._check_same_shape(original)
        a = original.astype(jnp.promote_types(original.dtype, jnp.float32))
        padded = jnp.pad(a, ((0, self.columns.shape[0] * self.pattern.v - a.shape[0]), (0, 0)))
        total = jnp.sum(jnp.square(a))
        energies = (jnp.where(self.mask(), a, 0), vnm.gather_columns(padded, self.columns))
        shares = [float(jnp.where(total > 0, jnp.sum(jnp.square(e)) / total, 1.0)) for e in energies]
        return Kept(self.density, *shares)

    def validate(self) -> None:
        """Raise ValueError unless sizes agree, columns ascend inside their blocks, and positions ascend."""
        rows, columns = self.shape
        sizes = stored(rows, columns, self.pattern.v, self.pattern.m)
        tiles = (sizes.rows // hardware.TILE, sizes.columns // hardware.TILE)
        if self.values.shape != (*tiles, *tile_order.SHAPE):
            raise ValueError(
                f"values of shape {self.values.shape}; {self.shape} as {self.pattern} needs "
                f"{(*tiles, *tile_order.SHAPE)}. Was it packed for another pattern?"
            )
        _check_metadata(self.metadata, tiles)
        self._check_columns(sizes)

    def _check_same_shape(self, other: Array) -> None:
        if other.shape != self.shape:
            raise ValueError(f"a matrix of shape {other.shape}; the stored one has {self.shape}.")

    def _check_columns(self, sizes: Stored) -> None:
        """Four ascending columns of every block of m, then nothing but the padding's index."""
        num_columns, m = self.shape[1], int(self.pattern.m)
        if self.columns.shape != (sizes.blocks, sizes.columns) or self.columns.dtype != jnp.int32:
            raise ValueError(
                f"columns of shape {self.columns.shape} and {self.columns.dtype}; {self.shape} as {self.pattern} "
                f"needs {(sizes.blocks, sizes.columns)}, int32."
            )
        kept = KEPT * num_columns // m
        place = jnp.arange(sizes.columns)
        first = jnp.where(place < kept, place // KEPT * m, num_columns)
        end = jnp.where(place < kept, first + m, num_columns + 1)
        outside = (self.columns < first) | (self.columns >= end)
        if outside.any():
            block, at = (int(i) for i in jnp.argwhere(outside)[0])
            where = f"in [{int(first[at])}, {int(end[at])})" if at < kept else f"{num_columns}, which marks padding"
            raise ValueError(f"block {block} has column {int(self.columns[block, at])} at place {at}; must be {where}.")
        fours = self.columns[:, :kept].reshape(sizes.blocks, -1, KEPT)
        wrong = (fours[..., 1:] <= fours[..., :-1]).any(-1)
        if wrong.any():
            block, group = (int(i) for i in jnp.argwhere(wrong)[0])
            raise ValueError(
                f"block {block} keeps columns {fours[block, group].tolist()} of its columns {group * m} to "
                f"{group * m + m - 1}; they must ascend without repetition."
            )


def check_matrix(a: Array) -> None:
    """Raise ValueError unless it is a matrix whose magnitudes can be compared by their bits."""
    if a.ndim != 2 or a.dtype.name not in _DTYPES:
        raise ValueError(f"a matrix of {', '.join(_DTYPES)} can be packed; got {a.dtype.name} of shape {a.shape}.")


_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _check_metadata(metadata: Array, tiles: tuple[int, ...]) -> None:
    """Raise ValueError unless the words have this shape and store two ascending positions in every group."""
    if metadata.shape != (*tiles, 128) or metadata.dtype != jnp.uint32:
        raise ValueError(f"metadata of shape {metadata.shape} and {metadata.dtype}; needs {(*tiles, 128)}, uint32.")
    positions = hardware.unpack_positions(metadata)
    wrong = positions[..., 0] >= positions[..., 1]
    if wrong.any():
        row, group = (int(i) for i in jnp.argwhere(wrong)[0])
        low, high = (int(p) for p in positions[row, group])
        raise ValueError(
            f"group {group} of row {row} stores positions ({low}, {high}); they must ascend. "
            "Was it packed with another layout?"
        )
