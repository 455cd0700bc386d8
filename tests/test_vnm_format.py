"""VNM and prune.vnm: exact round trips, column choices against brute force, ties and zeros, and what is refused."""

import dataclasses
import itertools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.brute_force import magnitude_order
from venom_jax import VNM, Pattern, Sparse24, prune
from venom_jax.prune import choose_columns

P = Pattern(v=64, m=Fraction(16))
pruned = jax.jit(prune.vnm, static_argnames=("pattern", "columns"))
dense_of = jax.jit(lambda packed: packed.to_dense())


def whole(seed: int, *shape: int, dtype=jnp.float32):
    """Small whole numbers: sums are exact and ties are many."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), dtype)


def by_hand(x, pattern: Pattern, measure: str, norm=None):
    """The pruned matrix by loops: the columns of each block, then two of the four in each row."""
    x = np.asarray(x, np.float64)
    scores = np.abs(x) if norm is None else np.abs(x) * np.asarray(norm, np.float64)
    m, out = int(pattern.m), np.zeros_like(x)
    for top in range(0, x.shape[0], pattern.v):
        for left in range(0, x.shape[1], m):
            block = scores[top : top + pattern.v, left : left + m]
            if measure == "best":
                kept_by = [
                    (np.sort(block[:, c], axis=1)[:, 2:] ** 2).sum() for c in itertools.combinations(range(m), 4)
                ]
                chosen = list(itertools.combinations(range(m), 4))[int(np.argmax(kept_by))]
            else:
                sums = (block if measure == "l1" else block**2).sum(axis=0)
                chosen = sorted(sorted(range(m), key=lambda c: (-sums[c], c))[:4])
            for row in range(block.shape[0]):
                for i in magnitude_order(block[row, list(chosen)])[:2]:
                    place = top + row, left + chosen[i]
                    out[place] = x[place]
    return out


# ------------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("measure", ["l1", "energy", "best"])
def test_prunes_as_written_by_hand(measure):
    pattern = dataclasses.replace(P, m=Fraction(8))
    x = whole(1, 130, 24)
    packed = pruned(x, pattern, columns=measure)
    packed.validate()
    np.testing.assert_array_equal(dense_of(packed), by_hand(x, pattern, measure))


@pytest.mark.parametrize(("v", "m"), [(128, 12), (256, 128)])
def test_every_pattern_prunes_and_round_trips(v, m):
    pattern = Pattern(v=v, m=Fraction(m))
    x = whole(2, 264, 2 * m, dtype=jnp.bfloat16)
    packed = pruned(x, pattern)
    packed.validate()
    assert packed.columns.shape == (-(-264 // v), -(-8 // 64) * 64)
    dense = dense_of(packed)
    np.testing.assert_array_equal(dense, by_hand(x, pattern, "l1"))
    again = pruned(dense, pattern)
    np.testing.assert_array_equal(again.to_dense(), dense)
    assert dense.dtype == jnp.bfloat16
    np.testing.assert_array_equal(packed.mask().sum(axis=1), np.full(264, 4))


def test_stored_arrays_come_back_bit_for_bit():
    packed = pruned(jax.random.normal(jax.random.key(0), (128, 256)), P)
    kept = packed.columns[:, : 4 * 256 // 16]
    again = VNM.pack(dense_of(packed), kept, P)
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_best_choice_keeps_most():
    x = jax.random.normal(jax.random.key(3), (128, 64))
    kept = {c: pruned(x, P, columns=c).report(x) for c in ("l1", "energy", "best")}
    assert kept["best"].energy >= max(kept["l1"].energy, kept["energy"].energy)
    assert kept["energy"].columns >= kept["l1"].columns
    energy = float(jnp.sum(dense_of(pruned(x, P, columns="best")) ** 2) / jnp.sum(x**2))
    assert kept["best"].energy == pytest.approx(energy, rel=1e-6)
    assert kept["best"].density == Fraction(1, 8)
    assert kept["best"].energy < kept["best"].columns < 1


def test_choices_in_batches_are_those_of_one(monkeypatch):
    x = prune.score(whole(4, 128, 24))
    pattern = Pattern(v=64, m=Fraction(12))
    wanted = choose_columns(x, pattern, "best")
    monkeypatch.setattr(prune, "_ENTRIES_AT_ONCE", 4 * 64 * 100)
    jax.clear_caches()
    np.testing.assert_array_equal(choose_columns(x, pattern, "best"), wanted)


def test_inputs_norms_weigh_columns():
    norm = jnp.asarray(np.random.default_rng(5).integers(0, 4, 32), jnp.float32)
    x = whole(6, 64, 32)
    for measure in ("l1", "energy", "best"):
        pattern = Pattern(v=64, m=Fraction(8))
        packed = pruned(x, pattern, columns=measure, input_norm=norm)
        np.testing.assert_array_equal(dense_of(packed), by_hand(x, pattern, measure, norm))
    with pytest.raises(ValueError, match=r"input_norm of shape \(16,\).*32 input columns"):
        pruned(x, pattern, input_norm=norm[:16])


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("measure", ["l1", "energy", "best"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_keep_the_first_columns(measure, zero):
    packed = pruned(jnp.full((64, 32), zero), P, columns=measure)
    packed.validate()
    np.testing.assert_array_equal(packed.columns[0, :8], [0, 1, 2, 3, 16, 17, 18, 19])
    np.testing.assert_array_equal(packed.mask()[0], np.isin(np.arange(32), [0, 1, 16, 17]))
    assert not np.asarray(dense_of(packed)).any()
    assert packed.report(jnp.zeros((64, 32))).energy == 1.0


@pytest.mark.parametrize("measure", ["l1", "energy", "best"])
def test_ties_go_to_the_lower_column(measure):
    x = jnp.where(jnp.arange(32) % 2 == 1, -2.0, 1.0) * jnp.ones((64, 1))
    packed = pruned(x, P, columns=measure)
    first = [0, 1, 2, 3] if measure == "best" else [1, 3, 5, 7]  # two large ones a row are all that counts for best
    np.testing.assert_array_equal(packed.columns[0, :8], first + [16 + c for c in first])
    np.testing.assert_array_equal(np.flatnonzero(packed.mask()[5])[:2], [1, 3])


def test_a_stored_negative_zero_keeps_its_sign():
    x = jnp.zeros((64, 16)).at[:, 1].set(-0.0).at[:, 2].set(-0.0)
    dense = dense_of(pruned(x, P))
    assert np.signbit(dense[:, 1]).all()
    assert not np.signbit(dense[:, 2]).any()


def test_not_a_number_and_infinity_are_kept_first():
    x = jnp.ones((64, 16)).at[3, 9].set(jnp.nan).at[4, 11].set(jnp.inf)
    for measure in ("l1", "energy"):
        packed = pruned(x, P, columns=measure)
        assert {9, 11} <= set(packed.columns[0, :4].tolist())
        assert np.isnan(dense_of(packed)[3, 9])
        assert np.isinf(dense_of(packed)[4, 11])


def test_is_a_pytree():
    x = whole(7, 3, 64, 32)
    stacked = jax.jit(jax.vmap(lambda a: prune.vnm(a, P)))(x)
    assert stacked.values.shape == (3, 1, 1, 8, 256)
    np.testing.assert_array_equal(dense_of(jax.tree.map(lambda leaf: leaf[1], stacked)), dense_of(pruned(x[1], P)))


def test_as_plain_24_it_is_the_same_matrix():
    packed = pruned(jax.random.normal(jax.random.key(8), (72, 64)), Pattern(v=64, m=Fraction(8)))
    plain = jax.jit(lambda p: p.to_sparse24().to_dense())
    np.testing.assert_array_equal(plain(packed), dense_of(packed))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Pattern(v=192, m=Fraction(16)), "pattern.v = 192.*64, 128 or 256"),
        (Pattern(v=64, m=Fraction(33, 2)), "pattern.m = 33/2.*multiple of 4 from 4 to 128"),
        (Pattern(v=64, m=Fraction(6)), "pattern.m = 6"),
        (Pattern(v=64, m=Fraction(256)), "pattern.m = 256"),
        (Pattern(v=64, m=Fraction(48)), "64 x 64 does not split into blocks of pattern.m = 48"),
    ],
)
def test_patterns_that_cannot_be_stored_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        pruned(jnp.zeros((64, 64)), pattern)


@pytest.mark.parametrize(
    "x",
    [jnp.zeros(64), jnp.zeros((1, 64, 64)), jnp.zeros((64, 64), jnp.int32), jnp.zeros((64, 64), bool),
     jnp.zeros((64, 64), jnp.float8_e4m3fn)],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)  # fmt: skip
def test_what_is_no_matrix_of_floats_is_refused(x):
    """Integers too: their bits do not compare as their magnitudes."""
    message = rf"can be packed; got {x.dtype} of shape {re.escape(str(x.shape))}|Type-check"
    for pack in (lambda: prune.vnm(x, P), lambda: VNM.pack(x, jnp.zeros((1, 16), jnp.int32), P)):
        with pytest.raises(Exception, match=message):
            pack()
    with pytest.raises(Exception, match=message):
        Sparse24.pack(x)


def test_matrices_of_another_shape_are_refused():
    packed = pruned(jnp.ones((64, 64)), P)
    for use in (packed.take, packed.report):
        with pytest.raises(ValueError, match=r"a matrix of shape \(32, 64\); the stored one has \(64, 64\)"):
            use(jnp.ones((32, 64)))
    with pytest.raises(Exception, match=r"scores of shape \(3, 64\) for a matrix of shape \(64, 64\)|Type-check"):
        VNM.pack(jnp.ones((64, 64)), packed.columns[:, :16], P, scores=jnp.ones((3, 64)))
    with pytest.raises(Exception, match=r"columns of shape \(1, 16\) and float32; .* \(1, 16\), integers|Type-check"):
        VNM.pack(jnp.ones((64, 64)), packed.columns[:, :16] + 0.5, P)


def test_too_many_choices_are_refused():
    with pytest.raises(ValueError, match=r"635,376 choices for each block; at most 35,960"):
        pruned(jnp.zeros((64, 64)), Pattern(v=64, m=Fraction(64)), columns="best")


def test_validate_names_what_is_wrong():
    packed = pruned(jax.random.normal(jax.random.key(9), (128, 64)), P)
    columns = packed.columns

    def broken(**change):
        return dataclasses.replace(packed, **change).validate()

    with pytest.raises(ValueError, match=r"block 1 has column 70 at place 2; must be in \[0, 16\)"):
        broken(columns=columns.at[1, 2].set(70))
    with pytest.raises(ValueError, match=r"block 0 has column -1 at place 5; must be in \[16, 32\)"):
        broken(columns=columns.at[0, 5].set(-1))
    with pytest.raises(ValueError, match=r"block 1 has column 3 at place 20; must be 64, which marks padding"):
        broken(columns=columns.at[1, 20].set(3))
    with pytest.raises(ValueError, match=r"block 0 keeps columns .* of its columns 16 to 31; they must ascend"):
        broken(columns=columns.at[0, 5].set(columns[0, 4]))
    with pytest.raises(ValueError, match=r"columns of shape \(1, 64\)"):
        broken(columns=columns[:1])
    with pytest.raises(ValueError, match=r"values of shape.*another pattern"):
        broken(values=packed.values[:1])
    with pytest.raises(ValueError, match=r"metadata of shape \(2, 1, 64\)"):
        broken(metadata=packed.metadata[..., :64])
    with pytest.raises(ValueError, match=r"group 0 of row 0 stores positions \(1, 0\)"):
        broken(metadata=packed.metadata.at[0, 0, 0].set(jnp.uint32(0x44444441)))
    with pytest.raises(ValueError, match=r"pattern.v = 192"):
        broken(pattern=Pattern(v=192, m=Fraction(16)))


def test_columns_of_another_pattern_are_refused():
    with pytest.raises(ValueError, match=r"columns of shape \(1, 8\) and int32; \(64, 64\) as 64:2:16 has \(1, 16\)"):
        VNM.pack(jnp.zeros((64, 64)), jnp.zeros((1, 8), jnp.int32), P)
