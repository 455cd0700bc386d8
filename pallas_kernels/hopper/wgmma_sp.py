"""acc[m, n] += A[m, k] B[k, n] on Hopper's sparse tensor cores: `wgmma.mma_async.sp`, emitted as PTX.

Pallas has no sparse MMA for Hopper. The functions here run inside `plgpu.inline_mgpu`, below Pallas's arrays: `acc`
is a FragmentedArray in registers, the operands are tiled and swizzled views of shared memory.
"""

import importlib

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

# The package re-exports a function of the same name, which hides the module from a plain import.
_wgmma = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")

MMA_M = 64
"""Rows of one instruction."""
MMA_K = 32
"""Logical columns of A, and rows of B, of one instruction."""
TILE_K = 64
"""Logical columns of A that one metadata word per thread describes: two instructions."""

# A tile of A in shared memory: 64 rows of 64 bytes, swizzled over 64 bytes (tile_order.py).
_ROW_BYTES = 64
_TILE_BYTES = MMA_M * _ROW_BYTES

_PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}


def multiply(acc, a, metadata, b, *, b_swizzle: int, b_k_major: bool, dtype: str):
    """acc + A B for 64 columns of A, complete on return.

    Args:
      acc: f32 [m, n] in WGMMA layout, m a multiple of 64, n of 8 and at most 256.
      a: shared memory, [m / 64, 8, 256] stored values tile by tile (tile_order.py), or the same bytes as [m, 32] tiled
        (8, 32) and swizzled.
      metadata: shared memory, int32 [m / 64, 128]: one word per thread.
      b: shared memory, [64, n], or [n, 64] if `b_k_major`, tiled (8, b_swizzle / 2) and swizzled.
      dtype: "bfloat16" or "float16", of both operands.
    """
    if b_k_major:
        b = utils.memref_transpose(b, (1, 0, 3, 2))
    row_tiles = acc.shape[0] // MMA_M
    (k, n), _ = mma_utils.tiled_memref_shape(b)
    if k != TILE_K:
        raise ValueError(f"a stage holds {TILE_K} columns of A; b has {k} rows")
    b_tile = b_swizzle // 2  # elements of 16 bits in a swizzled row
    (b_base, b_strides), (_, b_tile_stride), b_fastest = mma_utils.create_descriptor(
        b, swizzle=b_swizzle, large_tile=(b_tile, b_tile), group_size=(b_tile, n), logical_k_major=True
    )
    if b_strides[0]:
        raise NotImplementedError("B must be tiled like its swizzle")
    (b_stride,) = b_strides[1]
    # The first offset has no meaning where rows are as long as the swizzle; the second leads to the next eight rows.
    a_base = mma_utils.encode_descriptor(
        a, leading_byte_offset=0, stride_byte_offset=8 * _ROW_BYTES, swizzle=_ROW_BYTES
    )

    words = _load_metadata(metadata, row_tiles)
    acc = _wgmma.wgmma_fence(acc.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT))
    registers = acc.registers.copy()
    for step in range(k // MMA_K):
        b_row = step * MMA_K
        b_offset = b_row // b_tile * b_tile_stride + b_row % b_tile // 16 * b_stride
        for row in range(row_tiles):
            a_offset = row * _TILE_BYTES + step * MMA_K  # half of the columns, two bytes each
            registers[row : row + 1] = _instruction(
                registers[row : row + 1],
                _advance(a_base, a_offset),
                _advance(b_base, b_offset),
                words[row],
                selector=step % 2,
                n=n,
                b_transposed=b_fastest != mma_utils.Dim.K,
                ptx_type=_PTX_TYPE[dtype],
            )
    _ptx("wgmma.commit_group.sync.aligned;")
    # Nothing of the loop may come between the products and this wait: the accumulators are values, and a register that
    # the compiler moves while the tensor core still writes it keeps an old sum (docs/log.md).
    _ptx("wgmma.wait_group.sync.aligned 0;")
    acc = fa.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=acc.is_signed)
    return acc.to_layout(fa.WGMMA_LAYOUT)


def _load_metadata(metadata, row_tiles: int):
    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    thread = arith.index_cast(index, arith.remui(utils.thread_idx(), arith.constant(i32, utils.WARPGROUP_SIZE)))
    return [memref.load(metadata, [arith.constant(index, row), thread]) for row in range(row_tiles)]


def _instruction(registers, a, b, word, *, selector: int, n: int, b_transposed: bool, ptx_type: str):
    count = n // 2  # f32 accumulators a thread holds
    outputs = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    a_ref, b_ref, word_ref = (f"${2 * count + i}" for i in range(3))
    ptx = (
        f"wgmma.mma_async.sp.sync.aligned.m{MMA_M}n{n}k{MMA_K}.f32.{ptx_type}.{ptx_type} "
        f"{outputs}, {a_ref}, {b_ref}, {word_ref}, {selector}, 1, 1, 1, 0, {int(b_transposed)};"
    )
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "r"]
    register = ir.VectorType.get((1,), ir.F32Type.get())
    result = llvm.inline_asm(
        llvm.StructType.get_literal([register] * count),
        [*registers.flat, a, b, word],
        ptx,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    assert isinstance(result, ir.Value)
    unpacked = [llvm.extractvalue(register, result, [i]) for i in range(count)]
    return np.array(unpacked, dtype=object).reshape(registers.shape)


def _advance(descriptor, num_bytes: int):
    if num_bytes == 0:
        return descriptor
    i64 = ir.IntegerType.get_signless(64)
    offset = llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, mma_utils.encode_addr(num_bytes))).result
    return llvm.add(descriptor, offset, overflow_flags=llvm.IntegerOverflowFlags.none)


def _ptx(instruction: str):
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, [], instruction, "", has_side_effects=True, asm_dialect=0)
