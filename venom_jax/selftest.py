"""The layer against the dense one on this GPU: python -m venom_jax.selftest (a part of pallas_kernels.selftest)."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.measure import timing
from venom_jax import router
from venom_jax.dispatch import choose_kernels
from venom_jax.ffn import sparse_ffn
from venom_jax.pattern import Recipe

TOKENS, D_MODEL, D_FFN = 8192, 2048, 8192
RECIPES = {"act24": Recipe.act24(), "venom, one of four": Recipe.venom(4, 1)}


def step(recipe: Recipe, implementation, x, w1, w2, dy):
    """Forward and backward."""
    route = router.route(x, w1, recipe) if recipe.routed else None
    y, vjp = jax.vjp(
        lambda x, w1, w2: sparse_ffn(x, w1, w2, route, recipe=recipe, implementation=implementation), x, w1, w2
    )
    return y, *vjp(dy)


def operands(seed: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 4)
    x, dy = (jax.random.normal(key, (TOKENS, D_MODEL), jnp.bfloat16) for key in keys[:2])
    w1 = jax.random.normal(keys[2], (D_MODEL, D_FFN)) / D_MODEL**0.5
    return x, w1, jax.random.normal(keys[3], (D_FFN, D_MODEL)) / D_FFN**0.5, dy


def main() -> None:
    """The command."""
    gpu, sets = device.current(), [operands(seed) for seed in range(2)]
    runs = {"dense": timing.repeated(functools.partial(step, Recipe.dense(), None), sets)}
    names = [name for name in ("hopper", "warp") if gpu is not None and (name != "hopper" or gpu.family == "hopper")]
    for recipe_name, recipe in RECIPES.items():
        chosen = choose_kernels(None, recipe, D_MODEL, D_FFN, jnp.bfloat16)
        print(f"layer {recipe_name}: {chosen or 'the masked reference'} by itself")
        for name in names:
            runs[f"{recipe_name}, {name}"] = timing.repeated(functools.partial(step, recipe, name), sets)
    print(f"\n| forward, backward, {TOKENS} tokens, D={D_MODEL} F={D_FFN} | ms | against dense |\n|---|---|---|")
    times = timing.race(runs, dict.fromkeys(runs, len(sets)), rounds=5)
    for name, ms in times.items():
        print(f"| {name} | {ms:.3f} | {times['dense'] / ms:.2f}x |")


if __name__ == "__main__":
    main()
