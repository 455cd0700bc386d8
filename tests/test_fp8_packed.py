"""The packed form in eight bits: the reference's numbers, on reference kernels here and on Hopper there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from tests.helpers import relative_error
from tests.test_fp8_ffn import BETA, FP8, RECIPES, ROUNDING, of_unlike_sizes, routed, sized
from venom_jax import Recipe, bench, pack_weights, router
from venom_jax.dispatch import choose_kernels
from venom_jax.ffn import _sparse

SIZES = (128, 512)
PACKED = ["dense", "act24 rebuilt", "act24 routed", "all24", "venom, two of four"]
"""One recipe for each way through the code: compiling takes seconds each."""


@functools.partial(jax.jit, static_argnames=("recipe", "kernels", "packed"))
def run(x, w1, w2, dy, route, recipe, kernels, packed=False):
    """y, density, dx, dW1, dW2; kernels None is the reference form."""
    weights = pack_weights(w1, w2, BETA, recipe=recipe, implementation=kernels) if packed else None
    (y, density), vjp = jax.vjp(lambda *a: _sparse(recipe, kernels, *a, BETA, weights, route), x, w1, w2)
    return y, density, *vjp((dy, jnp.zeros_like(density)))


def compare(name, kernels, arrays, limit, packed=False):
    recipe = RECIPES[name]
    route = routed(arrays[0], arrays[1], recipe)
    found, expected = (run(*arrays, route, recipe, form, packed) for form in (kernels, None))
    for out, ref, what in zip(found, expected, ("y", "density", "dx", "dW1", "dW2"), strict=True):
        assert out.dtype == ref.dtype
        assert relative_error(out, ref) <= limit, f"{what}: {relative_error(out, ref):.2e}"


@pytest.mark.parametrize("name", PACKED)
def test_packed_form_is_the_reference(name):
    compare(name, "reference", sized(jnp.float32, 300, *SIZES), ROUNDING, packed=name in ("dense", "all24"))


@pytest.mark.parametrize(("name", "tokens"), [("act24", 1), ("dense", 3)])
def test_few_tokens(name, tokens):
    compare(name, "reference", sized(jnp.float32, tokens, *SIZES), ROUNDING)


def test_sizes_of_another_order():
    compare("act24", "reference", of_unlike_sizes(*sized(jnp.float32, 300, *SIZES)), ROUNDING)


@pytest.mark.parametrize(
    ("recipe", "sizes", "message"),
    [
        (Recipe(**FP8(activations=True)), (128, 512), "activations = True with wgrad = 'dense' and precision = 'fp8'"),
        (Recipe.all24(**FP8()), (192, 512), "d_model = 192 .* must be multiples of 128, the tensor core's tile of 8"),
        (Recipe.venom(4, 1, **FP8()), (128, 256), "d_ffn / experts = 256 / 4 must be multiples of 128"),
        (Recipe.dense(**FP8()), (128, 520), "must be multiples of 16"),
    ],
)
def test_what_the_kernels_do_not_run(recipe, sizes, message, monkeypatch):
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    with pytest.raises(NotImplementedError, match=message):
        choose_kernels("hopper", recipe, *sizes, dtype=jnp.bfloat16)
    assert choose_kernels(None, recipe, *sizes, dtype=jnp.bfloat16) is None


def test_another_gpu_is_refused_unless_the_reference_is_named(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Gpu("NVIDIA A100", "8.0", 108))
    choose = functools.partial(choose_kernels, recipe=Recipe.act24(**FP8()), d_model=128, d_ffn=512, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0 .* NVIDIA A100 of compute capability 8\.0"):
        choose(None)
    assert choose("reference") is None
    assert choose_kernels(None, Recipe.act24(), 128, 512, jnp.bfloat16) == "warp"


@pytest.mark.parametrize("name", ["dense", "act24", "venom, two of four"])
def test_lowers_for_hopper(name, monkeypatch):
    """The whole gradient, rematerialised and inside a scan over layers, as the trainer runs it."""
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    recipe = RECIPES[name]
    x, w1, w2, _ = jax.eval_shape(lambda: sized(jnp.bfloat16, 200, *SIZES))

    def loss(x, w1, w2):
        def layer(x, _):
            route = router.route(x, w1, recipe) if recipe.routed else None
            return x + _sparse(recipe, "hopper", x, w1, w2, BETA, None, route)[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, length=2)[0].astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, w1, w2).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= {"dense": 0, "act24": 4, "venom, two of four": 6}[name]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 300, 2049])
@pytest.mark.parametrize("name", [*PACKED, "act24", "act24 natural order", "act24 in blocks", "venom"])
def test_hopper_against_reference(name, tokens):
    """Sums of 14 bits, or in another order, move y1 by a last bit, and with it casts and choices: 1 %."""
    compare(name, "hopper", sized(jnp.bfloat16, tokens, 256, 1024), 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "act24", "venom, two of four"])
def test_hopper_keeps_what_is_not_finite_with_its_token(name):
    recipe = RECIPES[name]
    x, w1, w2, dy = sized(jnp.bfloat16, 512, 256, 1024)
    route = routed(x, w1, recipe)
    clean = run(x, w1, w2, dy, route, recipe, "hopper")
    y, _, dx, dw1, _ = run(x.at[7].set(jnp.nan), w1, w2, dy, route, recipe, "hopper")
    others = np.arange(512) != 7
    assert np.isnan(np.asarray(y[7], np.float32)).all()
    assert relative_error(y[others], clean[0][others]) == 0
    assert relative_error(dx[others], clean[2][others]) == 0
    assert np.isnan(dw1).any()


@pytest.mark.gpu
def test_hopper_with_sizes_of_another_order():
    compare("venom", "hopper", of_unlike_sizes(*sized(jnp.bfloat16, 2048, 256, 1024)), 1e-2)


def test_a_benchmark_row_names_the_fastest_rival():
    times = {"ours": 2.0, "dense": 6.0, "a": 4.0, "b": 3.0}
    found = bench._against(times, "ours", ["dense"], 0.001234)
    assert found == {"ms": 2.0, "rival_ms": 6.0, "speedup": 3.0, "relerr": 0.00123}
    assert bench._against(times, "ours", ["a", "b"], 0.1) == {
        "ms": 2.0,
        "rival_ms": 3.0,
        "speedup": 1.5,
        "relerr": 0.1,
        "rival_form": "b",
    }
    assert {name for name, recipe in bench.RECIPES.items() if recipe.in_fp8} == {
        name for name in bench.RECIPES if name.endswith("fp8")
    }
