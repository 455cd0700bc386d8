"""Problems that grouped24 is timed and tuned on: routed FFNs of 16384 tokens, E experts, and their group sizes."""

import dataclasses

import numpy as np

from pallas_kernels.epilogue import Epilogue
from pallas_kernels.tiles import GRANULE, PROMOTE, Mode, Problem

TOKENS = 16384
LAYERS = ((2048, 8192), (4096, 16384))
"""(D, F) of the layers in the paper's 1b and 7b models, rounded to powers of two."""
EXPERTS = (4, 8, 16)
MODES: tuple[Mode, ...] = ("rows", "columns", "contraction")


@dataclasses.dataclass(frozen=True)
class Case:
    """A grouped problem, its group sizes, and the (T, D, F) of the full dense product it is compared with."""

    problem: Problem
    group_sizes: tuple[int, ...]
    full: tuple[int, int, int]


def cases(*, fp8: bool = False) -> dict[str, Case]:
    """Every layer, number of experts and mode, with equal and with ragged groups."""
    return {
        f"E={experts} D={d_model} F={d_ffn} mode={mode} sizes={sizes}" + " fp8" * fp8: Case(
            problem(mode, experts, d_model, d_ffn, fp8=fp8),
            equal_sizes(experts) if sizes == "equal" else ragged_sizes(experts, fp8=fp8),
            (TOKENS, d_model, d_ffn),
        )
        for d_model, d_ffn in LAYERS
        for experts in EXPERTS
        for mode in MODES
        for sizes in ("equal", "ragged")
    }


def problem(mode: Mode, experts: int, d_model: int, d_ffn: int, *, fp8: bool = False) -> Problem:
    """The product of the routed FFN that has this mode: y3 = y2 W2, y1 = x W1 token-major, dW2 = y2^T dy3.

    fp8: operands of 8 bits, scales of rows and columns, and sums of the contraction promoted.
    """
    if fp8:
        return dataclasses.replace(
            problem(mode, experts, d_model, d_ffn),
            b_k_major=True,
            dtype="float8_e4m3fn",
            epilogue=Epilogue(row_scale=True, column_scale=True, powers_of_two=True),
            promote=PROMOTE if mode == "contraction" else 0,
        )
    if mode == "rows":
        return Problem(TOKENS, d_model, d_ffn // experts, mode, experts)
    if mode == "columns":
        return Problem(d_ffn, TOKENS, d_model, mode, experts, b_k_major=True, transpose_out=True)
    return Problem(d_ffn // experts, d_model, TOKENS, mode, experts)


def equal_sizes(groups: int) -> tuple[int, ...]:
    return (TOKENS // groups,) * groups


def ragged_sizes(groups: int, seed: int = 0, *, fp8: bool = False) -> tuple[int, ...]:
    """Dirichlet(1) sizes in multiples of 64 (of 8 bits 128) that add up to all tokens, with two empty groups."""
    unit = 2 * GRANULE if fp8 else GRANULE
    shares = np.random.default_rng(seed).dirichlet(np.ones(groups - 2))
    granules = np.maximum(np.floor(shares * (TOKENS // unit)), 1).astype(int)
    granules[np.argmax(granules)] += TOKENS // unit - granules.sum()
    sizes = (granules * unit).tolist()
    sizes.insert(1, 0)
    return (*sizes, 0)
