"""The layer in eight bits: against numpy with the same casts, against 16 bits, and at the corners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import reference as pack
from tests import brute_force8
from tests.helpers import relative_error
from tests.test_ffn import BETA, inputs
from venom_jax import Recipe, pack_weights, router, sparse_ffn
from venom_jax.fp8 import operands

pytestmark = pytest.mark.usefixtures("strict_dtypes")

D, F, TOKENS = 32, 64, 300  # every other token is in the sample
FP8 = functools.partial(dict, precision="fp8")

RECIPES = {
    "dense": Recipe.dense(**FP8()),
    "act24": Recipe.act24(**FP8()),
    "act24 rebuilt": Recipe.act24(**FP8(token_copy="rebuilt")),
    "act24 natural order": Recipe.act24(**FP8(token_order="natural")),
    "act24 in blocks": Recipe.act24(**FP8(token_blocks=3)),
    "act24 routed": Recipe.act24(**FP8(experts=4, top_k=2)),
    "act24, dense weight gradients": Recipe.act24(**FP8(wgrad="dense")),
    "tokens only": Recipe(**FP8(wgrad="24")),
    "all24": Recipe.all24(**FP8()),
    "venom": Recipe.venom(4, 1, **FP8()),
    "venom, two of four": Recipe.venom(4, 2, **FP8()),
}
ROUNDING = 2e-3
"""Of y1 and dy2 to bf16 from another order of summation: a last bit, which may move a cast or a choice."""


@functools.partial(jax.jit, static_argnames=("recipe", "packed"))
def run(x, w1, w2, dy, route, beta, recipe, packed=False):
    """y, dx, dW1, dW2 under the cotangent dy."""
    weights = pack_weights(w1, w2, beta, recipe=recipe) if packed else None
    y, vjp = jax.vjp(lambda x, w1, w2: sparse_ffn(x, w1, w2, route, beta, recipe=recipe, packed=weights), x, w1, w2)
    return y, *vjp(dy)


def routed(x, w1, recipe):
    return router.route(x, w1, recipe) if recipe.routed else None


def sized(dtype=jnp.bfloat16, tokens=TOKENS, d_model=D, d_ffn=F, seed=0):
    return inputs(tokens, dtype, d_model, d_ffn, seed)


def check(recipe, x, w1, w2, dy, limit=ROUNDING):
    route = routed(x, w1, recipe)
    outputs = run(x, w1, w2, dy, route, BETA, recipe)
    expected = brute_force8.ffn(x, w1, w2, BETA, route, recipe, dy)
    for out, ref, name in zip(outputs, expected, ("y", "dx", "dW1", "dW2"), strict=True):
        error = relative_error(out, ref)
        assert error <= limit, f"{name}: {error:.2e}"
    return outputs


@pytest.mark.parametrize("name", RECIPES)
def test_all_six_products_against_numpy(name):
    outputs = check(RECIPES[name], *sized(jnp.float32))
    assert [t.dtype for t in outputs] == [jnp.float32] * 4


def of_unlike_sizes(x, w1, w2, dy):
    """A neuron 10^4 times as large, one that never fires, one without weights, features and tokens of unlike sizes."""
    x = x.at[:, 0].set(10)
    w1 = w1.at[:, 3].multiply(1e4).at[0, 5].set(-1e3).at[:, 6].set(0).at[0, 7:].multiply(0.1)
    w2 = w2.at[9].multiply(1e-3).at[10].set(0)
    x = x * jnp.exp2(jnp.arange(x.shape[0], dtype=x.dtype) % 7)[:, None]
    x = x.at[1].multiply(64)  # not in the sample
    return x.at[4].set(0).at[:, 2].set(0), w1, w2, (dy * 1e-6).at[8].set(0)


@pytest.mark.parametrize("name", ["act24", "venom, two of four"])
def test_neurons_tokens_and_features_of_unlike_sizes(name):
    x, w1, w2, dy = of_unlike_sizes(*sized(jnp.float32))
    _, dx, dw1, dw2 = check(RECIPES[name], x, w1, w2, dy)
    assert not np.asarray(dw1)[:, 5].any()
    assert not np.asarray(dw2)[5].any(), "a neuron that never fires has no gradient"
    others = np.delete(np.asarray(dw2), 3, axis=0)
    assert (np.abs(others).max(axis=1) > 0).sum() >= F - 4, "a large neuron does not flush the others"
    assert np.isfinite(dx).all()


def test_a_sample_without_gradients_is_guessed():
    """As where the sampled tokens are all masked out of the loss."""
    recipe = RECIPES["act24"]
    x, w1, w2, dy = sized(jnp.float32)
    dy = jnp.where((jnp.arange(TOKENS) % 2 == 0)[:, None], 0, dy)
    outputs = check(recipe, x, w1, w2, dy)
    expected = brute_force8.ffn(x, w1, w2, BETA, None, recipe, dy)
    assert np.linalg.norm(expected[1]) > 1
    everything = run(x, w1, w2, dy, None, BETA, Recipe.dense())
    assert relative_error(outputs[1], everything[1]) < 0.5


def test_tokens_beyond_the_sample_decide_the_scales_too():
    x = jnp.ones((TOKENS, 1)).at[1].set(32)  # token 1 is not in the sample
    scale = operands.cast8.by_row(x).scale
    sampled = scale[operands.sample(TOKENS)]
    found = operands.peaks(jnp.ones((150, 4), jnp.bfloat16), sampled, scale, jnp.ones(4), 1)
    np.testing.assert_array_equal(found, 32)


def error_of(x, w1, w2, dy, recipe, reference):
    route = routed(x, w1, recipe)
    both = (run(x, w1, w2, dy, route, BETA, each) for each in (recipe, reference))
    return [relative_error(out, ref) for out, ref in zip(*both, strict=True)]


def test_error_of_eight_bits():
    """4 bits of each operand: 2.6 % (3.7 % a product); relu squares y1's relative error of 3.7 %."""
    x, w1, w2, dy = sized(jnp.bfloat16, 512, 128, 256)
    assert max(error_of(x, w1, w2, dy, RECIPES["dense"], Recipe.dense())) < 0.075
    exact = run(x, w1, w2, dy, None, BETA, Recipe.dense())
    # Which entries are kept differs where they are close, so what is pruned is compared with what is not.
    eight, sixteen = (
        [relative_error(out, ref) for out, ref in zip(run(x, w1, w2, dy, None, BETA, recipe), exact, strict=True)]
        for recipe in (RECIPES["all24"], Recipe.all24())
    )
    for less, more in zip(eight, sixteen, strict=True):
        assert less < 1.05 * more + 0.02


