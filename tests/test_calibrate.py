"""What a transition takes from a sample of inputs: experts by co-activation, shared experts, the scale of W2."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import reference as pack
from tests.helpers import assert_close
from venom_jax import LayerRecipes, Recipe, calibrate, phases, router, sparse_ffn, stats

DENSE = Recipe()
SHARED = Recipe(experts=4, top_k=2, shared=1)


def arrays(experts=4, features=8, neurons=32, tokens=40):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, features))
    w1 = jax.random.normal(keys[1], (features, neurons))
    w2 = jax.random.normal(keys[2], (neurons, features))
    return x, w1, w2


def stack(w1, w2, experts=4):
    """One layer as a model of one stacked FFN: (params, method)."""
    method = {"beta": jnp.ones((1, 4)), "bias": jnp.zeros((1, experts)), "permutation": jnp.arange(w1.shape[1])[None]}
    return {"ffn": {"w1": w1[None], "w2": w2[None]}}, {"ffn": method}


def test_neurons_that_fire_for_the_same_tokens_share_an_expert():
    """All columns of W1 are orthogonal, so that their directions say nothing."""
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 4))
    w1 = np.eye(16, dtype=np.float32)
    x = np.eye(4, dtype=np.float32)[np.arange(40) % 4][:, groups]  # token t fires group t % 4
    order = calibrate.neuron_order(w1, Recipe(experts=4, clustering="coactivation"), seed=0, x=x)
    assert sorted(order) == list(range(16))
    assert all(len(set(groups[order[i : i + 4]])) == 1 for i in range(0, 16, 4))


@pytest.mark.parametrize("clustering", ["kmeans", "coactivation"])
def test_the_shared_expert_holds_the_loudest_neurons(clustering):
    x, w1, _ = (np.asarray(t) for t in arrays())
    recipe = Recipe(experts=4, top_k=3, shared=2, clustering=clustering)
    order = calibrate.neuron_order(w1, recipe, seed=0, x=x)
    energy = (np.maximum(x @ w1, 0) ** 4).sum(0)
    assert set(order[:16]) == set(np.argsort(-energy)[:16])
    assert sorted(order) == list(range(32))


def test_every_token_takes_the_shared_expert():
    """y = the dense FFN over the shared neurons + the routed one over the others."""
    others = Recipe(experts=3, top_k=1)

    @jax.jit
    def both(x, w1, w2):
        route = router.route(x, w1, SHARED, bias=jnp.array([-9.0, 0, 0, 0]))
        among = router.route(x, w1[:, 8:], others)
        shared = sparse_ffn(x, w1[:, :8], w2[:8], recipe=DENSE)
        expected = shared + sparse_ffn(x, w1[:, 8:], w2[8:], among, recipe=others)
        return route, among, sparse_ffn(x, w1, w2, route, recipe=SHARED), expected

    route, among, y, expected = both(*arrays())
    np.testing.assert_array_equal(route, np.concatenate([np.zeros_like(among), np.asarray(among) + 1], axis=1))
    assert_close(y, expected)


def test_the_shared_expert_is_left_out_of_balance_and_of_the_oracles_choice():
    recipe = Recipe(experts=4, top_k=2, shared=1, balance_rate=0.5)
    bias = router.updated_bias(jnp.zeros(5), jnp.array([40.0, 20, 12, 8, 0]), recipe)
    np.testing.assert_allclose(bias, [0, -0.5, 0.5, 0.5, 0])

    @jax.jit
    def kept(x, w1, w2):
        quiet = w1.at[:, :8].multiply(1e-3)  # nobody would choose the shared expert
        found, _ = stats.diagnose(x, quiet, w2, jnp.ones(4), jnp.zeros(4), recipe)
        best, _ = stats.diagnose(x, quiet[:, 8:], w2[8:], jnp.ones(4), jnp.zeros(3), Recipe(experts=3))
        return found["kept_oracle"], best["kept_oracle"]

    assert_close(*kept(*arrays()))


def test_the_scale_solves_least_squares():
    x, w1, w2 = arrays()
    layer = calibrate.Layer(w1, w2, jnp.ones(4), jnp.zeros(4))
    routed = Recipe(experts=4)
    scale_of = jax.jit(calibrate.output_scale, static_argnums=(3, 4))
    scale = scale_of(x, layer, layer, routed, DENSE)
    before = jax.jit(lambda: sparse_ffn(x, w1, w2, router.route(x, w1, routed), recipe=routed))()
    after = np.square(np.maximum(x @ w1, 0)) @ w2
    expected = np.linalg.lstsq(np.asarray(after).reshape(-1, 1), np.asarray(before).reshape(-1), rcond=None)[0]
    assert 0 < scale < 1
    np.testing.assert_allclose(scale, expected[0], rtol=1e-5)
    silent = layer._replace(w2=jnp.zeros_like(w2))
    assert scale_of(x, layer, silent, routed, DENSE) == 1


def test_leaving_the_routed_phase_keeps_the_output_where_it_can():
    """Four equal experts: dense says what one of them said, four times."""
    x, w1, w2 = arrays(neurons=8)
    params, method = stack(jnp.tile(w1, 4), jnp.tile(w2, (4, 1)))
    routed = Recipe(experts=4)
    options: dict[str, Any] = {"seed": 0, "inputs": {("ffn",): x[None]}, "averages": [params]}
    out = phases.transition(params, method, [params], routed, DENSE, rescale=True, **options)
    assert out.report["rescaled_w2"] == pytest.approx(0.25)
    np.testing.assert_allclose(out.params["ffn"]["w2"], params["ffn"]["w2"] / 4, rtol=1e-6)
    np.testing.assert_array_equal(out.averages[0]["ffn"]["w2"], out.params["ffn"]["w2"])
    np.testing.assert_array_equal(out.trees[0]["ffn"]["w2"], params["ffn"]["w2"])
    np.testing.assert_array_equal(out.params["ffn"]["w1"], params["ffn"]["w1"])
    in_blocks = phases.transition(params, method, [], Recipe(experts=4, token_blocks=3), DENSE, rescale=True, **options)
    assert in_blocks.report == out.report, "40 tokens of a sample need not split into the blocks of a batch"
    for old, new in ((DENSE, Recipe(experts=2)), (DENSE, Recipe.act24())):  # not more neurons than before
        kept = phases.transition(params, method, [], old, new, rescale=True, **options)
        assert "rescaled_w2" not in kept.report


def test_only_what_needs_a_sample_asks_for_it():
    venom, part = Recipe.venom(), Recipe.venom(clustering="coactivation")
    mixed = LayerRecipes(((0, DENSE), (1, part)))

    def needs(old, new, rescale=False):
        return calibrate.needs_inputs(old, new, 3, rescale=rescale)

    assert needs(DENSE, part)
    assert needs(DENSE, SHARED)
    assert needs(DENSE, mixed)
    assert needs(mixed, DENSE, rescale=True)
    assert not needs(DENSE, venom, rescale=True)
    assert not needs(mixed, DENSE)
    assert not needs(mixed, LayerRecipes(((0, venom), (1, part)))), (
        "layer 0 clusters by weights, the others are clustered"
    )
    x, w1, w2 = arrays()
    params, method = stack(w1, w2)
    with pytest.raises(ValueError, match="shared = 1 experts needs a sample"):
        phases.transition(params, method, [], DENSE, SHARED, seed=0)
    with pytest.raises(ValueError, match="rescale needs a sample"):
        phases.transition(params, method, [], venom, DENSE, seed=0, rescale=True)
    out = phases.transition(params, method, [], DENSE, SHARED, seed=0, inputs={("ffn",): x[None]})
    order = np.asarray(out.method["ffn"]["permutation"][0])
    np.testing.assert_array_equal(out.params["ffn"]["w1"][0], w1[:, order])


LEARNED = Recipe(experts=4, router="learned")


def loud_tokens(tokens=400, features=8):
    """Tokens of four kinds; the neurons of expert e fire for kind e, but their columns point away from each other."""
    rng = np.random.default_rng(1)
    kind = rng.integers(0, 4, tokens)
    x = 0.05 * rng.standard_normal((tokens, features)) + np.eye(4, features)[kind]
    w1 = np.zeros((features, 16), np.float32)
    for expert in range(4):
        w1[expert, 4 * expert] = 1.0  # the one that fires
        w1[4 + (expert + 1) % 4, 4 * expert + 1 : 4 * expert + 4] = 1.0
        w1[(expert + 1) % 4, 4 * expert + 1 : 4 * expert + 4] = -0.2
    return x.astype(np.float32), w1, kind


def test_a_fitted_router_finds_what_mean_columns_do_not_show():
    x, w1, kind = loud_tokens()
    fitted = calibrate.fit_router(x, w1, LEARNED)
    np.testing.assert_allclose(np.linalg.norm(fitted, axis=1).mean(), 1, rtol=1e-5)
    chosen = np.asarray(router.route(jnp.asarray(x), jnp.asarray(w1), LEARNED, learned=jnp.asarray(fitted)))[:, 0]
    assert (chosen == kind).mean() > 0.99
    x, w1, _ = (np.asarray(t) for t in arrays(tokens=64))
    noise = calibrate.fit_router(x, w1, LEARNED)  # few tokens: whatever is taken is as good as the means on the rest
    means, held_out = np.asarray(router.expert_means(jnp.asarray(w1), 4)), np.arange(64) % 4 == 3
    energy = (np.maximum(x @ w1, 0) ** 4).reshape(64, 4, -1).sum(-1)[held_out]
    kept = [energy[np.arange(16), (x[held_out] @ rows.T).argmax(1)].sum() for rows in (noise, means)]
    assert kept[0] >= kept[1]


def test_a_router_is_fitted_to_what_y1_reads():
    """As for a layer whose weights are S(W1); with so many tokens the fit beats the mean columns, which are W1's."""
    x, w1, _ = (np.asarray(t) for t in arrays(tokens=4000))
    sparse = np.asarray(pack.soft_threshold(jnp.asarray(w1), 0))
    found = calibrate.fit_router(x, w1, replace(LEARNED, weights=("y1",)))
    np.testing.assert_allclose(found, calibrate.fit_router(x, sparse, LEARNED), rtol=1e-5, atol=1e-6)
    assert np.abs(found - calibrate.fit_router(x, w1, LEARNED)).max() > 1e-3


