"""Whole steps in FP8 as one writes them without this library, against its own: python -m tests.rival8_step OUTPUT.json

    python -m tests.rival8_step rival8.json --size=1b --folder=DATA [--recipes=dense@fp8,act24@fp8] [--rounds=3]

The rival stands in for every product of the dense FFN and of the projections: one scale for a tensor, its largest
magnitude now over the largest number, e4m3 forward, e4m3 or e5m2 for gradients, cublasLt by XLA, sums in 14 bits but
for weight gradients. All take turns in one process with dense in 16 bits. Needs a Hopper GPU.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from train.config.settings import load_config
from train.model import decoder
from train.records.bench import Bench, parse_recipe
from venom_jax import Recipe, mlp
from venom_jax.masked import sampled_density
from venom_jax.rivals import E4M3, E5M2, cast, times, transposed

RIVALS = {"rival e4m3": E4M3, "rival e5m2": E5M2}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(gradients: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """x w, both [., .], in x's dtype."""
    return _forward(gradients, x, w)[0]


def _forward(gradients, x, w):
    return times(cast(x), cast(w.T)), (x, w)


def _backward(gradients, saved, dy):
    x, w = saved
    dx = times(cast(dy, gradients), cast(w))
    dw = times(cast(x.T), transposed(cast(dy, gradients)), w.dtype, exact=True)
    return dx, dw


multiply.defvjp(_forward, _backward)


@contextlib.contextmanager
def in_place(gradients: Any) -> Iterator[None]:
    """What is traced inside multiplies as the rival does."""

    def project(self, x, weight, name):
        return multiply(gradients, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])

    def ffn(x, w1, w2, route, beta, *, return_density: bool, **options: Any) -> Any:
        a = jax.nn.relu(multiply(gradients, x, w1))
        return multiply(gradients, jnp.square(a), w2), jax.lax.stop_gradient(sampled_density(a))

    with mock.patch.object(decoder.Multiply, "__call__", project), mock.patch.object(mlp, "sparse_ffn", ffn):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--recipes", default="dense@fp8")
    parser.add_argument("--rounds", type=int, default=3)
    values = parser.parse_args()
    config = load_config([f"configs/size/{values.size}.gin"], [f"Data.folder = {values.folder!r}"])
    recipes = dict(parse_recipe(name) for name in ["dense", *values.recipes.split(",")])
    bench = Bench.start(config, list(recipes.values()), values.size, values.rounds, values.output)
    programs = {name: found for name, one in recipes.items() for found in bench.compile(name, [one], traced=False)}
    for name, gradients in RIVALS.items():
        with in_place(gradients):
            programs |= dict(zip([name], bench.compile(name, [Recipe.dense()], traced=False), strict=False))
    bench.race_all(programs, parts=False)


if __name__ == "__main__":
    main()
