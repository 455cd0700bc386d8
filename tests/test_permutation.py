"""Tokens to padded groups and back: nothing lost, fours of distant tokens, empty and ragged groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.permute.reference import max_rows
from tests import brute_force
from venom_jax.permutation import group_tokens

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def routes(kind, tokens, top_k, experts):
    rng = np.random.default_rng(0)
    if kind == "ragged":
        chosen = [rng.choice(experts, top_k, replace=False, p=_skewed(experts)) for _ in range(tokens)]
    elif kind == "one":  # all tokens in the last experts, every other group empty
        chosen = [np.arange(experts - top_k, experts)] * tokens
    else:
        chosen = [(t + np.arange(top_k)) % experts for t in range(tokens)]
    return jnp.asarray(np.sort(np.array(chosen), axis=1), jnp.int32)


def _skewed(experts):
    weights = 2.0 ** -np.arange(experts)
    return weights / weights.sum()


@pytest.mark.parametrize("kind", ["ragged", "one", "cyclic"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "blocks"), [(200, 1, 4, 1), (96, 2, 4, 4), (1, 1, 4, 1), (70, 3, 8, 2)]
)
@pytest.mark.parametrize("order", ["interleaved", "natural"])
def test_groups_hold_every_token_once(kind, tokens, top_k, experts, blocks, order):
    route = routes(kind, tokens, top_k, experts)
    grouping = jax.jit(group_tokens, static_argnums=1, static_argnames=("align", "order", "blocks"))(
        route, experts, align=64, order=order, blocks=blocks
    )
    sizes = np.asarray(grouping.group_sizes)
    rows = np.asarray(grouping.token_of_row)
    assert (sizes % 64 == 0).all()
    assert sizes.sum() <= len(rows) == max_rows(tokens, top_k, experts * blocks, 64)
    expected = brute_force.groups(np.asarray(route), experts, 64, blocks, order)
    flat = [t for e in range(experts) for four in expected[e] for t in four]
    flat = [tokens if t is None else t for t in flat] + [tokens] * (len(rows) - len(flat))
    np.testing.assert_array_equal(rows, flat)
    np.testing.assert_array_equal(grouping.expert_sizes, sizes.reshape(experts, blocks).sum(1))
    placed = np.asarray(grouping.expert_of_row)[np.asarray(grouping.row_of_slot)]
    np.testing.assert_array_equal(np.sort(placed, axis=1), route)


@pytest.mark.parametrize("kind", ["ragged", "one"])
def test_undo_inverts_apply(kind):
    x = jax.random.normal(jax.random.key(0), (200, 8))
    grouping = group_tokens(routes(kind, 200, 1, 4), 4, align=64)
    rows = grouping.apply(x)
    padding = np.asarray(grouping.token_of_row) == 200
    assert padding.any()
    assert not np.asarray(rows)[padding].any(), "padding rows are zero"
    np.testing.assert_array_equal(grouping.undo(rows), x)


def test_undo_sums_the_copies_of_a_token():
    x = jax.random.normal(jax.random.key(0), (96, 8))
    grouping = group_tokens(routes("ragged", 96, 2, 4), 4, align=64)
    np.testing.assert_array_equal(grouping.undo(grouping.apply(x)), 2 * x)


def test_fours_are_far_apart():
    grouping = group_tokens(jnp.zeros((256, 1), jnp.int32), 1, align=64)
    np.testing.assert_array_equal(grouping.token_of_row[:8], [0, 64, 128, 192, 1, 65, 129, 193])


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="10 tokens do not split into token_blocks = 3"):
        group_tokens(jnp.zeros((10, 1), jnp.int32), 1, align=64, blocks=3)
    with pytest.raises(ValueError, match="align=6"):
        group_tokens(jnp.zeros((10, 1), jnp.int32), 1, align=6)
