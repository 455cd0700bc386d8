"""The six products: against brute force, against the dense MLP where nothing is lost, and at the corners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from pallas_kernels.pack import reference as pack
from tests import brute_force
from tests.helpers import assert_close, relative_error
from venom_jax import Recipe, pack_weights, router, sparse_ffn
from venom_jax.dispatch import resolve_implementation

pytestmark = pytest.mark.usefixtures("strict_dtypes")

D, F = 16, 64
BETA = jnp.array([1.5, 1.3, 1.6, 1.2], jnp.float32)

RECIPES = {
    "act24": Recipe.act24(),
    "act24 natural order": Recipe.act24(token_order="natural"),
    "features only": Recipe(activations=True),
    "tokens only": Recipe(wgrad="24"),
    "weights only": Recipe(weights=("y1", "dy2")),
    "all24": Recipe.all24(),
    "all24 scaled": Recipe.all24(threshold_grad="ste_scaled"),
    "every weight, along F too": Recipe(weights=("y1", "y3", "dy2", "dx"), activations=True),
    "W2 in y3 with activations": Recipe.act24(weights=("y3",)),
    "W1 in dx with activations": Recipe.act24(weights=("dx",)),
    "routing only": Recipe(experts=4, top_k=1),
    "venom": Recipe.venom(4, 1),
    "venom, two of four": Recipe.venom(4, 2),
    "venom, all of four": Recipe.venom(4, 4),
    "venom, sixteen": Recipe.venom(16, 4),
    "venom full": Recipe.venom(4, 2, hidden="full"),
    "venom oracle": Recipe.venom(4, 1, router="oracle", hidden="full"),
    "venom in blocks": Recipe.venom(4, 2, token_blocks=2),
    "act24 in blocks": Recipe.act24(token_blocks=3),
    "venom without wgrad": Recipe.venom(4, 1, wgrad="dense"),
}


def inputs(tokens=90, dtype=jnp.float32, d_model=D, d_ffn=F, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (tokens, d_model), dtype)
    dy = jax.random.normal(keys[1], (tokens, d_model), dtype)
    w1 = jax.random.normal(keys[2], (d_model, d_ffn)) / d_model**0.5
    w2 = jax.random.normal(keys[3], (d_ffn, d_model)) / d_ffn**0.5
    return x, w1, w2, dy


@functools.partial(jax.jit, static_argnames=("recipe", "packed"))
def run(x, w1, w2, dy, route, beta, recipe, packed=False):
    """y, dx, dW1, dW2 under the cotangent dy."""
    weights = pack_weights(w1, w2, beta, dtype=x.dtype) if packed else None
    y, vjp = jax.vjp(lambda x, w1, w2: sparse_ffn(x, w1, w2, route, beta, recipe=recipe, packed=weights), x, w1, w2)
    return y, *vjp(dy)


def routed(x, w1, recipe):
    return router.route(x, w1, recipe) if recipe.routed else None


@pytest.mark.parametrize("name", RECIPES)
def test_against_brute_force(name):
    recipe = RECIPES[name]
    x, w1, w2, dy = inputs()
    route = routed(x, w1, recipe)
    with jax.default_matmul_precision("highest"):
        outputs = run(x, w1, w2, dy, route, BETA, recipe)
    expected = brute_force.ffn(x, w1, w2, BETA, route, recipe, dy)
    for out, ref in zip(outputs, expected, strict=True):
        assert_close(out, ref)


def test_split95_against_brute_force():
    recipe = Recipe.act24(wgrad="split95")
    x, w1, w2, dy = inputs(tokens=72, d_ffn=2752)  # 5 % of them are 137, so 128
    outputs = run(x, w1, w2, dy, None, BETA, recipe)
    expected = brute_force.ffn(x, w1, w2, BETA, None, recipe, dy)
    for out, ref in zip(outputs, expected, strict=True):
        assert_close(out, ref)
    pruned = run(x, w1, w2, dy, None, BETA, Recipe.act24())
    assert relative_error(outputs[3], pruned[3]) > 1e-3, "the densest features are not pruned"


@pytest.mark.parametrize("wgrad", ["24", "split95"])
def test_blocks_are_pruned_each_by_itself(wgrad):
    """So that it does not matter which device, or which microbatch, has which of them."""
    x, w1, w2, dy = inputs(tokens=256, d_ffn=2560 if wgrad == "split95" else 264)
    whole = run(x, w1, w2, dy, None, BETA, Recipe.act24(wgrad=wgrad, token_blocks=4))
    blocks = [slice(64 * i, 64 * i + 64) for i in range(4)]
    parts = [run(x[block], w1, w2, dy[block], None, BETA, Recipe.act24(wgrad=wgrad)) for block in blocks]
    for i in (2, 3):
        assert_close(whole[i], sum(part[i] for part in parts))
    one = run(x, w1, w2, dy, None, BETA, Recipe.act24(wgrad=wgrad))
    assert relative_error(whole[3], one[3]) > 1e-2, "the blocks matter here"


@pytest.mark.parametrize("recipe", [Recipe(weights=("y1", "dy2")), Recipe(experts=4, top_k=2)], ids=["W", "V"])
def test_bfloat16(recipe):
    """Without pruning of activations: rounding changes which of two nearly equal ones is kept."""
    x, w1, w2, dy = inputs(dtype=jnp.bfloat16)
    route = routed(x, w1, recipe)
    outputs = run(x, w1, w2, dy, route, BETA, recipe)
    assert [t.dtype for t in outputs] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    for out, ref in zip(outputs, brute_force.ffn(x, w1, w2, BETA, route, recipe, dy), strict=True):
        assert_close(out, ref, "bfloat16")


def lossless_inputs():
    """Weights that are 2:4 along D, and tokens whose activations are at most two in each four, both ways."""
    x, w1, w2, dy = inputs(tokens=128)
    w1, w2 = (jnp.where(pack.select24(w, axis), w, 0.0) for w, axis in ((w1, 0), (w2, 1)))
    hidden = x @ w1
    # x reaches only two neurons of each four: the others get columns that no token excites.
    w1 = jnp.where((jnp.arange(F) % 4 < 2)[None, :], w1, 0.0)
    # Half of the tokens of each interleaved four (p, p + 32, p + 64, p + 96) are silent.
    x = jnp.where((jnp.arange(128) < 64)[:, None], x, 0.0)
    assert hidden.shape == (128, F)
    return x, w1, w2, dy


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.all24(),
        Recipe.all24(threshold_grad="ste_scaled"),
        Recipe.venom(4, 4),
        Recipe.venom(4, 4, hidden="full"),
        Recipe.act24(wgrad="split95"),
    ],
    ids=["all24", "all24 scaled", "venom k=E", "venom k=E full", "split95"],
)
def test_equals_dense_mlp_where_nothing_is_lost(recipe):
    x, w1, w2, dy = lossless_inputs()

    def dense(x, w1, w2):
        return jnp.square(jax.nn.relu(x @ w1)) @ w2

    with jax.default_matmul_precision("highest"):
        y, vjp = jax.vjp(dense, x, w1, w2)
        expected = (y, *vjp(dy))
        outputs = run(x, w1, w2, dy, routed(x, w1, recipe), jnp.ones(4), recipe)
    assert np.abs(expected[0]).max() > 0.1
    for out, ref in zip(outputs, expected, strict=True):
        assert_close(out, ref)


def test_exact_threshold_gradient_by_finite_differences():
    """With W alone in y1 and the dense backward elsewhere, `exact` is the true derivative."""
    recipe = Recipe(weights=("y1",), threshold_grad="exact")
    with jax.enable_x64(True):
        x, w1, w2, dy = (t.astype(jnp.float64) for t in inputs(tokens=20))
        direction = jax.random.normal(jax.random.key(9), w1.shape, jnp.float64)
        beta = jnp.ones(4, jnp.float64)

        def loss(w1):
            s = beta[0] * pack.soft_threshold(w1, 0)
            return jnp.vdot(dy, jnp.square(jax.nn.relu(x @ s)) @ w2)

        step = 1e-6
        expected = (loss(w1 + step * direction) - loss(w1 - step * direction)) / (2 * step)
        # The library thresholds f32 masters: compare at f32's accuracy.
        f32 = [t.astype(jnp.float32) for t in (x, w1, w2, dy)]
        gradient = run(*f32, None, jnp.ones(4, jnp.float32), recipe)[2]
        np.testing.assert_allclose(jnp.vdot(gradient.astype(jnp.float64), direction), expected, rtol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("all24", jnp.float32), ("venom, two of four", jnp.bfloat16)])
def test_packed_weights_give_the_same_bits(name, dtype):
    recipe = RECIPES[name]
    x, w1, w2, dy = inputs(dtype=dtype)
    route = routed(x, w1, recipe)
    plain = run(x, w1, w2, dy, route, BETA, recipe)
    packed = run(x, w1, w2, dy, route, BETA, recipe, packed=True)
    for a, b in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_full_and_routed_hidden_agree():
    x, w1, w2, dy = inputs()
    route = routed(x, w1, RECIPES["venom, two of four"])
    for a, b in zip(
        run(x, w1, w2, dy, route, BETA, RECIPES["venom, two of four"]),
        run(x, w1, w2, dy, route, BETA, RECIPES["venom full"]),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize(("name", "tokens"), [("act24", 1), ("act24", 65), ("venom, two of four", 3)])
def test_any_number_of_tokens(name, tokens):
    recipe = RECIPES[name]
    x, w1, w2, dy = inputs(tokens=tokens)
    route = routed(x, w1, recipe)
    expected = brute_force.ffn(x, w1, w2, BETA, route, recipe, dy)
    for out, ref in zip(run(x, w1, w2, dy, route, BETA, recipe), expected, strict=True):
        assert_close(out, ref)


def test_empty_experts():
    recipe = RECIPES["venom"]
    x, w1, w2, dy = inputs()
    route = jnp.full((90, 1), 2, jnp.int32)
    outputs = run(x, w1, w2, dy, route, BETA, recipe)
    for out, ref in zip(outputs, brute_force.ffn(x, w1, w2, BETA, route, recipe, dy), strict=True):
        assert_close(out, ref)
    assert not np.asarray(outputs[2])[:, : 2 * F // 4].any(), "experts without tokens get no gradient"


@pytest.mark.parametrize("name", ["act24", "venom, two of four"])
def test_nan_stays_with_its_token(name):
    recipe = RECIPES[name]
    x, w1, w2, dy = inputs()
    route = routed(x, w1, recipe)
    clean = run(x, w1, w2, dy, route, BETA, recipe)
    y, dx, dw1, _ = run(x.at[7].set(jnp.nan), w1, w2, dy, route, BETA, recipe)
    others = np.arange(90) != 7
    assert np.isnan(y[7]).all()
    np.testing.assert_array_equal(np.asarray(y)[others], np.asarray(clean[0])[others])
    np.testing.assert_array_equal(np.asarray(dx)[others], np.asarray(clean[1])[others])
    assert np.isnan(dw1).any(), "the weight gradient shows that something is wrong"


@pytest.mark.parametrize("name", ["all24", "venom, two of four"])
def test_under_transformations(name):
    """remat, scan and vmap change nothing."""
    recipe = RECIPES[name]
    x, w1, w2, _ = inputs()
    route = routed(x, w1, recipe)

    def loss(x, w1, w2):
        return jnp.sum(jnp.sin(sparse_ffn(x, w1, w2, route, BETA, recipe=recipe)))

    def scanned(x, w1, w2):
        total, _ = jax.lax.scan(lambda t, _: (t + loss(x, w1, w2), None), jnp.float32(0), length=2)
        return total / 2

    def mapped(x, w1, w2):
        stacked = (jnp.stack([t, t]) for t in (x, w1, w2))
        return jax.vmap(loss)(*stacked).mean()

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w1, w2)
    for function in (jax.checkpoint(loss), scanned, mapped):
        for out, ref in zip(jax.jit(jax.grad(function, (0, 1, 2)))(x, w1, w2), expected, strict=True):
            assert_close(out, ref)


def test_density_counts_computed_activations():
    x, w1, w2, _ = inputs()
    hidden = np.asarray(x, np.float64) @ np.asarray(w1, np.float64) > 0
    _, density = sparse_ffn(x, w1, w2, recipe=Recipe.act24(), return_density=True)
    np.testing.assert_allclose(density, hidden.mean(), rtol=1e-6)
    recipe = Recipe(experts=4, top_k=1)
    route = routed(x, w1, recipe)
    own = np.repeat(np.asarray(route) == np.arange(4), F // 4, axis=1)
    _, density = sparse_ffn(x, w1, w2, route, recipe=recipe, return_density=True)
    np.testing.assert_allclose(density, hidden[own].mean(), rtol=1e-6)


def test_bad_input_is_named():
    x, w1, w2, _ = inputs()
    with pytest.raises((ValueError, TypeCheckError), match="w2"):  # the shape annotation comes first under pytest
        sparse_ffn(x, w1, w2.T, recipe=Recipe())
    with pytest.raises(ValueError, match=r"experts = 4 takes route of shape \(90, 1\), got None"):
        sparse_ffn(x, w1, w2, recipe=Recipe.venom(4, 1))
    with pytest.raises(ValueError, match="takes route=None"):
        sparse_ffn(x, w1, w2, jnp.zeros((90, 1), jnp.int32), recipe=Recipe.act24())
    with pytest.raises(ValueError, match=r"takes route of shape \(90, 1\), got one of shape \(90, 2\)"):
        sparse_ffn(x, w1, w2, jnp.zeros((90, 2), jnp.int32), recipe=Recipe.venom(4, 1))
    with pytest.raises(ValueError, match="d_ffn = 64 does not split into experts = 5"):
        sparse_ffn(x, w1, w2, jnp.zeros((90, 1), jnp.int32), recipe=Recipe.venom(5, 1))
    with pytest.raises(ValueError, match="implementation = 'fast'; use one of 'reference', 'hopper'"):
        resolve_implementation("fast")  # pyrefly: ignore[bad-argument-type]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="tests the refusal on machines without a GPU")
def test_named_implementation_never_falls_back():
    x, w1, w2, _ = inputs()
    with pytest.raises(NotImplementedError, match=r"compute capability 9.0.*this process has no GPU"):
        sparse_ffn(x, w1, w2, recipe=Recipe.all24(), implementation="hopper")