def test_gradients_are_dense_eight_bits_where_nothing_is_pruned():
    """At most two of each four neurons and tokens fire, weights are 2:4, beta is 1: the same numbers."""
    x, w1, w2, dy = sized(jnp.bfloat16, 512, 128, 256)
    fours = jnp.arange(256) % 4 < 2
    x = jnp.where((jnp.arange(512) < 256)[:, None], x, 0)
    w1 = jnp.where(fours[None], w1, 0)
    w1, w2 = (jnp.where(pack.select24(w, axis), w, 0.0) for w, axis in ((w1, 0), (w2, 1)))
    # S(W) is rounded to bf16 before it is cast, W is not.
    w1, w2 = (w.astype(jnp.bfloat16).astype(jnp.float32) for w in (w1, w2))
    expected = run(x, w1, w2, dy, None, jnp.ones(4), RECIPES["dense"])
    for name in ("act24", "all24"):
        for out, ref in zip(run(x, w1, w2, dy, None, jnp.ones(4), RECIPES[name]), expected, strict=True):
            assert relative_error(out, ref) < 1e-6


@pytest.mark.parametrize(
    ("name", "bad"), [("dense", jnp.nan), ("act24", jnp.inf), ("venom, two of four", jnp.nan)], ids=str
)
def test_what_is_not_finite_stays_with_its_token_and_shows(name, bad):
    recipe = RECIPES[name]
    x, w1, w2, dy = sized()
    route = routed(x, w1, recipe)
    clean = run(x, w1, w2, dy, route, BETA, recipe)
    y, dx, dw1, dw2 = run(x.at[7, 1].set(bad), w1, w2, dy, route, BETA, recipe)
    others = np.arange(TOKENS) != 7  # not in the sample, so that scales stay
    assert np.isnan(np.asarray(y[7], np.float32)).all()
    np.testing.assert_array_equal(*(np.asarray(t, np.float32)[others] for t in (y, clean[0])))
    np.testing.assert_array_equal(*(np.asarray(t, np.float32)[others] for t in (dx, clean[1])))
    assert np.isnan(dw1).any()
    assert np.isnan(dw2).any()


