"""Pruning to V:N:M: which four columns each block keeps, and which two of the four each row.

    score[r, c] = |x[r, c]|                      or |x[r, c]| * input_norm[c]
    columns of a block of v rows and m columns   the four of the largest score, by one of three measures
    entries of a row                             the two of the largest score among the four

Comparisons are on the bits of magnitudes, so every order is total: ties go to the lower column, -0.0 equals +0.0, and
NaN ranks above inf. A block of zeros keeps its first four columns and of each row the first two of those.
"""

import itertools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.pack.reference import magnitude_key
from pallas_kernels.vnm.shapes import KEPT, stored
from venom_jax.formats import VNM, check_matrix
from venom_jax.pattern import Pattern

ColumnChoice = Literal["l1", "energy", "best"]

MAX_COMBINATIONS = math.comb(32, KEPT)
"""The most choices of four columns that `best` tries for a block: those of m = 32."""
_ENTRIES_AT_ONCE = 1 << 24  # gathered entries of one batch of choices: 64 MiB in f32


def vnm(
    x: Float[Array, "R C"],
    pattern: Pattern,
    *,
    columns: ColumnChoice = "l1",
    input_norm: Float[Array, "_C"] | None = None,
) -> VNM:
    """The V:N:M matrix that keeps of x what scores highest.

    Args:
      x: rows are padded with zeros to a multiple of pattern.v; C is the contraction of the product it is for.
      columns: how a block's four columns are chosen, see `choose_columns`.
      input_norm: the norm of each column's input over some data, for scores |x| * norm (arXiv 2306.11695); finite
        and not negative. Without it the score is |x|.

    Raises:
      ValueError: x is no matrix of floats, the pattern cannot be stored, C is no multiple of pattern.m, or `best` has
        too many choices.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (256, 512))
      >>> packed = vnm(w, Pattern(v=64, m=16))
      >>> packed.report(w).density
      Fraction(1, 8)
    """
    scores = score(x, input_norm)
    chosen = choose_columns(scores, pattern, columns)
    return VNM.pack(x, chosen, pattern, scores=None if input_norm is None else scores)


def score(x: Float[Array, "R C"], input_norm: Float[Array, "_C"] | None = None) -> Float[Array, "R C"]:
    """|x|, or |x| * input_norm, in f32 (f64 for f64).

    Raises:
      ValueError: x is no matrix of floats, or input_norm has another size than its columns.
    """
    check_matrix(x)
    size = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    if input_norm is None:
        return size
    if input_norm.shape != x.shape[1:]:
        raise ValueError(f"input_norm of shape {input_norm.shape}; a matrix {x.shape} has {x.shape[1]} input columns.")
    return size * input_norm.astype(size.dtype)


def choose_columns(
    scores: Float[Array, "R C"], pattern: Pattern, columns: ColumnChoice = "l1"
) -> Int[Array, "blocks K"]:
    """The four columns that each block keeps, ascending: int32 [ceil(R / v), 4 C / m].

    Args:
      scores: not negative, as `score` gives them.
      columns: "l1" keeps the columns of the largest sum of scores, "energy" of the largest sum of squares; "best"
        tries all C(m, 4) choices and keeps the one whose two largest scores of each row have the largest sum of
        squares, of equal ones the first in lexicographic order.

    Raises:
      ValueError: as `vnm`.
    """
    check_choice(columns, pattern)
    rows, num_columns = scores.shape
    sizes = stored(rows, num_columns, pattern.v, pattern.m)
    m = int(pattern.m)
    padded = jnp.pad(scores, ((0, sizes.rows - rows), (0, 0)))
    # [blocks of rows, blocks of columns, v, m]
    blocks = padded.reshape(sizes.blocks, pattern.v, -1, m).swapaxes(1, 2)
    if columns == "best":
        inside = _best_of_all(blocks)
    else:
        sums = jnp.sum(blocks if columns == "l1" else jnp.square(blocks), axis=2)
        _, inside = jax.lax.top_k(magnitude_key(sums), KEPT)
    inside = jnp.sort(inside, axis=-1)
    chosen = inside + jnp.arange(blocks.shape[1])[:, None] * m
    return chosen.reshape(sizes.blocks, -1).astype(jnp.int32)


def check_choice(columns: ColumnChoice, pattern: Pattern) -> None:
    """Raise ValueError for an unknown way to choose columns, or more choices than `best` tries."""
    if columns not in get_args(ColumnChoice):
        raise ValueError(f"columns = {columns!r}: use one of {', '.join(map(repr, get_args(ColumnChoice)))}.")
    m = int(pattern.m)
    if columns == "best" and math.comb(m, KEPT) > MAX_COMBINATIONS:
        raise ValueError(
            f"columns = 'best' with pattern.m = {m} would try {math.comb(m, KEPT):,} choices for each block; at most "
            f"{MAX_COMBINATIONS:,} (m = 32) are tried. Use 'l1' or 'energy'."
        )


@jax.jit
def _best_of_all(blocks: Float[Array, "blocks groups v m"]) -> Int[Array, "blocks groups 4"]:
    """Indices of the best four of m, by trying all, some blocks and some choices at a time."""
    num_blocks, groups, v, m = blocks.shape
    choices = np.array(list(itertools.combinations(range(m), KEPT)), np.int32)
    at_once = max(1, min(len(choices), _ENTRIES_AT_ONCE // (KEPT * v)))
    batch = max(1, _ENTRIES_AT_ONCE // (KEPT * v * at_once))
    # The last batch tries some choices again: they lose against their equals, which came first.
    starts = np.minimum(np.arange(0, len(choices), at_once), len(choices) - at_once)
    choices = jnp.asarray(choices)

    def best(block: Float[Array, "v m"]) -> Int[Array, "4"]:
        energy = jnp.square(block)

        def try_some(found, start):
            most, index = found
            some = jax.lax.dynamic_slice_in_dim(choices, start, at_once)
            kept = magnitude_key(jnp.sum(_two_largest(*(energy[:, some[:, i]] for i in range(KEPT))), axis=0))
            first = jnp.argmax(kept)
            better = kept[first] > most
            return (
                jnp.where(better, kept[first], most),
                jnp.where(better, start + first.astype(jnp.int32), index),
            ), None

        nothing = magnitude_key(jnp.zeros((), energy.dtype))
        (_, index), _ = jax.lax.scan(try_some, (nothing, jnp.int32(0)), jnp.asarray(starts, jnp.int32))
        return choices[index]

    flat = blocks.reshape(num_blocks * groups, v, m)
    return jax.lax.map(best, flat, batch_size=batch).reshape(num_blocks, groups, KEPT)


def _two_largest(a: Array, b: Array, c: Array, d: Array) -> Array:
    """The sum of the two largest of four: both of one pair, or the larger of each."""
    return jnp.maximum(jnp.maximum(a + b, c + d), jnp.maximum(a, b) + jnp.maximum(c, d))
