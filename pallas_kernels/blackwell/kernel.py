"""out[m, n] = A[m, k] B[k, n] with A 2:4 sparse along k by `tcgen05.mma.sp`, for compute capability 10.x.

It compiles, with one or two CTAs to a tile; nobody has run it. The positions are the words of `pallas_kernels.metadata`
in another order (16 bit; `to_tcgen05`), so that an operand may be packed as for all other GPUs and permuted once.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.array_types import Array, Metadata

CTA_M = 128
"""Rows of A in one CTA: what a sparse product takes."""
TILE_N = 256
_STAGES = 2
_ROW_BYTES = 128
_STORED = 64
"""Columns of the result that are in registers at once."""
_METADATA_K = 128
"""Logical columns of a tile of positions."""


def to_tcgen05(metadata: Metadata) -> Array:
    """Words [m/64, k/64, 128] -> positions uint2 [m/128, k/128, 128, 64], as jax's tcgen05 wants them; 16-bit operands.

    A word holds rows g and g + 8 of 16 and 16 columns of 64 (metadata.py); there the words of 16 rows and 128 columns
    lie by h, then g, then column tile and s.
    """
    rows, columns, _ = metadata.shape
    if rows % 2 or columns % 2:
        raise ValueError(f"metadata {list(metadata.shape)}: want multiples of 128 rows and 128 columns")
    words = metadata.reshape(rows // 2, 2, columns // 2, 2, 4, 8, 2, 2)  # R, r, C, c, w, g, s, h
    words = words.transpose(0, 2, 1, 4, 7, 5, 3, 6).reshape(rows // 2, columns // 2, 128, 4)
    positions = words[..., None] >> (2 * jnp.arange(16, dtype=jnp.uint32)) & 3
    return positions.reshape(rows // 2, columns // 2, 128, 64).astype(jnp.uint2)


def matmul(values: Array, positions: Array, b: Array, *, b_k_major: bool = True, two_ctas: bool = False) -> Array:
    """Launch the kernel: out [m, n] in f32.

    Args:
      values: stored entries of A in rows [m, k / 2]: bfloat16, float16, or float8 (then B is k-major).
      positions: uint2 [m / 128, k / 128, 128, 64] (`to_tcgen05`; of 8 bits `plgpu.format_tcgen05_sparse_metadata`).
      b: [n, k] if `b_k_major`, else [k, n].
      two_ctas: two CTAs share a tile of 256 rows, each with half of B.

    Raises:
      ValueError: sizes that do not split into tiles.
    """
    m, k, itemsize = values.shape[0], 2 * values.shape[1], values.dtype.itemsize
    n, ctas, tile_k = b.shape[0 if b_k_major else 1], 2 if two_ctas else 1, 2 * _ROW_BYTES // itemsize
    if m % (ctas * CTA_M) or n % TILE_N or k % tile_k:
        raise ValueError(f"{m=}, {n=}, {k=}: want multiples of {ctas * CTA_M}, {TILE_N} and {tile_k}")
    if itemsize == 1 and not b_k_major:
        raise ValueError(f"{b_k_major=}: of 8 bits the tensor core reads B [n, k] only")
    axis, part_n, steps = ("cta" if two_ctas else None), TILE_N // ctas, k // tile_k

    def tiled(row_bytes: int) -> tuple:
        return plgpu.TilingTransform((8, row_bytes // itemsize)), plgpu.SwizzleTransform(row_bytes)

    b_shape = (part_n, tile_k) if b_k_major else (tile_k, part_n)
    scratch: dict[str, Any] = {
        "a": plgpu.SMEM((_STAGES, CTA_M, tile_k // 2), values.dtype, transforms=tiled(_ROW_BYTES)),
        "b": plgpu.SMEM((_STAGES, *b_shape), b.dtype, transforms=tiled(_ROW_BYTES)),
        "positions": plgpu.SMEM((_STAGES, 1, tile_k // _METADATA_K, 128, 64), jnp.uint2),
        "filled": plgpu.Barrier(num_arrivals=3, num_barriers=_STAGES),
        "multiplied": plgpu.Barrier(orders_tensor_core=True, num_barriers=_STAGES),
        "sums": plgpu.TMEM((CTA_M, TILE_N), jnp.float32, collective=two_ctas),
        "metadata": [
            plgpu.TMEM(
                (CTA_M, tile_k // 2), jnp.uint2, layout=plgpu.TMEMLayout.SPARSE_METADATA_LAYOUT, collective=two_ctas
            )
            for _ in range(_STAGES)
        ],
    }
    if two_ctas:
        scratch["both"] = plgpu.ClusterBarrier(collective_axes=("cta",))

    def body(values_gmem, positions_gmem, b_gmem, out_gmem, scratch):
        cta = lax.axis_index("cta") if two_ctas else 0
        row_tile = lax.axis_index("m") * ctas + cta
        rows = pl.ds(row_tile * CTA_M, CTA_M)
        columns = pl.ds(lax.axis_index("n") * TILE_N + cta * part_n, part_n)

        def load(step, slot):
            filled, first = scratch["filled"].at[slot], pl.ds(step * tile_k, tile_k)
            stored = pl.ds(step * (tile_k // 2), tile_k // 2)
            plgpu.copy_gmem_to_smem(values_gmem.at[rows, stored], scratch["a"].at[slot], filled)
            where = (columns, first) if b_k_major else (first, columns)
            plgpu.copy_gmem_to_smem(b_gmem.at[where], scratch["b"].at[slot], filled)
            words = pl.ds(step * (tile_k // _METADATA_K), tile_k // _METADATA_K)
            plgpu.copy_gmem_to_smem(positions_gmem.at[pl.ds(row_tile, 1), words], scratch["positions"].at[slot], filled)

        for stage in range(min(_STAGES, steps)):
            load(stage, stage)

        def multiply(step, slot: int):
            plgpu.barrier_wait(scratch["filled"].at[slot])
            if two_ctas:
                plgpu.barrier_arrive(scratch["both"])
                plgpu.barrier_wait(scratch["both"])
            metadata, right = scratch["metadata"][slot], scratch["b"].at[slot]
            plgpu.async_copy_sparse_metadata_to_tmem(scratch["positions"].at[slot], metadata, collective_axis=axis)
            plgpu.tcgen05_mma(
                scratch["sums"], scratch["a"].at[slot], plgpu.transpose_ref(right, (1, 0)) if b_k_major else right,
                scratch["multiplied"].at[slot], a_sparse_metadata=metadata, accumulate=step > 0, collective_axis=axis,
            )  # fmt: skip

        def refill(step, slot: int):
            """Once a stage is multiplied, the one that takes its place."""
            plgpu.barrier_wait(scratch["multiplied"].at[slot])

            @pl.when(step + _STAGES < steps)
            def _():
                load(step + _STAGES, slot)

        def pair(i, carry):
            """Two stages: while the second is multiplied, the first one's place is filled."""
            for slot in range(_STAGES):
                multiply(i * _STAGES + slot, slot)
                if slot:
                    refill(i * _STAGES + slot - 1, slot - 1)
            refill(i * _STAGES + _STAGES - 1, _STAGES - 1)
            return carry

        lax.fori_loop(0, steps // _STAGES, pair, jnp.int32(0))
        if steps % _STAGES:
            multiply(steps - 1, 0)
            plgpu.barrier_wait(scratch["multiplied"].at[0])
        for first in range(0, TILE_N, _STORED):
            part = pl.ds(lax.axis_index("n") * TILE_N + first, _STORED)
            out_gmem[rows, part] = plgpu.async_load_tmem(scratch["sums"].at[:, pl.ds(first, _STORED)])
            plgpu.wait_load_tmem()

    cluster: dict[str, Any] = {"cluster": (2,), "cluster_names": ("cta",)} if two_ctas else {}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
        scratch_types=[scratch],
        grid=(m // (ctas * CTA_M), n // TILE_N),
        grid_names=("m", "n"),
        **cluster,
    )(values, positions, b)
