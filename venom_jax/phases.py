"""What changes when the recipe changes: cluster and permute, freeze the scales, bake. On the host, between steps.

| change of recipe                          | what happens                                                         |
|-------------------------------------------|----------------------------------------------------------------------|
| a product's weight turns sparse           | its scale beta is frozen from the master weights                      |
| y1's (y3's) weight turns dense again      | bake W1 <- beta S(W1) (W2 <- beta S(W2)): the function stays the same |
| the number of experts becomes a new E > 1 | cluster W1's columns, permute the hidden neurons of every tree        |

Nothing else changes a weight: saving, resuming and evaluating never bake (S with a scale is not idempotent). W2 of the
recipes that read it sparse in the backward only is not baked: the forward never saw it sparse.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_types import Array
from pallas_kernels.pack import reference as pack
from venom_jax import router
from venom_jax.pattern import WEIGHT_GEMMS, Recipe, WeightGemm
from venom_jax.threshold import optimal_scale

# Products of the forward, and the weight each reads with its threshold axis (counted from the end).
_FORWARD: dict[WeightGemm, tuple[str, int]] = {"y1": ("w1", -2), "y3": ("w2", -2)}
_READS: dict[WeightGemm, tuple[str, int]] = _FORWARD | {"dy2": ("w2", -1), "dx": ("w1", -1)}

Path = tuple[str, ...]


class Transition(NamedTuple):
    """The trees after a change of recipe, and a report of plain numbers for the log."""

    params: Any
    method: Any
    trees: list[Any]
    averages: list[Any]
    report: dict[str, float]


def transition(
    params: Any,
    method: Any,
    trees: Sequence[Any],
    old: Recipe,
    new: Recipe,
    *,
    seed: int,
    averages: Sequence[Any] = (),
) -> Transition:
    """Carry a model from recipe `old` to recipe `new`.

    FFN layers are found by name: leaves whose path ends in w1, w2 (in `params`) and beta, bias, permutation (at the
    same path in `method`), with any leading axes (stacked layers).

    Args:
      params: nnx.State, dict, or any pytree with named paths.
      method: the tree of `Method` variables.
      trees: optimizer states, gradient accumulators: permuted wherever a leaf's path ends like an FFN weight's and has
        its shape; never baked.
      averages: moving averages of the parameters: permuted and baked.
      old, new: the recipes before and after.
      seed: of the clustering; layer i of a stack uses (seed, i).

    Raises:
      ValueError: a layer's sizes do not fit `new`, its max_experts is too small, or no FFN layer is found.
    """
    layers = _find_layers(params)
    for path in layers:
        w1 = _leaf(params, (*path, "w1"))
        new.check(*w1.shape[-2:])
        room = _leaf(method, (*path, "bias")).shape[-1]
        if new.experts > room:
            raise ValueError(f"layer {'/'.join(path)} has max_experts = {room}; the recipe has {new.experts} experts.")
    report: dict[str, float] = {}

    turned_off = [gemm for gemm in _FORWARD if gemm in old.weights and gemm not in new.weights]
    if turned_off:
        baking = Recipe(weights=tuple(turned_off))
        params = bake(params, method, baking)
        averages = [bake(average, method, baking) for average in averages]
        report |= {f"baked_{_FORWARD[gemm][0]}": 1.0 for gemm in turned_off}

    orders: dict[Path, Array] = {}
    if new.routed and new.experts != old.experts:
        orders = {path: _cluster(_leaf(params, (*path, "w1")), new.experts, seed) for path in layers}
        params, *moved = (_permute(tree, orders, params) for tree in (params, *trees, *averages))
        trees, averages = moved[: len(trees)], moved[len(trees) :]
        report["clustered_experts"] = float(new.experts)

    def new_method(path: Path, value: Array) -> Array:
        layer, name = path[:-1], path[-1]
        if layer not in layers:
            return value
        if name == "permutation" and layer in orders:
            return jnp.take_along_axis(value, orders[layer], axis=-1)
        if name == "bias" and new.experts != old.experts:
            return jnp.zeros_like(value)
        if name == "beta":
            return _new_beta(params, layer, value, old, new)
        return value

    method = _map_named(new_method, method)
    if new.weights:
        betas = jnp.stack([_leaf(method, (*path, "beta")).reshape(-1, len(WEIGHT_GEMMS)).mean(0) for path in layers])
        report |= {f"beta_{gemm}": float(betas[:, WEIGHT_GEMMS.index(gemm)].mean()) for gemm in new.weights}
    return Transition(params, method, list(trees), list(averages), report)


def bake(params: Any, method: Any, recipe: Recipe) -> Any:
    """W <- beta S(W) for the weights that the recipe's forward reads sparse: a dense model of the same function.

    For a temporary copy, as in an evaluation inside a sparse phase; `transition` does it where it must last.
    """
    baked = {_FORWARD[gemm][0]: gemm for gemm in _FORWARD if gemm in recipe.weights}
    layers = _find_layers(params)

    def new_value(path: Path, value: Array) -> Array:
        if path[:-1] not in layers or path[-1] not in baked:
            return value
        gemm = baked[path[-1]]
        beta = _leaf(method, (*path[:-1], "beta"))[..., WEIGHT_GEMMS.index(gemm), None, None]
        s = pack.soft_threshold(value.astype(jnp.float32), _FORWARD[gemm][1])
        return (beta * s).astype(value.dtype)

    return _map_named(new_value, params)


def update_bias(method: Any, loads: Array, recipe: Recipe) -> Any:
    """One balancing step on the only FFN (stack) of `method`: b += balance_rate sign(mean load - load).

    Args:
      loads: [..., max_experts] tokens per expert of the whole optimizer step, summed over devices and microbatches.

    Raises:
      ValueError: `method` holds several FFN layers; use `venom_jax.router.updated_bias` on each bias.
    """
    if not recipe.routed or recipe.balance_rate == 0:
        return method
    count = sum(path[-1] == "bias" for path, _ in _named_leaves(method))
    if count != 1:
        raise ValueError(f"update_bias takes one (stacked) FFN, this tree holds {count}; use router.updated_bias.")
    return _map_named(
        lambda path, value: router.updated_bias(value, loads, recipe) if path[-1] == "bias" else value, method
    )


def _new_beta(params: Any, layer: Path, beta: Array, old: Recipe, new: Recipe) -> Array:
    for index, gemm in enumerate(WEIGHT_GEMMS):
        if gemm in new.weights and gemm in old.weights:
            continue
        scale = jnp.ones(beta.shape[:-1], beta.dtype)
        if gemm in new.weights:
            name, axis = _READS[gemm]
            w = _leaf(params, (*layer, name))
            each = [optimal_scale(one, axis) for one in w.reshape(-1, *w.shape[-2:])]
            scale = jnp.stack(each).reshape(beta.shape[:-1]).astype(beta.dtype)
        beta = beta.at[..., index].set(scale)
    return beta


def _cluster(w1: Array, experts: int, seed: int) -> Array:
    """The new order of neurons of each layer of a stack: [..., F]."""
    stack = np.asarray(w1, np.float32).reshape(-1, *w1.shape[-2:])
    orders = [router.cluster_columns(one, experts, seed=_layer_seed(seed, i)) for i, one in enumerate(stack)]
    return jnp.asarray(np.stack(orders).reshape(*w1.shape[:-2], w1.shape[-1]))


def _layer_seed(seed: int, layer: int) -> int:
    """A seed for one layer of a stack, well mixed and stable across processes."""
    return int(np.random.SeedSequence([seed, layer]).generate_state(1)[0])


def _permute(tree: Any, orders: dict[Path, Array], params: Any) -> Any:
    """Reorder the neurons of every leaf whose path ends in an FFN weight's path and that has its shape."""
    weights = {(*path, name): order for path, order in orders.items() for name in ("w1", "w2")}
    shapes = {path: _leaf(params, path).shape for path in weights}

    def new_value(path: Path, value: Array) -> Array:
        for weight, order in weights.items():
            if path[-len(weight) :] == weight and value.shape == shapes[weight]:
                if weight[-1] == "w1":
                    return jnp.take_along_axis(value, order[..., None, :], axis=-1)
                return jnp.take_along_axis(value, order[..., :, None], axis=-2)
        return value

    return _map_named(new_value, tree)


