"""Products with a stored V:N:M matrix in plain jnp: the specification, the CPU path and the oracle."""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int, Metadata, accumulator
from pallas_kernels.pack.reference import compress24, select24
from pallas_kernels.sparse24.reference import to_dense as compressed_to_dense
from pallas_kernels.tile_order import from_tiles


def gather_columns(a: Float[Array, "R C"], columns: Int[Array, "blocks K"], fill: float = 0.0) -> Float[Array, "R K"]:
    """The compressed matrix: of each block of R / blocks rows the columns named for it, `fill` where an index is C."""
    blocks = a.reshape(columns.shape[0], -1, a.shape[1])

    def take(block, index):
        return block.at[:, index].get(mode="fill", fill_value=fill)

    return jax.vmap(take)(blocks, columns).reshape(a.shape[0], columns.shape[1])


def scatter_columns(
    compressed: Float[Array, "R K"], columns: Int[Array, "blocks K"], num_columns: int
) -> Float[Array, "R C"]:
    """The inverse of `gather_columns`: +0.0 in columns that are not named, entries at index C dropped.

    Only the places are scattered, the entries are gathered: XLA's scatter of whole matrices is slow on a GPU.
    """
    blocks = compressed.reshape(columns.shape[0], -1, compressed.shape[1])
    nowhere = compressed.shape[1]

    def put(block, index):
        place = (
            jnp.full(num_columns, nowhere, jnp.int32).at[index].set(jnp.arange(nowhere, dtype=jnp.int32), mode="drop")
        )
        return block.at[:, place].get(mode="fill", fill_value=0)

    return jax.vmap(put)(blocks, columns).reshape(compressed.shape[0], num_columns)


def to_dense(
    values: Float[Array, "R_64 K_64 8 256"], metadata: Metadata, columns: Int[Array, "blocks K"], num_columns: int
) -> Float[Array, "R C"]:
    """The logical matrix [R, num_columns] of a stored one; R with its padding."""
    return scatter_columns(compressed_to_dense(from_tiles(values), metadata), columns, num_columns)


def vnm(
    values: Float[Array, "R_64 K_64 8 256"],
    metadata: Metadata,
    columns: Int[Array, "blocks K"],
    b: Float[Array, "k n"],
    *,
    out_dtype=jnp.float32,
) -> Float[Array, "R n"]:
    """out[m, n] = sum_k A[m, k] b[k, n], accumulated in f32 (f64 for f64 operands).

    The hardware never multiplies a position that is not stored; here it meets b as a zero, as in sparse24.
    """
    return _dot(to_dense(values, metadata, columns, b.shape[0]), b).astype(out_dtype)


def transposed(
    values: Float[Array, "R_64 K_64 8 256"],
    metadata: Metadata,
    columns: Int[Array, "blocks K"],
    b: Float[Array, "R n"],
    num_columns: int,
    *,
    out_dtype=jnp.float32,
) -> Float[Array, "k n"]:
    """out[k, n] = sum_m A[m, k] b[m, n], as a dense product of the unpacked matrix."""
    return _dot(to_dense(values, metadata, columns, num_columns).T, b).astype(out_dtype)


def as_24(
    values: Float[Array, "R_64 K_64 8 256"], metadata: Metadata, columns: Int[Array, "blocks K"], num_columns: int
) -> tuple[Float[Array, "R C_2"], Int[Array, "R C_4 2"]]:
    """The same matrix as values and positions of plain 2:4: a row has at most two entries in any four columns.

    A stored zero may give its place to another zero: values are equal, the sign of a zero need not be.
    """
    dense = to_dense(values, metadata, columns, num_columns)
    return compress24(dense, select24(dense))


def _dot(a: Array, b: Array) -> Array:
    """a b in the accumulator's dtype: XLA's CPU backend lacks some 16-bit products with f32 results."""
    wide = accumulator(a.dtype)
    return jnp.dot(a.astype(wide), b.astype(wide), precision="highest")
