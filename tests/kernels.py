"""Packed operands, oracles and problems for the tests of sparse24 and grouped24."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.metadata import pack_positions, unpack_positions
from pallas_kernels.pack.reference import compress24, decompress24, select24

LIMIT = {"bfloat16": 2e-3, "float16": 3e-4, "float32": 1e-5}
"""Norm-wise relative error allowed of a product accumulated in f32, by the dtype it is rounded to."""


def normal(seed: int, *shape: int, dtype="bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def pack(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """values [m, k/2] and metadata, padded to tiles of 64 x 64, of the two largest of each four."""
    values, positions = compress24(a, select24(a))
    padding = ((0, -positions.shape[0] % 64), (0, -positions.shape[1] % 16), (0, 0))
    return values, pack_positions(jnp.pad(positions, padding))


def dense(values: jax.Array, metadata: jax.Array) -> np.ndarray:
    """The logical matrix in f64."""
    positions = unpack_positions(metadata)[: values.shape[0], : values.shape[1] // 2]
    return np.asarray(decompress24(values, positions), np.float64)


def bounds(group_sizes, rows: int) -> list[tuple[int, int]]:
    """First and last row of each group: sizes rounded up to 64, cut at the end."""
    ends = np.minimum(np.cumsum([-(-max(int(size), 0) // 64) * 64 for size in group_sizes]), rows)
    return list(zip(np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist(), strict=True))


def oracle(mode: str, a: np.ndarray, b: np.ndarray, group_sizes) -> np.ndarray:
    """The grouped product by a loop over groups in f64. b: rows [G, k, n], columns [k, R], contraction [R, n]."""
    if mode == "rows":
        out = np.zeros((a.shape[0], b.shape[2]))
        for g, (start, end) in enumerate(bounds(group_sizes, a.shape[0])):
            out[start:end] = a[start:end] @ b[g]
        return out
    if mode == "columns":
        parts = a.reshape(len(group_sizes), -1, a.shape[1])
        out = np.zeros((parts.shape[1], b.shape[1]))
        for g, (start, end) in enumerate(bounds(group_sizes, b.shape[1])):
            out[:, start:end] = parts[g] @ b[:, start:end]
        return out
    return np.stack([a[:, start:end] @ b[start:end] for start, end in bounds(group_sizes, a.shape[1])])
