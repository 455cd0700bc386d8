"""For the owner of any GPU: python -m pallas_kernels.selftest. Under two minutes; paste what it prints into a report.

It compares each kernel with its plain form in jnp, on small integers, to the bit; then it times 2:4 products and the
layer against dense ones. The exit status is 1 if a result is wrong or a kernel did not run.
"""

import functools
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable

# The layer is timed by another process, which wants memory too. Read before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device, dispatch
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.measure import issue
from pallas_kernels.measure import warp as bench
from pallas_kernels.metadata import pack_positions
from pallas_kernels.pack import api
from pallas_kernels.permute import api as permute
from pallas_kernels.sparse24 import sparse24
from pallas_kernels.tile_order import to_tiles
from pallas_kernels.vnm import reference as vnm_reference
from pallas_kernels.vnm import vnm

RAGGED = (0, 1, 63, 64, 65, 300)
"""Rows of groups: none, one, and around the granule of 64."""
_PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def integers(*shape: int, seed: int = 0, dtype="bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), dtype)


def packed(m: int, k: int) -> tuple[jax.Array, jax.Array]:
    """A 2:4 matrix of small integers: sums are exact in any order."""
    positions = _PAIRS[np.random.default_rng(1).integers(0, 6, (m, k // 4))]
    return to_tiles(integers(m, k // 2, seed=2)), pack_positions(jnp.asarray(positions))


def cases() -> dict[str, tuple[Callable, tuple]]:
    """Functions of arrays and of `implementation`, by name."""
    sizes, groups, tokens = jnp.asarray(RAGGED, jnp.int32), len(RAGGED), 1024
    whole, add = packed(320, 512), Epilogue(operand="add")
    y, dy2 = integers(512, 320), integers(512, 320, seed=7)
    columns = jnp.asarray(np.random.default_rng(3).integers(0, 1025, (3, 256)), jnp.int32)

    def taken(y, dy2, implementation):
        found = api.pack_activations(y, features=True, tokens=True, interleaved=True, implementation=implementation)
        return found, api.take_activations(
            dy2, found.features, found.tokens, interleaved=True, implementation=implementation
        )

    def gathered(values, metadata, columns, b, implementation):
        if implementation == "reference":
            return vnm_reference.vnm(values, metadata, columns, b).astype(b.dtype)
        return vnm(values, metadata, columns, b, implementation=implementation)

    def added(values, metadata, b, operand, implementation):
        options = {"epilogue": add, "out_dtype": "float32", "implementation": implementation}
        return sparse24(values, metadata, b, operand=operand, **options)

    def call(function, *arrays, **options):
        return functools.partial(function, **options), arrays

    return {
        "sparse24 [k, n]": call(sparse24, *whole, integers(512, 200)),
        "sparse24 [n, k]": call(sparse24, *whole, integers(200, 512), b_k_major=True),
        "sparse24 transposed": call(sparse24, *whole, integers(512, 448), transpose_out=True),
        "sparse24 added in f32": call(added, *whole, integers(512, 200), integers(320, 200, dtype="float32")),
        "grouped24 rows": call(grouped.rows, *packed(tokens, 256), integers(groups, 256, 192), sizes),
        "grouped24 columns": call(
            grouped.columns, *packed(groups * 128, 256), integers(tokens, 256), sizes, b_k_major=True,
            transpose_out=True,
        ),
        "grouped24 contraction": call(
            grouped.contraction, *packed(192, tokens), integers(tokens, 320), sizes, out_dtype="float32"
        ),
        "vnm": call(gathered, *packed(384, 256), columns, integers(1024, 200)),
        "pack and take activations": call(taken, y, dy2),
        "pack weights": call(
            api.pack_thresholded, jax.random.normal(jax.random.key(0), (256, 320)), jnp.float32(1.5), axis=0,
            dtype="bfloat16",
        ),
        "gather rows": call(permute.gather_rows, y, jnp.arange(0, 1024, 2, dtype=jnp.int32) % 513),
        "sum copies": call(permute.sum_copies, y, jnp.arange(512, dtype=jnp.int32).reshape(256, 2)),
    }  # fmt: skip


def compare(function: Callable, arrays: tuple, implementation: str) -> str:
    """ "to the bit", or how many entries differ, or the error."""
    try:
        found, wanted = (
            jax.device_get(jax.jit(functools.partial(function, implementation=name))(*arrays))
            for name in (implementation, "reference")
        )
    except Exception as error:  # whatever the compiler or the driver says is what the report is for
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    different, entries = 0, 0
    for out, ref in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        out, ref = (np.asarray(array).astype(np.float64) for array in (out, ref))
        different, entries = different + int(np.sum(out != ref)), entries + out.size
    return f"WRONG: {different} of {entries} entries" if different else "to the bit"


def report_products() -> None:
    """2:4 against dense at four sizes."""
    peak = issue.teraflops()
    print(f"\nmma.sp bf16 from registers alone: {peak:.0f} TFLOP/s of the logical product")
    print("| m x n x k | what | ms | TFLOP/s | against dense |\n|---|---|---|---|---|")
    for m, n, k in bench.SIZES:
        times = bench.race_whole(m, n, k, (None,), k_major=False)
        for name, ms in sorted(times.items(), key=lambda item: item[1]):
            rate = 2e-9 * m * n * k / ms
            print(f"| {m} x {n} x {k} | {name} | {ms:.3f} | {rate:.0f} | {times['dense'] / ms:.2f}x |", flush=True)


def main() -> int:
    start, gpu = time.perf_counter(), device.current()
    print(f"jax {jax.__version__}, {gpu or 'no GPU'}")
    if gpu is None or gpu.family is None:
        print(f"There are no sparse tensor cores here; kernels run on {'; '.join(device.FAMILIES.values())}.")
        return 1
    print(f"family: {gpu.family}; chosen by itself: {dispatch.resolve(None)}")
    named = [name for name in ("hopper", "warp") if name != "hopper" or gpu.family == "hopper"]
    wrong = 0
    for implementation in named:
        for name, (function, arrays) in cases().items():
            verdict = compare(function, arrays, implementation)
            wrong += verdict != "to the bit"
            print(f"{implementation} {name}: {verdict}", flush=True)
    if not wrong:
        report_products()
    if importlib.util.find_spec("venom_jax") is not None:
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", "venom_jax.selftest"], check=False)
    print(f"\n{wrong} wrong; {time.perf_counter() - start:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