def test_a_transition_fits_the_router_where_experts_are_formed():
    x, w1, _ = loud_tokens()
    shuffled = np.random.default_rng(2).permutation(16)
    params, method = stack(jnp.asarray(w1[:, shuffled]), jnp.ones((16, 8)))
    given: dict[str, Any] = {"seed": 0, "inputs": {("ffn",): jnp.asarray(x)[None]}}
    with pytest.raises(ValueError, match="no room for a learned router"):
        phases.transition(params, method, [], DENSE, LEARNED, **given)
    method["ffn"]["router"] = jnp.zeros((1, 4, 8))
    assert calibrate.needs_inputs(DENSE, LEARNED, 1, rescale=False)
    assert not calibrate.needs_inputs(LEARNED, LEARNED, 1, rescale=False)
    with pytest.raises(ValueError, match="needs a sample"):
        phases.transition(params, method, [], DENSE, LEARNED, seed=0)
    out = phases.transition(params, method, [], DENSE, LEARNED, **given)
    expected = calibrate.fit_router(x, np.asarray(out.params["ffn"]["w1"][0]), LEARNED)
    np.testing.assert_array_equal(out.method["ffn"]["router"][0], expected)
    again = phases.transition(out.params, out.method, [], LEARNED, LEARNED, **given)
    np.testing.assert_array_equal(again.method["ffn"]["router"], out.method["ffn"]["router"])
    found, _ = stats.diagnose(
        jnp.asarray(x), out.params["ffn"]["w1"][0], jnp.ones((16, 8)), jnp.ones(4), jnp.zeros(4), LEARNED,
        learned=out.method["ffn"]["router"][0],
    )  # fmt: skip
    assert 0.9 * float(found["kept_oracle"]) < float(found["kept_router"]) <= float(found["kept_oracle"])
