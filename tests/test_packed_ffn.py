"""The packed form of the FFN: the same numbers as the masked form, on reference kernels here and on Hopper there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import activations
from pallas_kernels.pack import reference as pack
from pallas_kernels.pack.activations import Packed
from tests.helpers import assert_close, relative_error
from venom_jax import Recipe, pack_weights, router, sparse_ffn
from venom_jax.dispatch import choose_kernels
from venom_jax.ffn import _sparse

D, F = 64, 256
BETA = jnp.array([1.5, 1.3, 1.6, 1.2], jnp.float32)

RECIPES = {
    "act24": Recipe.act24(),
    "act24 natural order": Recipe.act24(token_order="natural"),
    "features only": Recipe(activations=True),
    "tokens only": Recipe(wgrad="24"),
    "weights only": Recipe(weights=("y1", "dy2")),
    "all24": Recipe.all24(),
    "routing only": Recipe(experts=4, top_k=1),
    "routing and weights": Recipe(experts=4, top_k=1, weights=("y1", "dy2")),
    "venom": Recipe.venom(4, 1),
    "venom, two of four": Recipe.venom(4, 2),
    "venom in blocks": Recipe.venom(4, 2, token_blocks=2),
    "venom without wgrad": Recipe.venom(2, 1, wgrad="dense"),
}


def inputs(tokens, dtype=jnp.float32, d_model=D, d_ffn=F):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, d_model), dtype)
    dy = jax.random.normal(keys[1], (tokens, d_model), dtype)
    w1 = jax.random.normal(keys[2], (d_model, d_ffn)) / d_model**0.5
    w2 = jax.random.normal(keys[3], (d_ffn, d_model)) / d_ffn**0.5
    return x, w1, w2, dy


@functools.partial(jax.jit, static_argnames=("recipe", "kernels", "packed"))
def run(x, w1, w2, dy, recipe, kernels, packed=False):
    route = router.route(x, w1, recipe) if recipe.routed else None
    weights = pack_weights(w1, w2, BETA, dtype=x.dtype) if packed else None
    (y, density), vjp = jax.vjp(lambda *a: _sparse(recipe, kernels, *a, BETA, weights, route), x, w1, w2)
    return y, density, *vjp((dy, jnp.zeros_like(density)))


# On the CPU one recipe for each way through the code: compiling takes seconds each.
CPU_RECIPES = [name for name in RECIPES if name not in ("all24", "venom", "venom, two of four")]


@pytest.mark.parametrize("name", CPU_RECIPES)
def test_packed_form_equals_masked_form(name):
    x, w1, w2, dy = inputs(130)
    with jax.default_matmul_precision("highest"):
        masked = run(x, w1, w2, dy, RECIPES[name], None)
        packed = run(x, w1, w2, dy, RECIPES[name], "reference", packed=bool(RECIPES[name].weights))
    for out, ref in zip(packed, masked, strict=True):
        assert_close(out, ref)


@pytest.mark.parametrize(("name", "tokens"), [("all24", 1), ("venom, two of four", 64)])
def test_few_tokens(name, tokens):
    x, w1, w2, dy = inputs(tokens)
    for out, ref in zip(
        run(x, w1, w2, dy, RECIPES[name], "reference"), run(x, w1, w2, dy, RECIPES[name], None), strict=True
    ):
        assert_close(out, ref)


@pytest.mark.parametrize("interleaved", [True, False])
def test_packing_along_tokens(interleaved):
    a = jax.nn.relu(jax.random.normal(jax.random.key(0), (128, 64)))
    packed = activations.pack_tokens(a, interleaved=interleaved)
    rows = pack.contraction_order(a, interleaved=interleaved)
    expected = jnp.where(pack.select24(rows, 0), rows, 0)
    np.testing.assert_array_equal(activations.unpack(packed), expected.T)
    other = jax.random.normal(jax.random.key(1), (128, 64))
    taken = activations.take_tokens(other, packed.metadata, interleaved=interleaved)
    rows = pack.contraction_order(other, interleaved=interleaved)
    np.testing.assert_array_equal(
        activations.unpack(Packed(taken, packed.metadata)), jnp.where(pack.select24(expected, 0), rows, 0).T
    )


def test_packing_along_features():
    a = jax.nn.relu(jax.random.normal(jax.random.key(0), (64, 128)))
    packed = activations.pack_features(a)
    np.testing.assert_array_equal(activations.unpack(packed), jnp.where(pack.select24(a), a, 0))
    other = jax.random.normal(jax.random.key(1), (64, 128))
    taken = activations.take_features(other, packed.metadata)
    np.testing.assert_array_equal(
        activations.unpack(Packed(taken, packed.metadata)), jnp.where(pack.select24(a), other, 0)
    )


def test_interleaved_order_is_the_groupings():
    a = jnp.arange(128.0)[:, None]
    order = pack.contraction_order(a, interleaved=True)[:8, 0]
    np.testing.assert_array_equal(order, [0, 32, 64, 96, 1, 33, 65, 97])


@pytest.mark.parametrize(
    ("recipe", "sizes", "message"),
    [
        (Recipe(weights=("y3",)), (64, 256), "weights sparse along d_ffn"),
        (Recipe.act24(wgrad="split95"), (64, 256), "split95"),
        (Recipe.venom(4, 1, hidden="full"), (64, 256), "hidden = 'full'"),
        (Recipe.venom(4, 1), (64, 128), "must be multiples of 64"),
    ],
)
def test_recipes_that_the_kernels_do_not_run(recipe, sizes, message, monkeypatch):
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    with pytest.raises(NotImplementedError, match=message):
        choose_kernels("hopper", recipe, *sizes, dtype=jnp.bfloat16)
    assert choose_kernels(None, recipe, *sizes, dtype=jnp.bfloat16) is None


def test_the_packed_form_is_the_default_where_it_runs(monkeypatch):
    choose = functools.partial(choose_kernels, None, Recipe.act24(), 64, 256)
    assert choose(jnp.bfloat16) is None  # no GPU
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    assert choose(jnp.bfloat16) == "hopper"
    assert choose(jnp.float32) is None
    with pytest.raises(NotImplementedError, match="tokens are float32, the kernels take bfloat16 or float16"):
        choose_kernels("hopper", Recipe.act24(), 64, 256, jnp.float32)
    monkeypatch.setattr("jax.device_count", lambda: 8)
    assert choose(jnp.bfloat16) is None
    assert choose(jnp.bfloat16, local=True) == "hopper"


@pytest.mark.parametrize("name", ["act24", "all24", "venom, two of four"])
def test_lowers_for_hopper(name, monkeypatch):
    """The whole gradient, rematerialised and inside a scan over layers, as the trainer runs it."""
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    recipe = RECIPES[name]
    x, w1, w2, _ = jax.eval_shape(lambda: inputs(200, jnp.bfloat16))

    def loss(x, w1, w2):
        def layer(x, _):
            route = router.route(x, w1, recipe) if recipe.routed else None
            return x + _sparse(recipe, "hopper", x, w1, w2, BETA, None, route)[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, length=2)[0].astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, w1, w2).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= {"act24": 4, "all24": 6, "venom, two of four": 6}[name]


GPU_RECIPES = [
    "act24",
    "all24",
    "venom",
    "venom, two of four",
    "venom in blocks",
    "weights only",
    "routing and weights",
]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 100, 2048])
@pytest.mark.parametrize("name", GPU_RECIPES)
def test_hopper_against_reference_kernels(name, tokens):
    """The same operands, so the same patterns: only the order of summation and the rounding of y1 differ."""
    x, w1, w2, dy = inputs(tokens, jnp.bfloat16, d_model=256, d_ffn=1024)
    hopper = run(x, w1, w2, dy, RECIPES[name], "hopper")
    reference = run(x, w1, w2, dy, RECIPES[name], "reference")
    for out, ref in zip(hopper, reference, strict=True):
        assert_close(out, ref, "bfloat16")


@pytest.mark.gpu
def test_hopper_equals_dense_where_nothing_is_lost():
    x, w1, w2, dy = inputs(512, jnp.bfloat16, d_model=256, d_ffn=1024)
    x = jnp.where((jnp.arange(512) < 256)[:, None], x, 0)
    w1 = jnp.where((jnp.arange(1024) % 4 < 2)[None, :], w1, 0.0)
    w1, w2 = (jnp.where(pack.select24(w, axis), w, 0.0) for w, axis in ((w1, 0), (w2, 1)))

    def dense(x, w1, w2):
        return jnp.square(jax.nn.relu(x @ w1.astype(x.dtype))) @ w2.astype(x.dtype)

    y, vjp = jax.vjp(dense, x, w1, w2)
    recipe = Recipe.all24()
    out, out_vjp = jax.vjp(lambda *a: sparse_ffn(*a, recipe=recipe, implementation="hopper"), x, w1, w2)
    for a, b in zip((out, *out_vjp(dy)), (y, *vjp(dy)), strict=True):
        assert_close(a, b, "bfloat16")


@pytest.mark.gpu
def test_hopper_nan_stays_with_its_token():
    recipe = Recipe.venom(4, 2)
    x, w1, w2, dy = inputs(512, jnp.bfloat16, d_model=256, d_ffn=1024)
    clean = run(x, w1, w2, dy, recipe, "hopper")
    y, _, dx, dw1, _ = run(x.at[7].set(jnp.nan), w1, w2, dy, recipe, "hopper")
    others = np.arange(512) != 7
    assert np.isnan(np.asarray(y[7], np.float32)).all()
    assert relative_error(y[others], clean[0][others]) == 0
    assert relative_error(dx[others], clean[2][others]) == 0
    assert np.isnan(dw1).any()