@pytest.mark.parametrize(("name", "tokens"), [("act24", 1), ("venom, two of four", 3)])
def test_few_tokens(name, tokens):
    check(RECIPES[name], *sized(jnp.float32, tokens))


def test_empty_and_ragged_groups():
    recipe = RECIPES["venom"]
    x, w1, w2, dy = sized(jnp.float32)
    route = jnp.where(jnp.arange(TOKENS) < 129, 1, 3)[:, None].astype(jnp.int32)
    outputs = run(x, w1, w2, dy, route, BETA, recipe)
    for out, ref in zip(outputs, brute_force8.ffn(x, w1, w2, BETA, route, recipe, dy), strict=True):
        assert relative_error(out, ref) < ROUNDING
    assert not np.asarray(outputs[2])[:, : F // 4].any(), "experts without tokens get no gradient"


@pytest.mark.parametrize("name", ["dense", "all24"])
def test_packed_weights_give_the_same_bits(name):
    recipe = RECIPES[name]
    x, w1, w2, dy = sized()
    route = routed(x, w1, recipe)
    plain = run(x, w1, w2, dy, route, BETA, recipe)
    for a, b in zip(plain, run(x, w1, w2, dy, route, BETA, recipe, packed=True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_under_transformations():
    """remat, scan and vmap change nothing."""
    recipe = RECIPES["all24"]
    x, w1, w2, _ = sized(jnp.float32)

    def loss(x, w1, w2):
        packed = pack_weights(w1, w2, BETA, recipe=recipe)
        return jnp.sum(jnp.sin(sparse_ffn(x, w1, w2, None, BETA, recipe=recipe, packed=packed)))

    def scanned(x, w1, w2):
        layers = jax.lax.scan(lambda t, _: (t + jax.checkpoint(loss)(x, w1, w2), None), jnp.float32(0), length=2)
        return layers[0] / 2

    def mapped(x, w1, w2):
        return jax.vmap(loss)(*(jnp.stack([t, t]) for t in (x, w1, w2))).mean()

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w1, w2)
    for function in (scanned, mapped):
        for out, ref in zip(jax.jit(jax.grad(function, (0, 1, 2)))(x, w1, w2), expected, strict=True):
            assert relative_error(out, ref) < ROUNDING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ("y1", "dx")}, r"fp8.*weights = \('y1', 'dx'\) \(sparse along d_ffn in dx\)"),
        ({"weight_mask": "transposable"}, "weight_mask = 'transposable'"),
        ({"wgrad": "mvue"}, "wgrad = 'mvue'"),
        ({"wgrad": "split95", "hidden": "full"}, "wgrad = 'split95'; hidden = 'full'.*use precision = 'compute'"),
    ],
)
def test_what_has_no_scales_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe.venom(4, 1, **FP8(**options))


def test_precision_is_named():
    with pytest.raises(ValueError, match=r"Recipe\.precision = 'fp4': use one of 'compute', 'fp8'"):
        Recipe(precision="fp4")  # pyrefly: ignore[bad-argument-type]
    assert Recipe.preset("venom", **FP8(experts=4, v=64)).pattern.v == 128
    assert Recipe.venom(4, 1, **FP8(v=192)).group_rows == 384
    assert Recipe.venom(4, 1).group_rows == 64


def test_weights_of_another_precision_are_refused():
    x, w1, w2, _ = sized()
    plain = pack_weights(w1, w2, BETA)
    with pytest.raises(ValueError, match=r"packed weights of 16 or 32 bits .* precision = 'fp8'"):
        sparse_ffn(x, w1, w2, recipe=RECIPES["all24"], packed=plain)
    dense = pack_weights(w1, w2, BETA, recipe=RECIPES["act24"])
    with pytest.raises(ValueError, match=r"packed weights of 8 bits .* precision = 'compute'"):
        sparse_ffn(x, w1, w2, recipe=Recipe.act24(), packed=dense)
    with pytest.raises(ValueError, match=r"no 2:4 weight for y1, the recipe's weights = \('y1', 'dy2'\)"):
        sparse_ffn(x, w1, w2, recipe=RECIPES["all24"], packed=dense)
