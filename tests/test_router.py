"""Clusters, scores and choices of the router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import reference as pack
from venom_jax import Recipe, router

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def planted_clusters(experts=4, size=16, d_model=24, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(experts, d_model))
    labels = rng.permutation(np.repeat(np.arange(experts), size))
    scale = rng.uniform(0.1, 10, len(labels))  # clustering must not look at the length of a column
    w1 = (centres[labels] + 0.05 * rng.normal(size=(len(labels), d_model))).T * scale
    return w1.astype(np.float32), labels


@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_found(seed):
    w1, labels = planted_clusters(experts=2, seed=seed)
    order = router.cluster_columns(w1, 2, seed=seed)
    found = labels[order].reshape(2, -1)
    assert all(len(set(run)) == 1 for run in found)


def test_clusters_are_equal_and_reproducible():
    w1 = np.random.default_rng(0).normal(size=(16, 96)).astype(np.float32)
    w1[:, :5] = 0  # dead neurons have no direction
    order = router.cluster_columns(w1, 8, seed=3)
    np.testing.assert_array_equal(np.sort(order), np.arange(96))
    np.testing.assert_array_equal(order, router.cluster_columns(w1, 8, seed=3))
    assert (order != router.cluster_columns(w1, 8, seed=4)).any()


def test_clustering_raises_similarity_within_experts():
    w1 = np.random.default_rng(1).normal(size=(16, 128)).astype(np.float32)

    def similarity(w):
        means = np.asarray(router.expert_means(jnp.asarray(w), 4))
        unit = w / np.linalg.norm(w, axis=0)
        return np.mean([(means[e] @ unit[:, e * 32 : (e + 1) * 32]).mean() for e in range(4)])

    assert similarity(w1[:, router.cluster_columns(w1, 4, seed=0)]) > 1.5 * similarity(w1)


def test_bad_clusterings_are_refused():
    with pytest.raises(ValueError, match="10 columns do not split into 4"):
        router.cluster_columns(np.ones((4, 10)), 4, seed=0)
    with pytest.raises(ValueError, match="NaN or inf"):
        router.cluster_columns(np.full((4, 8), np.nan), 4, seed=0)


def layer(tokens=40):
    w1 = jax.random.normal(jax.random.key(0), (16, 64))
    return jax.random.normal(jax.random.key(1), (tokens, 16)), w1


@pytest.mark.parametrize("kind", ["cosine", "dot", "oracle"])
def test_scores_against_numpy(kind):
    x, w1 = layer()
    recipe = Recipe.venom(4, 2, router=kind, hidden="full")
    xs, ws = np.asarray(x, np.float64), np.asarray(w1, np.float64)
    if kind == "oracle":  # y1 of this recipe reads S(W1)
        expected = (
            (np.maximum(xs @ np.asarray(pack.soft_threshold(w1, 0), np.float64), 0) ** 2).reshape(40, 4, 16).sum(-1)
        )
    else:
        unit = ws / np.linalg.norm(ws, axis=0) if kind == "cosine" else ws
        means = unit.reshape(16, 4, 16).mean(-1)
        if kind == "cosine":
            means = means / np.linalg.norm(means, axis=0)
            xs = xs / np.linalg.norm(xs, axis=1, keepdims=True)
        expected = xs @ means
    np.testing.assert_allclose(router.scores(x, w1, recipe), expected, rtol=1e-4, atol=1e-6)
    chosen = np.sort(np.argsort(-expected, axis=1, kind="stable")[:, :2], axis=1)
    np.testing.assert_array_equal(router.route(x, w1, recipe), chosen)


def test_random_router_follows_its_key():
    x, w1 = layer(200)
    recipe = Recipe.venom(4, 1, router="random")
    first, again, other = (router.route(x, w1, recipe, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_ties_go_to_the_lower_expert():
    x, w1 = jnp.ones((3, 16)), jnp.ones((16, 64))
    np.testing.assert_array_equal(router.route(x, w1, Recipe.venom(4, 2)), [[0, 1]] * 3)


def test_bias_moves_the_choice_and_no_gradient():
    x, w1 = layer()
    recipe = Recipe.venom(4, 1)
    bias = jnp.array([0.0, 0.0, 10.0, 0.0, 99.0, 99.0])  # sized for more experts than this recipe has
    np.testing.assert_array_equal(router.route(x, w1, recipe, bias=bias), [[2]] * 40)
    gradient = jax.grad(lambda w: router.scores(x, w, recipe).sum())(w1)
    assert not np.asarray(gradient).any()


def test_load_and_bias_update():
    route = jnp.array([[0, 1], [0, 2], [0, 1]], jnp.int32)
    load = router.load(route, 6)
    np.testing.assert_array_equal(load, [3, 2, 1, 0, 0, 0])
    recipe = Recipe.venom(4, 2, balance_rate=0.5)
    bias = router.updated_bias(jnp.zeros(6), load, recipe)
    np.testing.assert_array_equal(bias, [-0.5, -0.5, 0.5, 0.5, 0, 0])  # mean load 1.5; unused experts stay


def test_balancing_evens_out_a_skewed_load():
    x, w1 = layer(512)
    x = x + 2 * router.expert_means(w1, 4)[0]  # everybody prefers expert 0
    recipe = Recipe.venom(4, 1, balance_rate=0.02)
    step = jax.jit(lambda b: router.updated_bias(b, router.load(router.route(x, w1, recipe, bias=b), 4), recipe))
    bias = jnp.zeros(4)
    before = router.load(router.route(x, w1, recipe, bias=bias), 4)
    for _ in range(100):
        bias = step(bias)
    after = router.load(router.route(x, w1, recipe, bias=bias), 4)
    assert before.max() > 2.5 * 128
    assert after.max() < 1.3 * 128
