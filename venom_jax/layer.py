"""The layer on whatever devices its arrays lie, for every module and for models without modules.

`venom_jax.ffn` and `venom_jax.sharded_ffn` are the layer on one device's part; here is found out what that part is.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.array_types import Array, Float, Int
from venom_jax import dispatch, ffn, placement, router
from venom_jax.calibrate import Layer
from venom_jax.dispatch import Implementation
from venom_jax.ffn import PackedWeights
from venom_jax.fp8 import EightBitWeights
from venom_jax.pattern import Recipe
from venom_jax.placement import Hints, Names, Placement
from venom_jax.router import Axis
from venom_jax.sharded_ffn import local_recipe, sharded_sparse_ffn
from venom_jax.stats import FFNStats

_NO_HINTS = Hints()


def sparse_ffn(
    x: Float[Array, "*batch D"],
    w1: Float[Array, "D F"],
    w2: Float[Array, "F D"],
    route: Int[Array, "..."] | None = None,
    beta: Float[Array, "4"] | None = None,
    *,
    recipe: Recipe,
    packed: PackedWeights | EightBitWeights | None = None,
    implementation: Implementation | None = None,
    return_density: bool = False,
    mesh: placement.Mesh | None = None,
    token_spec: P | None = None,
    weight_axes: Sequence[str] | None = None,
) -> Any:
    """y3 = relu(x S(W1))^2 W2 over the neurons of each token's experts, with the sparse backward of `recipe`.

        y = sparse_ffn(x, w1, w2, recipe=Recipe.act24())

    takes the place of `jnp.square(jax.nn.relu(x @ w1)) @ w2`: no state, no change between phases. Recipes with sparse
    weights take their scales as `beta`, routed ones the experts of each token as `route`; `SparseMLP` holds both.

    Args:
      x: tokens, in the compute dtype; all leading axes together are the batch.
      w1, w2: master weights; cast to x's dtype after thresholding. Gradients come back in their dtype.
      route, beta, recipe, packed, implementation, return_density: as for `venom_jax.ffn.sparse_ffn`.
      mesh, token_spec, weight_axes: how the arrays lie on several devices, see `venom_jax.placement.Hints`.

    Returns:
      y3 of x's shape and dtype, or (y3, density).

    Raises:
      ValueError: sizes, dtypes or a route that do not belong together, or that the recipe cannot split.
      NotImplementedError: the named implementation does not run here; forward-mode derivatives of a sparse recipe.
    """
    check_arrays(x, w1, w2)
    recipe.check(*w1.shape)
    if recipe.routed != (route is not None) or (
        route is not None and route.shape not in ((*x.shape[:-1], recipe.top_k), (_count(x), recipe.top_k))
    ):
        wanted = f"route of shape {(*x.shape[:-1], recipe.top_k)}" if recipe.routed else "route=None"
        got = None if route is None else f"one of shape {route.shape}"
        raise ValueError(f"recipe with experts = {recipe.experts} takes {wanted}, got {got}.")
    if route is not None:
        route = route.reshape(*x.shape[:-1], recipe.top_k)
    hints = Hints(mesh, token_spec, None if weight_axes is None else tuple(weight_axes))

    def one(part: Recipe, axis: Axis | None, x, w1, w2, route, beta, packed):
        tokens = x.reshape(-1, x.shape[-1])
        rows = None if route is None else route.reshape(-1, part.top_k)
        y, density = _apply(tokens, w1, w2, rows, beta, part, packed, implementation, axis)
        return y.reshape(x.shape), density

    arrays = (x, w1, w2, route, beta, packed)
    found = placement.find(x, w1, hints, None, packed=packed is not None)
    if found is None or _leave_to_xla(found, recipe):
        y, density = one(recipe, None, *arrays)
    else:
        own, axis = local_recipe(recipe, found.parts), found.weights or None

        def each(*parts):
            y, density = one(own, axis, *parts)
            return y, _mean(density, found)

        specs = (found.batch, found.neurons(1), found.neurons(0), found.batch, P(), P())
        y, density = found.run(each, arrays, specs, (found.batch, P()))
        y = _laid_out(y, x, found, None)
    return (y, density) if return_density else y


def run(
    x: Array,
    layer: Layer,
    recipe: Any,
    *,
    max_experts: int,
    packed: PackedWeights | EightBitWeights | None = None,
    key: Array | None = None,
    implementation: Implementation | None = None,
    axis: Axis | None = None,
    hints: Hints = _NO_HINTS,
    names: Names | None = None,
    out_sharding: Any = None,
) -> tuple[Array, FFNStats]:
    """What `SparseMLP` computes: y of x's shape, and statistics of the whole batch (of this device's, with `axis`).

    Args:
      names: the mesh axes of w1's dimensions, as far as the module knows.
      axis: inside `jax.shard_map`, the mesh axis over whose devices the neurons are cut.

    Raises:
      ValueError, NotImplementedError: as `sparse_ffn`; also a recipe with more experts than max_experts.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe={recipe!r} must be a Recipe, such as Recipe.venom(experts=4, top_k=1)")
    if recipe.experts > max_experts:
        raise ValueError(
            f"recipe with experts = {recipe.experts} in a layer made with max_experts = {max_experts}; "
            "raise max_experts."
        )
    check_arrays(x, layer.w1, layer.w2)
    recipe.check(layer.w1.shape[0], layer.w1.shape[1] * (1 if axis is None else jax.lax.axis_size(axis)))
    one = functools.partial(_one, max_experts=max_experts, implementation=implementation)
    found = None if axis is not None else placement.find(x, layer.w1, hints, names, packed=packed is not None)
    if found is None or _leave_to_xla(found, recipe):
        y, stats = one(recipe, axis, x, layer, packed, key)
        return _constrained(y, out_sharding), stats
    own, part_axis = local_recipe(recipe, found.parts), found.weights or None

    def each(x, layer, packed, key):
        if key is not None and found.token_axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(found.token_axes))  # no noise that devices share
        y, stats = one(own, part_axis, x, layer, packed, key)
        load = jax.lax.psum(stats.load, found.token_axes) if found.token_axes else stats.load
        return y, FFNStats(_mean(stats.density, found), load)

    arrays = (x, *layer, packed, key)
    specs = (found.batch, found.neurons(1), found.neurons(0), P(), P(), P(), P(), P())
    y, stats = found.run(
        lambda x, w1, w2, beta, bias, learned, packed, key: each(x, Layer(w1, w2, beta, bias, learned), packed, key),
        arrays,
        specs,
        (found.batch, P()),
    )
    return _laid_out(y, x, found, out_sharding), stats


