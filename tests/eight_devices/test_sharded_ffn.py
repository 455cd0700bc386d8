"""The FFN with its neurons cut over devices equals the FFN on one device; what travels between them."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import device
from tests.helpers import assert_close, relative_error
from train.model.mesh import Shards
from venom_jax import Recipe, router, sparse_ffn
from venom_jax.ffn import _sparse, pack_weights
from venom_jax.sharded_ffn import _sparse as _sharded
from venom_jax.sharded_ffn import local_recipe, sharded_sparse_ffn

D, F, TOKENS = 64, 256, 512
BETA = jnp.array([1.5, 1.3, 1.6, 1.2], jnp.float32)
BATCH, COLUMNS, ROWS = P(("data", "fsdp")), P(None, "fsdp"), P("fsdp")


def mesh_of(data, fsdp):
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def inputs(dtype=jnp.float32, d_model=D, d_ffn=F, tokens=TOKENS):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, (tokens, d_model), dtype) for key in keys[:2])
    w1 = jax.random.normal(keys[2], (d_model, d_ffn)) / d_model**0.5
    w2 = jax.random.normal(keys[3], (d_ffn, d_model)) / d_ffn**0.5
    return x, w1, w2, dy


@functools.partial(jax.jit, static_argnames=("recipe", "kernels"))
def whole(x, w1, w2, dy, recipe, kernels):
    def ffn(x, w1, w2):
        route = router.route(x, w1, recipe) if recipe.routed else None
        if recipe.is_dense:
            return sparse_ffn(x, w1, w2, recipe=recipe, return_density=True)
        return _sparse(recipe, kernels, x, w1, w2, BETA, None, route)

    (y, density), vjp = jax.vjp(ffn, x, w1, w2)
    return y, density, *vjp((dy, jnp.zeros_like(density)))


def sharded_function(mesh, recipe, kernels, pack=False):
    """As `whole`, of global arrays: the same results, computed by all devices of the mesh."""
    recipe = local_recipe(recipe, mesh.size)

    def ffn(x, w1, w2, packed):
        route = router.route(x, w1, recipe, axis="fsdp") if recipe.routed else None
        if recipe.is_dense and not recipe.in_fp8:
            return sharded_sparse_ffn(x, w1, w2, recipe=recipe, axis="fsdp", return_density=True)
        return _sharded(recipe, kernels, "fsdp", x, w1, w2, BETA, packed, route)

    def part(x, w1, w2, dy):
        options: dict[str, Any] = {"dtype": x.dtype, "recipe": recipe, "implementation": "reference"}
        packed = pack_weights(w1, w2, BETA, **options) if pack else None
        (y, density), vjp = jax.vjp(functools.partial(ffn, packed=packed), x, w1, w2)
        dx, dw1, dw2 = vjp((dy, jnp.zeros_like(density)))
        return y, jax.lax.pmean(density, ("data", "fsdp")), dx, *jax.lax.psum((dw1, dw2), "data")

    specs = (BATCH, COLUMNS, ROWS, BATCH)
    results = (BATCH, P(), BATCH, COLUMNS, ROWS)
    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False))


def place(mesh, *arrays):
    specs = (BATCH, COLUMNS, ROWS, BATCH)
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]


EIGHT_BLOCKS = {"token_blocks": 8}
FORMS = {
    "dense": (Recipe.dense(), None),
    "act24 masked, blocks": (Recipe.act24(**EIGHT_BLOCKS), None),
    "venom k=2 masked, exact gradient": (Recipe.venom(4, 2, wgrad="dense", threshold_grad="exact"), None),
    "oracle, ablations": (
        Recipe.venom(2, 1, wgrad="dense", router="oracle", hidden="full", weights=("y3", "dx")),
        None,
    ),
    "act24 packed": (Recipe.act24(wgrad="dense"), "reference"),
    "one weight packed, activations dense": (Recipe(weights=("dy2",)), "reference"),
    "all24 packed, blocks": (Recipe.all24(**EIGHT_BLOCKS), "reference"),
    "venom k=1 packed, blocks": (Recipe.venom(4, 1, **EIGHT_BLOCKS), "reference"),
    "venom k=2 packed": (Recipe.venom(4, 2, wgrad="dense"), "reference"),
}


@pytest.mark.parametrize("name", FORMS)
def test_sharded_equals_whole(name):
    recipe, kernels = FORMS[name]
    arrays, mesh = inputs(), mesh_of(2, 4)
    run = sharded_function(mesh, recipe, kernels, pack=kernels is not None)
    with jax.default_matmul_precision("highest"):
        found, expected = run(*place(mesh, *arrays)), whole(*arrays, recipe, None)
    for out, reference in zip(found, expected, strict=True):
        assert_close(out, reference)


FP8_FORMS = {
    "dense packed": (Recipe.dense(precision="fp8"), "reference"),
    "act24 masked": (Recipe.act24(precision="fp8"), None),
    "venom k=2 packed": (Recipe.venom(4, 2, precision="fp8"), "reference"),
}


@pytest.mark.parametrize("name", FP8_FORMS)
def test_eight_bits_are_each_devices_own(name):
    """Each device samples, scales and prunes its own tokens: as the whole layer does with these alone."""
    recipe, kernels = FP8_FORMS[name]
    arrays, mesh = inputs(d_model=128, d_ffn=512), mesh_of(2, 4)
    x, w1, w2, dy = arrays
    y, _, dx, dw1, dw2 = sharded_function(mesh, recipe, kernels, pack=kernels is not None)(*place(mesh, *arrays))

    @jax.jit
    def of_part(x, w1, w2, dy):
        route = router.route(x, w1, recipe) if recipe.routed else None
        (y, density), vjp = jax.vjp(lambda *a: _sparse(recipe, None, *a, BETA, None, route), x, w1, w2)
        return y, *vjp((dy, jnp.zeros_like(density)))

    parts = [of_part(*part) for part in zip(jnp.split(x, 8), [w1] * 8, [w2] * 8, jnp.split(dy, 8), strict=True)]
    ys, dxs, dw1s, dw2s = zip(*parts, strict=True)
    for out, reference in ((y, jnp.concatenate(ys)), (dx, jnp.concatenate(dxs)), (dw1, sum(dw1s)), (dw2, sum(dw2s))):
        assert relative_error(out, reference) < 2e-3


def bytes_after_gathers(function, *arrays):
    """What a device has after the all-gathers of the compiled program, where they are of 16 bits."""
    text = jax.jit(function).lower(*arrays).compile().as_text() or ""
    found = re.findall(r"= (\w)(\d+)\[([\d,]*)\]\S* all-gather\(", text)
    return sum(int(bits) // 8 * math.prod(map(int, shape.split(","))) for _, bits, shape in found)


def gathered_bytes(mesh, recipe, *, backward):
    """Of the layer, by itself or with its gradients."""
    run = sharded_function(mesh, recipe, None if recipe.is_dense else "reference", pack=bool(recipe.weights))

    def results(*arrays):
        y, density, *gradients = run(*arrays)
        return (y, density, *gradients) if backward else y

    # float16: the CPU's compiler would move bfloat16 as float32.
    return bytes_after_gathers(results, *place(mesh, *inputs(jnp.float16)))


def test_all_gathers_move_25_of_32_bytes_in_each_pass():
    mesh = mesh_of(2, 4)
    dense = gathered_bytes(mesh, Recipe.dense(), backward=False)
    assert dense == 2 * 2 * D * F
    assert gathered_bytes(mesh, Recipe.dense(), backward=True) == 2 * dense, "gathered again, not kept"
    recipe = Recipe.all24(token_blocks=8)
    forward = gathered_bytes(mesh, recipe, backward=False)
    assert forward * 32 == 25 * dense
    assert gathered_bytes(mesh, recipe, backward=True) - forward == forward


def test_in_eight_bits_weights_travel_as_bytes():
    mesh, recipe = mesh_of(2, 4), Recipe.all24(precision="fp8")
    arrays = place(mesh, *inputs(jnp.float16, 128, 512))
    moved = bytes_after_gathers(lambda *a: sharded_function(mesh, recipe, "reference", pack=True)(*a)[0], *arrays)
    assert moved == 128 * 512 * (1 + 5 / 8) + 2 * 512 * 4  # W2, S(W1) with its positions, and their scales


def test_projections_gather_their_weight_once_in_each_pass():
    mesh, shards = mesh_of(2, 4), Shards()
    x, w, _, dy = inputs()
    w, dy = w[:, :D], dy.astype(jnp.float32)

    def part(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: shards.times(x, w, "qkv"), x, w)
        dx, dw = vjp(dy)
        return y, dx, jax.lax.psum(dw, "data")

    specs = (BATCH, ROWS, BATCH)
    run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(BATCH, BATCH, ROWS), check_vma=False)
    with jax.default_matmul_precision("highest"):
        y, vjp = jax.vjp(jnp.matmul, x, w)
        for out, reference in zip(jax.jit(run)(x, w, dy), (y, *vjp(dy)), strict=True):
            assert_close(out, reference)
    assert bytes_after_gathers(run, x.astype(jnp.float16), w, dy.astype(jnp.float16)) == 2 * 2 * D * D


def test_what_an_exchange_has_turned_is_turned_back_at_once():
    """Or XLA would leave the embedding's rows, and all after them, with the features slowest, and copy W1's update."""
    tokens, table = jnp.zeros((8, 16), jnp.int32), jnp.zeros((32, 8))
    embed = functools.partial(jax.shard_map, mesh=mesh_of(2, 4), check_vma=False)(
        functools.partial(Shards().embed, dtype=jnp.bfloat16), in_specs=(P(None, "fsdp"), BATCH), out_specs=BATCH
    )
    in_order = re.compile(r"@LayoutConstraint\(.*result_layouts = \[dense<\[([\d, ]*)\]>")
    assert in_order.findall(jax.jit(embed).lower(table, tokens).as_text()) == ["2, 1, 0"]
    layer = sharded_function(mesh_of(2, 4), Recipe.dense(), None)
    assert in_order.findall(layer.lower(*place(mesh_of(2, 4), *inputs())).as_text()) == ["1, 0"] * 2


@pytest.mark.parametrize("recipe", [Recipe.all24(), Recipe.venom(4, 1)], ids=["all24", "venom"])
def test_kernels_lower_under_a_mesh(recipe, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr(device, "hopper_available", lambda: True)
    mesh = mesh_of(2, 4)
    specs = (BATCH, COLUMNS, ROWS, BATCH)
    arguments = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(inputs(jnp.bfloat16, 256, 1024, 1024), specs, strict=True)
    ]
    traced = sharded_function(mesh, recipe, "hopper").trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") >= 7  # two packings of weights, two of activations, six products


def test_what_does_not_divide_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"token_blocks = 4 .* 8 parts .*; use a multiple of 8"):
        local_recipe(Recipe.act24(token_blocks=4), 8)
    run = functools.partial(sharded_sparse_ffn, recipe=Recipe.act24(), axis="fsdp")
    specs = (BATCH, COLUMNS, ROWS)
    run = jax.shard_map(run, mesh=mesh_of(1, 8), in_specs=specs, out_specs=BATCH, check_vma=False)
    with pytest.raises(ValueError, match="leaves 2 neurons each, no multiple of 4"):
        jax.eval_shape(run, *inputs(d_ffn=16)[:3])
