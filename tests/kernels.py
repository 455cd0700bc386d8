"""Packed operands, oracles and problems for the tests of sparse24 and grouped24."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import is_fp8
from pallas_kernels.metadata import pack_positions, unpack_positions
from pallas_kernels.pack.reference import compress24, decompress24, select24
from pallas_kernels.tile_order import columns

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
LIMIT = {"bfloat16": 2e-3, "float16": 3e-4, "float32": 1e-5}
"""Norm-wise relative error allowed of a product accumulated in f32, by the dtype it is rounded to."""
LIMIT8 = LIMIT | {"float16": 6e-4, "float32": 1e-3}
"""... of 8-bit operands on the tensor core, which keeps 13 fractional bits of their sums: 5.5e-4 on an H200 for
1,024 columns of a dense A."""


def normal(seed: int, *shape: int, dtype="bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def limit(out_dtype: str, dtype: str) -> float:
    """The error allowed of a kernel's product of operands in `dtype`."""
    return (LIMIT8 if is_fp8(dtype) else LIMIT)[out_dtype]


def pack(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """values [m, k/2] and metadata, padded to tiles of 64 x 64, of the two largest of each four."""
    wide = a.astype(jnp.float32) if is_fp8(a.dtype) else a
    values, positions = compress24(wide, select24(wide))
    padding = ((0, -positions.shape[0] % 64), (0, -positions.shape[1] % 16), (0, 0))
    return values.astype(a.dtype), pack_positions(jnp.pad(positions, padding), a.dtype)


def dense(values: jax.Array, metadata: jax.Array) -> np.ndarray:
    """The logical matrix in f64."""
    positions = unpack_positions(metadata, values.dtype)[: values.shape[0], : values.shape[1] // 2]
    return np.asarray(decompress24(values, positions), np.float64)


def bounds(group_sizes, rows: int, dtype="bfloat16") -> list[tuple[int, int]]:
    """First and last row of each group: sizes rounded up to 64, of 8 bits to 128, cut at the end."""
    unit = columns(dtype)
    ends = np.minimum(np.cumsum([-(-max(int(size), 0) // unit) * unit for size in group_sizes]), rows)
    return list(zip(np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist(), strict=True))


def oracle(mode: str, a: np.ndarray, b: np.ndarray, group_sizes, dtype="bfloat16") -> np.ndarray:
    """The grouped product by a loop over groups in f64. b: rows [G, k, n], columns [k, R], contraction [R, n]."""
    if mode == "rows":
        out = np.zeros((a.shape[0], b.shape[2]))
        for g, (start, end) in enumerate(bounds(group_sizes, a.shape[0], dtype)):
            out[start:end] = a[start:end] @ b[g]
        return out
    if mode == "columns":
        parts = a.reshape(len(group_sizes), -1, a.shape[1])
        out = np.zeros((parts.shape[1], b.shape[1]))
        for g, (start, end) in enumerate(bounds(group_sizes, b.shape[1], dtype)):
            out[:, start:end] = parts[g] @ b[:, start:end]
        return out
    return np.stack([a[:, start:end] @ b[start:end] for start, end in bounds(group_sizes, a.shape[1], dtype)])
