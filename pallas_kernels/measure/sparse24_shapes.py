"""Problems that sparse24 is timed and tuned on: (m, n, k), and where they come from."""

import dataclasses

from pallas_kernels.epilogue import Epilogue
from pallas_kernels.tiles import PROMOTE, Problem

# y1 and dy2 of an FFN with 2:4 weights (m = D or F of the weight), y3, dx and the weight gradients with 2:4 activations
# (m = tokens or F), for 16384 tokens of a model with D = 2048 or 4096; then batches too small for most kernels.
SIZES = (
    (16384, 4096, 4096),
    (16384, 16384, 4096),
    (8192, 16384, 2048),
    (4096, 16384, 4096),
    (1024, 4096, 4096),
    (512, 4096, 4096),
)

SMALL_SIZES = (
    *((m, 4096, 4096) for m in (256, 128, 64)),
    *((side, side, 4096) for side in (1024, 512, 256)),
    *((side, side, side) for side in (2048, 1024, 512, 256)),
    *((4096, 4096, k) for k in (512, 256, 128, 64)),
)
"""Few rows, few outputs, short contractions: where the dense product may win (`sparse24.dense_wins`)."""


def small_cases() -> dict[str, Problem]:
    """The sizes around the break-even with the dense product."""
    return {f"{m}x{n}x{k} b=nmajor": Problem(m, n, k) for m, n, k in SMALL_SIZES}


def cases() -> dict[str, Problem]:
    """Every size in both orders of B, and with a transposed output where the FFN writes one."""
    found = {}
    for m, n, k in SIZES:
        for b_k_major in (False, True):
            name = f"{m}x{n}x{k} b={'kmajor' if b_k_major else 'nmajor'}"
            found[name] = Problem(m, n, k, b_k_major=b_k_major)
    m, n, k = 8192, 16384, 2048
    found[f"{m}x{n}x{k} b=kmajor out=transposed"] = Problem(m, n, k, b_k_major=True, transpose_out=True)
    return found


def fp8_cases() -> dict[str, Problem]:
    """The sizes of an FFN with operands of 8 bits and scales of rows and columns; and as weight gradients, promoted."""
    scales = Epilogue(row_scale=True, column_scale=True, powers_of_two=True)
    found = {}
    for m, n, k in SIZES[:4]:
        problem = Problem(m, n, k, b_k_major=True, dtype="float8_e4m3fn", epilogue=scales)
        found[f"{m}x{n}x{k} fp8"] = problem
        found[f"{m}x{n}x{k} promoted fp8"] = dataclasses.replace(problem, promote=PROMOTE)
    return found
