"""How fast a GPU issues `mma.sp` from registers alone: the ceiling of every kernel that is made of it."""

import statistics
import time

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith, gpu

from pallas_kernels import device
from pallas_kernels.hopper.mlir_words import Word, i32
from pallas_kernels.warp.tiles import MMA_K, MMA_M, MMA_N
from pallas_kernels.warp.words import MlirMachine

_ROWS, _COLUMNS = 4, 4
_WARPGROUPS = 2
_POSITIONS = 0x44E4944E
"""Some metadata word; and exponents near 1 in bf16 with the thread's own mantissa bits."""
_ONES, _MANTISSAS = 0x3F803F00, 0x007F007F


def instructions(blocks: int, iterations: int, dtype: str = "bfloat16"):
    """A function of nothing that issues `iterations` x 16 `mma.sp` in each of 8 warps of `blocks` blocks."""

    def body(out_gmem, shared_smem):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def thread(_, out, shared):
            m = MlirMachine({"out": utils.memref_ptr(out)}, utils.memref_ptr(shared), dtype, "float32")

            def operand(seed: int) -> list[Word]:
                mixed = [m.thread * 0x9E3779B1 + (seed + i) * 40503 for i in range(4)]
                return [(word & _MANTISSAS) | _ONES for word in mixed]

            a = [operand(16 * row) for row in range(_ROWS)]
            b = [operand(1000 + 16 * column) for column in range(_COLUMNS)]
            word = m.constant(_POSITIONS)

            def step(_: Word, sums: list) -> list:
                done = []
                for row in range(_ROWS):
                    for column in range(_COLUMNS):
                        at = 4 * (row * _COLUMNS + column)
                        done += m.multiply_sparse(sums[at : at + 4], a[row], b[column], word, 0)
                return done

            sums = m.loop(m.constant(iterations), [m.zero()] * (4 * _ROWS * _COLUMNS), step)
            total = sums[0]
            for real in sums[1:]:
                total = total + real
            block = Word(arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x)))
            threads = _WARPGROUPS * utils.WARPGROUP_SIZE
            true = m.equal(m.thread, m.thread)
            m.store_reals(m.pointer("out", (block * threads + m.thread, 4)), 0, [total], true)

        thread(out_gmem, shared_smem)

    return lambda: plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((blocks * _WARPGROUPS * utils.WARPGROUP_SIZE,), jnp.float32),
        scratch_types=[plgpu.SMEM((32,), jnp.int32)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )()


def teraflops(dtype: str = "bfloat16", iterations: int = 4000, rounds: int = 5) -> float:
    """The GPU's rate of the logical product: pruned entries count."""
    blocks, times = device.sm_count(), []
    run = jax.jit(instructions(blocks, iterations, dtype))
    jax.block_until_ready(run())
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    flops = 2 * MMA_M * MMA_N * MMA_K * _ROWS * _COLUMNS * iterations * 4 * _WARPGROUPS * blocks
    return 1e-12 * flops / statistics.median(times)
