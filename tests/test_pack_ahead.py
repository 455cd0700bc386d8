"""The kernels that pack and cast in eight bits compile for an H200 without one, and spill no register."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cast8 import api as cast8
from pallas_kernels.pack import api
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.product import pack_product, take_product
from tests.ahead import compile_ahead, needs_compiler

__all__ = ["compile_ahead"]  # a fixture

E4M3 = "float8_e4m3fn"
array = jax.ShapeDtypeStruct
NEURONS, TOKENS, K = 512, 1024, 256


def packed(rows: int, columns: int) -> Packed:
    types: Any = (
        array((rows // 64, columns // 128, 16, 256), E4M3),
        array((rows // 64, columns // 64, 128), jnp.uint32),
    )
    return Packed(*types)


def scales(neurons: int = NEURONS) -> dict:
    return {"scale": array((neurons,), jnp.float32), "squared_scale": array((neurons,), jnp.float32)}


def activations(features: bool, tokens: bool, interleaved: bool):
    def both(y, squared, over_tokens, scale, squared_scale):
        options: dict[str, Any] = {"interleaved": interleaved, "implementation": "hopper"}
        found = api.pack_activations(y, features=features, tokens=tokens, scale=squared_scale, **options)
        given = (squared if features else None, over_tokens if tokens else None)
        return found, api.take_activations(y, *given, scale=scale, squared_scale=squared_scale, **options)

    y = array((TOKENS, NEURONS), jnp.bfloat16)
    return both, {"y": y, "squared": packed(TOKENS, NEURONS), "over_tokens": packed(NEURONS, TOKENS), **scales()}


def products(form: str, groups: int):
    def both(weights, x, sizes, squared, over_tokens, scale, squared_scale, tokens):
        options: dict[str, Any] = {
            "interleaved": groups == 1,
            "implementation": "hopper",
            "row_scale": scale,
            "column_scale": tokens,
            "apart": False,
        }
        found = pack_product(weights, x, sizes, features=True, tokens=True, scale=squared_scale, **options)
        given = (squared, over_tokens, sizes)
        return found, take_product(weights, x, *given, scale=scale, squared_scale=squared_scale, **options)

    neurons = NEURONS * groups
    return both, {
        "weights": packed(neurons, K) if form == "sparse" else array((neurons, K), E4M3),
        "x": array((TOKENS, K), E4M3),
        "sizes": None if groups == 1 else array((groups,), jnp.int32),
        "squared": packed(TOKENS, NEURONS),
        "over_tokens": packed(NEURONS, TOKENS),
        "tokens": array((TOKENS,), jnp.float32),
        **scales(neurons),
    }


def weights(dtype: str):
    def all_of_them(w, beta):
        options: dict[str, Any] = {"implementation": "hopper"}
        rows = cast8.by_row(w, **options)
        found = [api.pack_thresholded8(w, beta, axis=axis, **options) for axis in (0, 1)]
        return found, rows, cast8.by_column(w, interleaved=True, **options)

    return all_of_them, {"w": array((TOKENS, NEURONS), dtype), "beta": array((), jnp.float32)}


def tokens(columns: int):
    return functools.partial(cast8.both_ways, interleaved=True, implementation="hopper"), {
        "x": array((TOKENS, columns), jnp.bfloat16)
    }


def dense():
    def all_of_them(y, a, scale, squared_scale, rows):
        options: dict[str, Any] = {"implementation": "hopper"}
        found = cast8.activate(y, squared_scale, **options)
        given = (found.columns, squared_scale, scale)
        return cast8.differentiate(y, *given, **options), cast8.fold(cast8.Cast(a, rows), rows, **options)

    y, rows = array((TOKENS, NEURONS), jnp.bfloat16), array((TOKENS,), jnp.float32)
    return all_of_them, {"y": y, "a": array((TOKENS, NEURONS), E4M3), "rows": rows, **scales()}


KERNELS = {
    "activations both ways": activations(True, True, True),
    "activations along features": activations(True, False, False),
    "activations along tokens": activations(False, True, False),
    "product": products("sparse", 1),
    "product of groups": products("sparse", 3),
    "dense product": products("k_major", 1),
    "dense product of groups": products("k_major", 3),
    "weights f32": weights("float32"),
    "weights bf16": weights("bfloat16"),
    "tokens": tokens(2048),
    "wide tokens": tokens(8192),
    "dense activations": dense(),
}


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_without_spills(name, compile_ahead, monkeypatch):
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    function, arguments = KERNELS[name]
    found = compile_ahead(lambda arguments: function(**arguments), arguments)
    assert found
    for kernel in found:
        assert kernel.spilled == 0
        assert not kernel.warnings