def check_arrays(x: Array, w1: Array, w2: Array) -> None:
    """Raise ValueError unless x [..., D], w1 [D, F] and w2 [F, D] fit and hold real floating-point numbers."""
    for name, array in (("x", x), ("w1", w1), ("w2", w2)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype.name}; the layer takes floating-point numbers, cast it.")
    if w1.ndim != 2 or w2.shape != w1.shape[::-1] or x.ndim < 1 or x.shape[-1] != w1.shape[0]:
        raise ValueError(
            f"shapes do not fit: x {x.shape}, w1 {w1.shape}, w2 {w2.shape}; want [..., D], [D, F], [F, D]."
        )


def _one(
    recipe: Recipe,
    axis: Axis | None,
    x: Array,
    layer: Layer,
    packed: PackedWeights | EightBitWeights | None,
    key: Array | None,
    *,
    max_experts: int,
    implementation: Implementation | None,
) -> tuple[Array, FFNStats]:
    """The layer on one device's part."""
    tokens = x.reshape(-1, x.shape[-1])
    route, load = None, jnp.zeros(max_experts, jnp.float32)
    if recipe.routed and tokens.shape[0]:
        options: dict[str, Any] = {"bias": layer.bias, "learned": layer.router, "key": key, "axis": axis}
        # "hopper" is about products; a router that has no kernel runs beside them.
        scoring = "reference" if implementation == "reference" else None
        route = router.route(tokens, layer.w1, recipe, implementation=scoring, **options)
        load = router.load(route, max_experts)
    y, density = _apply(tokens, layer.w1, layer.w2, route, layer.beta, recipe, packed, implementation, axis)
    return y.reshape(x.shape), FFNStats(density, jax.lax.stop_gradient(load))


def _apply(tokens, w1, w2, route, beta, recipe, packed, implementation, axis) -> tuple[Array, Array]:
    """(y, density) of one device's tokens [T, D]."""
    if tokens.shape[0] == 0:
        return jnp.dot(jnp.dot(tokens, w1.astype(tokens.dtype)), w2.astype(tokens.dtype)), jnp.zeros((), jnp.float32)
    if placement.is_checked(tokens):
        w1, w2 = placement.vary_alike((w1, w2), tokens)
        if implementation is None and not recipe.is_dense:
            if dispatch.resolve_implementation(None) != "reference":
                dispatch.warn_reference("jax.shard_map checks which values differ; give it check_vma=False")
            implementation = "reference"
    apply = ffn.sparse_ffn if axis is None else functools.partial(sharded_sparse_ffn, axis=axis)
    options = {"packed": packed, "implementation": implementation, "return_density": True}
    try:
        return apply(tokens, w1, w2, route, beta, recipe=recipe, **options)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError(
            "forward-mode derivatives (jvp, jacfwd, hessian) of a sparse layer are not defined: its backward is an "
            "algorithm of its own. Use recipe = Recipe.dense(), or reverse mode."
        ) from error


def _leave_to_xla(found: Placement, recipe: Recipe) -> bool:
    """XLA splits dense products by itself, but not those of arrays whose types name their shardings."""
    return recipe.is_dense and not recipe.in_fp8 and not found.explicit


def _mean(density: Array, found: Placement) -> Array:
    return jax.lax.pmean(density, found.token_axes) if found.token_axes else density


def _laid_out(y: Array, x: Array, found: Placement, out_sharding: Any) -> Array:
    """y as the caller wants it, or as x lies."""
    if out_sharding is not None:
        return _constrained(y, out_sharding)
    if found.explicit:
        return placement.reshard(y, jax.typeof(x).sharding.spec, found.mesh)
    return y


def _constrained(y: Array, out_sharding: Any) -> Array:
    if out_sharding is None:
        return y
    mesh = jax.sharding.get_abstract_mesh()
    mesh = getattr(out_sharding, "mesh", mesh)
    if any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return jax.sharding.reshard(y, out_sharding)
    return jax.lax.with_sharding_constraint(y, out_sharding)


def _count(x: Array) -> int:
    return x.size // x.shape[-1] if x.shape[-1] else 0
