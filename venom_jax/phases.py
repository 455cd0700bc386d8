"""What changes when the recipe changes: cluster and permute, freeze the scales, bake. On the host, between steps.

| change of recipe                          | what happens                                                         |
|-------------------------------------------|----------------------------------------------------------------------|
| a product's weight turns sparse           | its scale beta is frozen from the master weights                      |
| y1's (y3's) weight turns dense again      | bake W1 <- beta S(W1) (W2 <- beta S(W2)): the function stays the same |
| the number of experts becomes a new E > 1 | cluster the neurons, permute them in every tree (also where only      |
|                                           | `shared` or `clustering` change)                                      |
| experts are formed, or the router becomes | fit the rows of router = "learned" to the best choice in hindsight    |
| a learned one                             |                                                                       |
| a token computes more neurons, if asked   | scale W2 so that the layer's output changes least                     |

Nothing else changes a weight: saving, resuming and evaluating never bake (S with a scale is not idempotent). W2 of the
recipes that read it sparse in the backward only is not baked: the forward never saw it sparse.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pallas_kernels.array_types import Array
from venom_jax import calibrate, router
from venom_jax.pattern import WEIGHT_GEMMS, LayerRecipes, Recipe, StackRecipe, WeightGemm
from venom_jax.threshold import optimal_scale, sparse_weight

# Products of the forward, and the weight each reads with its threshold axis (counted from the end).
_FORWARD: dict[WeightGemm, tuple[str, int]] = {"y1": ("w1", -2), "y3": ("w2", -2)}
_READS: dict[WeightGemm, tuple[str, int]] = _FORWARD | {"dy2": ("w2", -1), "dx": ("w1", -1)}

_STACKED = ("w1", "w2", "up", "b1", "b_up", "beta", "beta_up", "bias", "permutation", "router")
_PERMUTED = ("w1", "w2", "up", "b1", "b_up")
"""What a layer has for each neuron; a gate's other factor `up` goes with W1 in all that happens."""

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
    old: StackRecipe,
    new: StackRecipe,
    *,
    seed: int,
    averages: Sequence[Any] = (),
    inputs: Mapping[Path, Array] | None = None,
    rescale: bool = False,
    first_layer: int = 0,
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
      old, new: the recipes before and after. `LayerRecipes` need all layers in one stack.
      seed: of the clustering; layer i of a stack uses (seed, first_layer + i).
      inputs: a sample of what each layer reads under `old`, [..., T, D] by the layer's path: for recipes with shared
        experts, clustered by co-activation, or with a learned router, and to rescale
        (`venom_jax.calibrate.needs_inputs`).
      rescale: where a token computes more neurons in `new`, scale W2 by the s that minimises |y_old - s y_new| over
        the sample. At once all neurons speak, also those that the router had left out for their tokens.
      first_layer: number of the stack's first layer, where it is a part of a model.

    Raises:
      ValueError: a layer's sizes do not fit `new`, its max_experts is too small, no FFN layer is found, or the
        sample is missing.
    """
    if isinstance(old, LayerRecipes) or isinstance(new, LayerRecipes):
        options = {"seed": seed, "inputs": inputs, "rescale": rescale}
        return _transition_in_parts(params, method, trees, old, new, averages, options)
    layers = _find_layers(params)
    for path in layers:
        w1 = _leaf(params, (*path, "w1"))
        new.check(*w1.shape[-2:])
        room = _leaf(method, (*path, "bias")).shape[-1]
        if new.experts > room:
            raise ValueError(f"layer {'/'.join(path)} has max_experts = {room}; the recipe has {new.experts} experts.")
    report: dict[str, float] = {}
    params_before, method_before = params, method

    turned_off = [gemm for gemm in _FORWARD if gemm in old.weights and gemm not in new.weights]
    if turned_off:
        baking = Recipe(weights=tuple(turned_off), weight_mask=old.weight_mask)
        params = bake(params, method, baking)
        averages = [bake(average, method, baking) for average in averages]
        report |= {f"baked_{_FORWARD[gemm][0]}": 1.0 for gemm in turned_off}

    orders: dict[Path, Array] = {}
    if calibrate.reclusters(old, new):
        orders = {
            path: _cluster(_leaf(params, (*path, "w1")), new, seed, first_layer, _sample(inputs, path))
            for path in layers
        }
        params, *moved = (_permute(tree, orders, params) for tree in (params, *trees, *averages))
        trees, averages = moved[: len(trees)], moved[len(trees) :]
        report["clustered_experts"] = float(new.experts)

    def new_method(path: Path, value: Array) -> Array:
        layer, name = path[:-1], path[-1]
        if layer not in layers:
            return value
        if name == "permutation" and layer in orders:
            return jnp.take_along_axis(value, orders[layer], axis=-1)
        if name == "bias" and (orders or new.experts != old.experts):
            return jnp.zeros_like(value)
        if name == "beta":
            return _new_beta(params, layer, value, old, new, moved=bool(orders))
        if name == "beta_up":
            as_w1 = _new_beta(params, layer, jnp.tile(value[..., None], 4), old, new, moved=bool(orders), w1="up")
            return as_w1[..., WEIGHT_GEMMS.index("y1")]
        if name == "router" and calibrate.refits(old, new):
            return _fit_router(_leaf(params, (*layer, "w1")), new, _sample(inputs, layer), value)
        return value

    if calibrate.refits(old, new):
        for path in layers:
            _leaf(method, (*path, "router"))  # a layer made without room for it is told by its name
    method = _map_named(new_method, method)
    if new.weights:
        betas = jnp.stack([_leaf(method, (*path, "beta")).reshape(-1, len(WEIGHT_GEMMS)).mean(0) for path in layers])
        report |= {f"beta_{gemm}": float(betas[:, WEIGHT_GEMMS.index(gemm)].mean()) for gemm in new.weights}
    if rescale and calibrate.grows(old, new):
        scales = {}
        for path in layers:
            before, after = _arrays(params_before, method_before, path), _arrays(params, method, path)
            scales[path] = _output_scales(_sample(inputs, path), before, after, old, new)
        params, *averages = (_scale_w2(tree, scales) for tree in (params, *averages))
        report["rescaled_w2"] = float(jnp.concatenate([scale.reshape(-1) for scale in scales.values()]).mean())
    return Transition(params, method, list(trees), list(averages), report)


def bake(params: Any, method: Any, recipe: StackRecipe) -> Any:
    """W <- beta S(W) for the weights that the recipe's forward reads sparse: a dense model of the same function.

    For a temporary copy, as in an evaluation inside a sparse phase; `transition` does it where it must last.
    """
    if isinstance(recipe, LayerRecipes):
        layer, count = _only_stack(params)
        for first, end, part in recipe.parts(count):
            some, its_method = (_cut(tree, layer, count, first, end) for tree in (params, method))
            params = _paste(params, bake(some, its_method, part), layer, count, first)
        return params
    baked = {_FORWARD[gemm][0]: gemm for gemm in _FORWARD if gemm in recipe.weights}
    layers = _find_layers(params)

    def new_value(path: Path, value: Array) -> Array:
        name = "w1" if path[-1] == "up" else path[-1]
        if path[:-1] not in layers or name not in baked:
            return value
        gemm = baked[name]
        if path[-1] == "up":
            beta = _leaf(method, (*path[:-1], "beta_up"))[..., None, None]
        else:
            beta = _leaf(method, (*path[:-1], "beta"))[..., WEIGHT_GEMMS.index(gemm), None, None]
        s = sparse_weight(value.astype(jnp.float32), _FORWARD[gemm][1], recipe.weight_mask)
        return (beta * s).astype(value.dtype)

    return _map_named(new_value, params)


def update_bias(method: Any, loads: Array, recipe: StackRecipe) -> Any:
    """One balancing step on the only FFN (stack) of `method`: b += balance_rate sign(mean load - load).

    Args:
      loads: [..., max_experts] tokens per expert of the whole optimizer step, summed over devices and microbatches.

    Raises:
      ValueError: `method` holds several FFN layers; use `venom_jax.router.updated_bias` on each bias.
    """
    parts = recipe.parts(loads.shape[0])
    if not any(part.routed and part.balance_rate for _, _, part in parts):
        return method
    count = sum(path[-1] == "bias" for path, _ in _named_leaves(method))
    if count != 1:
        raise ValueError(f"update_bias takes one (stacked) FFN, this tree holds {count}; use router.updated_bias.")

    def new_bias(bias: Array) -> Array:
        if len(parts) == 1:
            return router.updated_bias(bias, loads, parts[0][2])
        return jnp.concatenate([router.updated_bias(bias[a:b], loads[a:b], part) for a, b, part in parts])

    return _map_named(lambda path, value: new_bias(value) if path[-1] == "bias" else value, method)


def _transition_in_parts(
    params: Any,
    method: Any,
    trees: Sequence[Any],
    old: StackRecipe,
    new: StackRecipe,
    averages: Sequence[Any],
    options: dict[str, Any],
) -> Transition:
    """`transition` of each run of layers that shares both recipes, cut out of the stack and put back."""
    layer, count = _only_stack(params)
    spans = [{first: part for first, _, part in recipe.parts(count)} for recipe in (old, new)]
    firsts = sorted(spans[0].keys() | spans[1].keys())
    done = Transition(params, method, list(trees), list(averages), {})
    reports: dict[str, list[tuple[int, float]]] = {}  # of each figure: layers, and its value there
    for first, end in zip(firsts, [*firsts[1:], count], strict=True):
        before, after = (span[max(start for start in span if start <= first)] for span in spans)
        given = [done.params, done.method, *done.trees, *done.averages]
        cut = [_cut(tree, layer, count, first, end) for tree in given]
        inputs = options["inputs"] and {path: x[first:end] for path, x in options["inputs"].items()}
        out = transition(
            *(cut[0], cut[1], cut[2 : 2 + len(trees)], before, after),
            **(options | {"inputs": inputs, "averages": cut[2 + len(trees) :], "first_layer": first}),
        )
        found = [out.params, out.method, *out.trees, *out.averages]
        whole = [_paste(tree, part, layer, count, first) for tree, part in zip(given, found, strict=True)]
        done = Transition(whole[0], whole[1], whole[2 : 2 + len(trees)], whole[2 + len(trees) :], {})
        for name, value in out.report.items():
            reports.setdefault(name, []).append((end - first, value))
    means = {name: sum(n * value for n, value in own) / sum(n for n, _ in own) for name, own in reports.items()}
    return done._replace(report=means)


def _only_stack(params: Any) -> tuple[Path, int]:
    """The path of the one FFN of `params`, whose leaves have a leading axis of layers, and its length."""
    layers = _find_layers(params)
    w1 = _leaf(params, (*layers[0], "w1"))
    if len(layers) > 1 or w1.ndim != 3:
        raise ValueError(
            f"LayerRecipes take one FFN with a leading axis of layers, found {len(layers)} with w1 {w1.shape}; "
            "give each layer its own recipe in a transition of its own."
        )
    return layers[0], w1.shape[0]


def _is_stacked(path: Path, value: Any, layer: Path, count: int) -> bool:
    """Whether a leaf, of whatever tree, belongs to that FFN and has its axis of layers."""
    inside = path[:-1][len(path) - 1 - len(layer) :] == layer and path[-1] in _STACKED
    return inside and value.ndim > 0 and value.shape[0] == count


def _cut(tree: Any, layer: Path, count: int, first: int, end: int) -> Any:
    return _map_named(lambda path, leaf: leaf[first:end] if _is_stacked(path, leaf, layer, count) else leaf, tree)


def _paste(tree: Any, part: Any, layer: Path, count: int, first: int) -> Any:
    """`tree` with the layers from `first` on replaced by those of `part`."""
    parts = dict(_named_leaves(part))

    def new_value(path: Path, leaf: Array) -> Array:
        if not _is_stacked(path, leaf, layer, count):
            return leaf
        new = parts[path]
        return jnp.concatenate([leaf[:first], new, leaf[first + new.shape[0] :]])

    return _map_named(new_value, tree)


def _new_beta(params: Any, layer: Path, beta: Array, old: Recipe, new: Recipe, moved: bool, w1: str = "w1") -> Array:
    """The scales of a phase: those that the last one had stay, but where neurons moved into other fours along F.

    w1: the weight that stands for W1.
    """
    for index, gemm in enumerate(WEIGHT_GEMMS):
        other_fours = moved and (gemm in ("y3", "dx") or new.weight_mask == "transposable")
        kept = gemm in new.weights and gemm in old.weights and new.weight_mask == old.weight_mask
        if kept and not other_fours:
            continue
        scale = jnp.ones(beta.shape[:-1], beta.dtype)
        if gemm in new.weights:
            name, axis = _READS[gemm]
            w = _leaf(params, (*layer, w1 if name == "w1" else name))
            each = [optimal_scale(one, axis, new.weight_mask) for one in w.reshape(-1, *w.shape[-2:])]
            scale = jnp.stack(each).reshape(beta.shape[:-1]).astype(beta.dtype)
        beta = beta.at[..., index].set(scale)
    return beta


def _on_host(array: Array) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _agreed(found: np.ndarray, like: Array) -> np.ndarray:
    """What the first process found, where the processes share `like`: BLAS of unlike hosts may round differently."""
    return found if like.is_fully_addressable else multihost_utils.broadcast_one_to_all(found)


def _cluster(w1: Array, recipe: Recipe, seed: int, first: int, x: Array | None) -> Array:
    """The new order of neurons of each layer of a stack: [..., F]."""
    stack = _on_host(w1).astype(np.float32).reshape(-1, *w1.shape[-2:])
    samples = [None] * len(stack) if x is None else np.asarray(x, np.float32).reshape(-1, *x.shape[-2:])
    orders = [
        calibrate.neuron_order(one, recipe, seed=_layer_seed(seed, i), x=sample)
        for i, (one, sample) in enumerate(zip(stack, samples, strict=True), first)
    ]
    return jnp.asarray(_agreed(np.stack(orders).reshape(*w1.shape[:-2], w1.shape[-1]), w1))


def _fit_router(w1: Array, recipe: Recipe, x: Array | None, old: Array) -> Array:
    """The rows of the router of each layer of a stack: [..., E_max, D]; those beyond E keep what they were."""
    if x is None:
        raise ValueError(
            "router = 'learned' needs a sample of the layers' inputs; give transition its argument inputs."
        )
    stack, samples = (_on_host(t).astype(np.float32).reshape(-1, *t.shape[-2:]) for t in (w1, x))
    rows = [calibrate.fit_router(one, w, recipe) for one, w in zip(samples, stack, strict=True)]
    found = _agreed(np.stack(rows).reshape(*old.shape[:-2], recipe.experts, -1), w1)
    return old.at[..., : recipe.experts, :].set(found)


def _sample(inputs: Mapping[Path, Array] | None, path: Path) -> Array | None:
    return None if inputs is None else inputs[path]


def _arrays(params: Any, method: Any, path: Path) -> calibrate.Layer:
    first, second = (_leaf(params, (*path, name)) for name in ("w1", "w2"))
    beta, bias = (_leaf(method, (*path, name)) for name in ("beta", "bias"))
    return calibrate.Layer(first, second, beta, bias, dict(_named_leaves(method)).get((*path, "router")))


def _output_scales(x: Array | None, before: calibrate.Layer, after: calibrate.Layer, old: Recipe, new: Recipe) -> Array:
    """The factor of W2 of each layer of a stack: [...]."""
    if x is None:
        raise ValueError("rescale needs a sample of the layers' inputs; give transition its argument inputs.")

    def flat(leaf: Array) -> Array:
        return leaf.reshape(-1, *leaf.shape[x.ndim - 2 :])

    stacks = jax.tree.map(flat, (x, before, after))
    return jax.lax.map(lambda one: calibrate.output_scale(one[0], one[1], one[2], old, new), stacks).reshape(
        x.shape[:-2]
    )


def _scale_w2(tree: Any, scales: dict[Path, Array]) -> Any:
    def new_value(path: Path, value: Array) -> Array:
        if path[-1] == "w2" and path[:-1] in scales:
            return (value * scales[path[:-1]][..., None, None]).astype(value.dtype)
        return value

    return _map_named(new_value, tree)


def _layer_seed(seed: int, layer: int) -> int:
    """A seed for one layer of a stack, well mixed and stable across processes."""
    return int(np.random.SeedSequence([seed, layer]).generate_state(1)[0])


def _permute(tree: Any, orders: dict[Path, Array], params: Any) -> Any:
    """Reorder the neurons of every leaf whose path ends in an FFN weight's path and that has its shape."""
    names = {path for path, _ in _named_leaves(params)}
    weights = {(*path, name): order for path, order in orders.items() for name in _PERMUTED if (*path, name) in names}
    shapes = {path: _leaf(params, path).shape for path in weights}

    def new_value(path: Path, value: Array) -> Array:
        for weight, order in weights.items():
            if path[-len(weight) :] == weight and value.shape == shapes[weight]:
                if weight[-1] == "w2":
                    return jnp.take_along_axis(value, order[..., :, None], axis=-2)
                one_each = weight[-1] in ("b1", "b_up")
                return jnp.take_along_axis(value, order if one_each else order[..., None, :], axis=-1)
        return value

    return _map_named(new_value, tree)


def _find_layers(params: Any) -> list[Path]:
    names = {path for path, _ in _named_leaves(params)}
    layers = sorted(path[:-1] for path in names if path[-1] == "w1" and (*path[:-1], "w2") in names)
    if not layers:
        raise ValueError(
            "no FFN layer found: no two leaves of one node are named w1 and w2. Are the parameters the first tree?"
        )
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
