"""Choosing and packing two of four neighbours, in plain jnp: the specification and the oracle.

All rules are stated on the magnitude's *bits*: for floats of one sign the bit pattern grows with the value, inf
is above every finite number and NaN above inf. So every order below is total, and -0.0 equals +0.0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Bool, Float, Int, Positions

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def magnitude_key(a: Float[Array, "..."]) -> Array:
    """|a| as unsigned integers that compare as the magnitudes do, with NaN above inf."""
    bits = _BITS[a.dtype.itemsize]
    sign = jnp.array(1 << (8 * a.dtype.itemsize - 1), bits)
    return jax.lax.bitcast_convert_type(a, bits) & ~sign


def select24(a: Float[Array, "..."], axis: int = -1) -> Bool[Array, "..."]:
    """mask_i = 1 for the two largest |a_i| of each four neighbours along `axis`; ties go to the lower index.

    Exactly two entries of each four are chosen, also among zeros.

    Raises:
      ValueError: the axis is no multiple of 4.
    """
    key = magnitude_key(_in_fours(a, axis))
    mask = jnp.stack([rank < 2 for rank in _ranks(key)], axis=-1)
    return _from_fours(mask, a, axis)


def soft_threshold(a: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """S(a)_i = a_i - sign(a_i) t where |a_i| > t, else +0.0; t is the second smallest magnitude of the four.

    At most two of each four results are non-zero and S is continuous. Infinities keep their sign (no inf - inf is
    formed), three infinities in one group give zeros like any three equals, and NaN propagates: a group with NaN
    keeps (the first two of) its NaN.

    Source: S-STE, arXiv 2409.09099.
    """
    fours = _in_fours(a, axis)
    key = magnitude_key(fours)
    keep = _above_threshold(key, jnp.isnan(fours))
    t = jax.lax.bitcast_convert_type(second_smallest(key), a.dtype)[..., None]
    # Where an entry is kept, t is finite or the entry is NaN: the subtraction below never meets inf - inf.
    shrunk = fours - jnp.sign(fours) * jnp.where(keep, t, 0)
    return _from_fours(jnp.where(keep, shrunk, jnp.zeros((), a.dtype)), a, axis)


def soft_threshold_mask(a: Float[Array, "..."], axis: int = -1) -> Bool[Array, "..."]:
    """True where `soft_threshold` keeps an entry (at most two of each four)."""
    fours = _in_fours(a, axis)
    return _from_fours(_above_threshold(magnitude_key(fours), jnp.isnan(fours)), a, axis)


def second_smallest(key: Array) -> Array:
    """The second smallest of the four entries on the last axis, by a branch-free network of min and max."""
    a, b, c, d = (key[..., i] for i in range(4))
    low = jnp.maximum(jnp.minimum(a, b), jnp.minimum(c, d))
    high = jnp.minimum(jnp.maximum(a, b), jnp.maximum(c, d))
    return jnp.minimum(low, high)


def compress24(a: Float[Array, "R C"], mask: Bool[Array, "R C"]) -> tuple[Float[Array, "R C_2"], Positions]:
    """Keep the masked entries of a [R, C]: values [R, C/2] and their positions [R, C/4, 2].

    The mask must hold exactly two of each four along the rows, as `select24` gives them.
    """
    rows, columns = a.shape
    kept = mask.reshape(rows, columns // 4, 4)
    positions = jnp.stack(kept_positions([kept[..., i] for i in range(4)]), axis=-1)
    return take24(a, positions), positions


def kept_positions(kept: Sequence[Array]) -> tuple[Array, Array]:
    """The lower and the higher index of the two that are kept, from four masks; int32, without branches."""
    low = jnp.where(kept[0], 0, jnp.where(kept[1], 1, 2))
    high = jnp.where(kept[3], 3, jnp.where(kept[2], 2, 1))
    return low, high


def take24(a: Float[Array, "R C"], positions: Positions) -> Float[Array, "R C_2"]:
    """The entries of a [R, C] at `positions`: values [R, C/2]."""
    rows, columns = a.shape
    fours = a.reshape(rows, columns // 4, 4)
    pair = pick([fours[..., i] for i in range(4)], positions[..., 0], positions[..., 1])
    return jnp.stack(pair, axis=-1).reshape(rows, columns // 2)


def pick(fours: Sequence[Array], low: Array, high: Array) -> tuple[Array, Array]:
    """Of four arrays the entries at the lower (0, 1, 2) and the higher (1, 2, 3) position, without gathers."""
    at_low = jnp.where(low == 0, fours[0], jnp.where(low == 1, fours[1], fours[2]))
    at_high = jnp.where(high == 3, fours[3], jnp.where(high == 2, fours[2], fours[1]))
    return at_low, at_high


def decompress24(values: Float[Array, "R C_2"], positions: Positions) -> Float[Array, "R C"]:
    """The inverse of `compress24`: the kept entries at their places, +0.0 elsewhere. Exact to the bit."""
    rows, half = values.shape
    pair = values.reshape(rows, half // 2, 2)
    index = jnp.arange(4, dtype=positions.dtype)
    low, high = (positions[..., i, None] == index for i in range(2))
    zero = jnp.zeros((), values.dtype)
    dense = jnp.where(low, pair[..., :1], jnp.where(high, pair[..., 1:], zero))
    return dense.reshape(rows, 2 * half)


def keep_densest(
    mask: Bool[Array, "R F"], density: Float[Array, "G F"], group_of_row: Int[Array, "R"], num_dense: int
) -> Bool[Array, "R F"]:
    """Open the mask for the `num_dense` densest features of each row's group (ties to the lower feature)."""
    if num_dense == 0:
        return mask
    _, dense = jax.lax.top_k(density, num_dense)
    is_dense = jnp.zeros(density.shape, bool).at[jnp.arange(density.shape[0])[:, None], dense].set(True)
    return mask | is_dense[group_of_row]


def _in_fours(a: Array, axis: int) -> Array:
    """Move `axis` to the end and split it: [..., C / 4, 4]."""
    if a.shape[axis] % 4:
        raise ValueError(f"2:4 takes groups of four: axis {axis} of shape {a.shape} is no multiple of 4. Pad it.")
    moved = jnp.moveaxis(a, axis, -1)
    return moved.reshape(*moved.shape[:-1], moved.shape[-1] // 4, 4)


def _from_fours(fours: Array, like: Array, axis: int) -> Array:
    moved = jnp.moveaxis(like, axis, -1)
    return jnp.moveaxis(fours.reshape(moved.shape), -1, axis)


def _ranks(key: Array) -> list[Array]:
    """For each of the four, how many others come before it (larger, or equal at a lower index)."""
    four = [key[..., i] for i in range(4)]
    before = [[(four[j] >= four[i]) if j < i else (four[j] > four[i]) for j in range(4) if j != i] for i in range(4)]
    return [jnp.stack(terms).astype(jnp.int8).sum(axis=0) for terms in before]


def _above_threshold(key: Array, is_nan: Array) -> Array:
    above = key > second_smallest(key)[..., None]
    top = jnp.stack([rank < 2 for rank in _ranks(key)], axis=-1)
    return above | (is_nan & top)


def contraction_order(rows: Float[Array, "R D"], *, interleaved: bool) -> Float[Array, "R D"]:
    """Rows in the order of the columns of `activations.pack_tokens`: the other operand of a product over tokens."""
    if not interleaved:
        return rows
    return rows.reshape(4, rows.shape[0] // 4, rows.shape[1]).swapaxes(0, 1).reshape(rows.shape)