def _find_layers(params: Any) -> list[Path]:
    names = {path for path, _ in _named_leaves(params)}
    layers = sorted(path[:-1] for path in names if path[-1] == "w1" and (*path[:-1], "w2") in names)
    if not layers:
        raise ValueError("no FFN layer found: no two leaves of one node are named w1 and w2.")
    return layers


def _leaf(tree: Any, wanted: Path) -> Array:
    for path, value in _named_leaves(tree):
        if path == wanted:
            return value
    raise ValueError(f"the tree has no leaf {'/'.join(wanted)}; pass the tree of Method variables of the same model.")


def _named_leaves(tree: Any) -> list[tuple[Path, Array]]:
    return [(_names(path), value) for path, value in jax.tree_util.tree_leaves_with_path(tree)]


def _map_named(function: Callable[[Path, Array], Array], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, value: function(_names(path), value), tree)


def _names(path: tuple[Any, ...]) -> Path:
    """A key path as names; the wrapper that nnx.Variable puts around its value is left out."""
    names = []
    for entry in path:
        if isinstance(entry, jax.tree_util.DictKey):
            names.append(str(entry.key))
        elif isinstance(entry, jax.tree_util.SequenceKey):
            names.append(str(entry.idx))
        elif isinstance(entry, jax.tree_util.GetAttrKey) and entry.name not in ("value", "raw_value"):
            names.append(entry.name)
        elif isinstance(entry, jax.tree_util.FlattenedIndexKey):
            names.append(str(entry.key))
    return tuple(names)
