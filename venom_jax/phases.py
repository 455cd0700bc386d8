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

`change_recipe` does it to an nnx model and its optimizer in place; `transition` takes trees and returns them.

Nothing else changes a weight: saving, resuming and evaluating never bake (S with a scale is not idempotent). W2 of the
recipes that read it sparse in the backward only is not baked: the forward never saw it sparse.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from pallas_kernels.array_types import Array
from venom_jax import calibrate, memory_of_phase, router
from venom_jax import trees as named
from venom_jax.mlp import Method, SparseMLP
from venom_jax.model_trees import NEURONS, Arrays, Model, Part
from venom_jax.pattern import WEIGHT_GEMMS, Recipe, StackRecipe, WeightGemm, WeightMask
from venom_jax.threshold import optimal_scale, sparse_weight
from venom_jax.trees import Path

# Products of the forward, and the weight each reads with its threshold axis (counted from the end).
_FORWARD: dict[WeightGemm, tuple[str, int]] = {"y1": ("w1", -2), "y3": ("w2", -2)}
_READS: dict[WeightGemm, tuple[str, int]] = _FORWARD | {"dy2": ("w2", -1), "dx": ("w1", -1)}
_Y1 = WEIGHT_GEMMS.index("y1")


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
    old: StackRecipe | None,
    new: StackRecipe,
    *,
    seed: int,
    averages: Sequence[Any] = (),
    inputs: Mapping[Path, Array] | None = None,
    rescale: bool = False,
    first_layer: int = 0,
    layer_axis: int = 0,
    method_axis: int = 0,
) -> Transition:
    """Carry a model from recipe `old` to recipe `new`.

    FFN layers are found by name: nodes with leaves w1 and w2 in `params` and beta and permutation in `method`, each
    with one leading axis of stacked layers or none. Every leaf stays where it lies: on its devices, cut as it was, or
    in numpy.

    Args:
      params: nnx.State, dict, or any pytree with named paths.
      method: the tree of `Method` variables.
      trees: optimizer states, gradient accumulators: permuted (`venom_jax.trees.permute`); never baked.
      averages: moving averages of the parameters: permuted and baked.
      old, new: the recipes before and after; old = None is what the layers remember. `LayerRecipes` count the layers
        of one stack, or of several layers by the order of their names.
      seed: of the clustering; layer i uses (seed, first_layer + i) in a stack, and (seed, first_layer) by itself.
      inputs: a sample of what each layer reads under `old`, [..., T, D] by the layer's path: for recipes with shared
        experts, clustered by co-activation, or with a learned router, and to rescale
        (`venom_jax.calibrate.needs_inputs`).
      rescale: where a token computes more neurons in `new`, scale W2 by the s that minimises |y_old - s y_new| over
        the sample. At once all neurons speak, also those that the router had left out for their tokens.
      first_layer: number of the stack's first layer, where it is a part of a model.
      layer_axis, method_axis: where the layers of a stack run in the leaves of `params`, `trees` and `averages`, and
        in those of `method`.

    Raises:
      ValueError: a layer's sizes do not fit `new`, its max_experts is too small, no FFN layer is found, the sample is
        missing, the layers remember another recipe than `old`, or an optimizer's state cannot follow.
    """
    with named.automatic(params, method, trees, averages) as (enter, leave):
        model = Model(enter((params, method, [*trees], [*averages])), layer_axis, method_axis)
        report: dict[str, list[tuple[int, float]]] = {}  # of each figure: layers, and its value there
        for part in model.parts(old, new, first_layer):
            for name, value in _change(model, part, seed, inputs, rescale).items():
                report.setdefault(name, []).append((part.end - part.first, value))
        done = leave(model.close(), (params, method, [*trees], [*averages]))
    means = {name: sum(n * value for n, value in own) / sum(n for n, _ in own) for name, own in report.items()}
    return Transition(done[0], done[1], done[2], done[3], means)


def change_recipe(
    model: nnx.Module,
    optimizer: nnx.Optimizer | Sequence[nnx.Optimizer] | None,
    new: StackRecipe,
    *,
    seed: int = 0,
    averages: Sequence[Any] = (),
    **options: Any,
) -> dict[str, float]:
    """Carry an nnx model and its optimizer to recipe `new`, in place, from the recipe that its layers remember.

        phases.change_recipe(model, optimizer, Recipe.venom(experts=4, top_k=1))

    Sets the attribute `recipe` of every `SparseMLP`, but for `LayerRecipes` of a stack of layers, whose parts a model
    runs by the argument of the call.

    Args:
      model: holds SparseMLPs; not inside a transformation of nnx.
      optimizer: of `nnx.Optimizer`, several, or None.
      averages: models of the same structure, or their nnx.States, whose parameters are averages: changed in place too.
      options: inputs, rescale, layer_axis and method_axis of `transition`, and old, for layers that remember nothing.

    Returns:
      The report of `transition`.

    Raises:
      ValueError: as `transition`; nothing is changed then.
    """
    several = [] if optimizer is None else [optimizer] if isinstance(optimizer, nnx.Optimizer) else [*optimizer]
    params, method = nnx.state(model, nnx.Param), nnx.state(model, Method)
    states = [nnx.as_pure(one.opt_state) for one in several]
    means = [average if isinstance(average, nnx.State) else nnx.state(average, nnx.Param) for average in averages]
    old = options.pop("old", None)
    out = transition(params, method, states, old, new, seed=seed, averages=means, **options)
    nnx.update(model, out.params, out.method)
    for one, state in zip(several, out.trees, strict=True):
        nnx.update(one.opt_state, nnx.state(state))
    for average, mean, moved in zip(averages, means, out.averages, strict=True):
        if isinstance(average, nnx.State):
            nnx.replace_by_pure_dict(mean, nnx.to_pure_dict(moved))
        else:
            nnx.update(average, moved)
    layers = {tuple(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, SparseMLP)}
    if isinstance(new, Recipe):
        found = dict.fromkeys(layers, new)
    else:
        paths = named.find_layers(params, method)
        parts = new.parts(len(paths)) if len(paths) > 1 else []
        found = {paths[i]: part for first, end, part in parts for i in range(first, end)}
    for path, recipe in found.items():
        layers[path].recipe = recipe
    return out.report


def check(method: Any, recipe: StackRecipe) -> None:
    """Raise ValueError unless the layers' arrays were made for `recipe`: to be called after a checkpoint is restored.

    Args:
      method: the tree of `Method` variables, or an nnx model.
    """
    state = nnx.state(method, Method) if isinstance(method, nnx.Module) else method
    leaves = {path: value for path, value in named.named_leaves(state) if path[-1] == "phase"}
    found = [
        (path, row)
        for path in sorted(leaves, key=named.in_order)
        for row in named.on_host(leaves[path]).reshape(-1, memory_of_phase.LENGTH)
    ]
    if not found:
        raise ValueError("no layer of this tree remembers a recipe; pass the tree of Method variables.")
    wanted = [part for first, end, part in recipe.parts(len(found)) for _ in range(first, end)]
    for (path, row), part in zip(found, wanted, strict=True):
        made_for = memory_of_phase.decode(row)
        if not memory_of_phase.fits(made_for, part):
            raise ValueError(
                f"layer {'/'.join(path[:-1])} was made for {memory_of_phase.describe(made_for)}, the recipe has "
                f"{memory_of_phase.describe(part)}. Go on with the recipe it was made for, or change it by "
                "change_recipe or transition."
            )


def bake(params: Any, method: Any, recipe: StackRecipe, *, layer_axis: int = 0, method_axis: int = 0) -> Any:
    """W <- beta S(W) for the weights that the recipe's forward reads sparse: a dense model of the same function.

    For a temporary copy, as in an evaluation inside a sparse phase; `transition` does it where it must last.
    """
    with named.automatic(params, method) as (enter, leave):
        model = Model((*enter((params, method)), [], []), layer_axis, method_axis)
        for part in model.parts(recipe, recipe, 0, remembered=False):
            here = model.take(part)
            _bake(here.params, here.method, part.old, [*_FORWARD])
            model.put(part, here)
        return leave(model.close()[0], params)


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
    count = sum(path[-1] == "bias" for path, _ in named.named_leaves(method))
    if count != 1:
        raise ValueError(f"update_bias takes one (stacked) FFN, this tree holds {count}; use router.updated_bias.")

    def new_bias(bias: Array) -> Any:
        if len(parts) == 1:
            return router.updated_bias(bias, loads, parts[0][2])
        return jnp.concatenate([router.updated_bias(bias[a:b], loads[a:b], part) for a, b, part in parts])

    return named.map_named(lambda path, value: new_bias(value) if path[-1] == "bias" else value, method)


def _change(model: Model, part: Part, seed: int, inputs: Any, rescale: bool) -> dict[str, float]:
    """Carry one part to its new recipe; the report of it."""
    old, new, here = part.old, part.new, model.take(part)
    before = Arrays({**here.params}, {**here.method}, [])
    name, (w1, method) = "/".join(part.path), (here.params["w1"], here.method)
    new.check(*w1.shape[-2:])
    if new.experts > method["bias"].shape[-1]:
        room = method["bias"].shape[-1]
        raise ValueError(f"layer {name} has max_experts = {room}; the recipe has {new.experts} experts.")
    if calibrate.refits(old, new) and "router" not in method:
        raise ValueError(f"layer {name} has no room for a learned router; make it with learned_router=True.")
    x = None if inputs is None else inputs[part.path]
    if x is not None and x.ndim > 2 and part.end - part.first < x.shape[0]:
        x = x[part.first : part.end]
    every, report = [here.params, *here.averages], {}

    turned_off = [gemm for gemm in _FORWARD if gemm in old.weights and gemm not in new.weights]
    for tree in every:
        _bake(tree, method, old, turned_off)
    report |= {f"baked_{_FORWARD[gemm][0]}": 1.0 for gemm in turned_off}

    order = None
    if calibrate.reclusters(old, new):
        order = _cluster(here.params["w1"], new, seed, part.number, x)
        for tree in every:
            for name, leaf in tree.items():
                axis, is_matrix = NEURONS[name], leaf.ndim > order.ndim
                tree[name] = named.take(leaf, np.expand_dims(order, -3 - axis) if is_matrix else order, axis)
        method["permutation"] = named.take(method["permutation"], order, -1)
        report["clustered_experts"] = float(new.experts)
    if order is not None or new.experts != old.experts:
        method["bias"] = jnp.zeros_like(method["bias"])
    method["beta"] = _new_beta(here.params, method["beta"], old, new, moved=order is not None)
    if "up" in here.params:  # a gate's other factor is read as W1 is, by a scale of its own
        as_w1 = jnp.broadcast_to(jnp.asarray(method["beta_up"])[..., None], method["beta"].shape)
        found = _new_beta({**here.params, "w1": here.params["up"]}, as_w1, old, new, moved=order is not None)
        method["beta_up"] = found[..., _Y1]
    if calibrate.refits(old, new):
        method["router"] = _fit_router(here.params["w1"], new, x, method["router"])
    if "phase" in method:
        method["phase"] = jnp.broadcast_to(memory_of_phase.encode(new), method["phase"].shape)
    if new.weights:
        betas = np.asarray(named.on_host(method["beta"])).reshape(-1, len(WEIGHT_GEMMS)).mean(0)
        report |= {f"beta_{gemm}": float(betas[WEIGHT_GEMMS.index(gemm)]) for gemm in new.weights}
    if rescale and calibrate.grows(old, new):
        layers = [_layer(arrays) for arrays in (before, here)]
        scale = _output_scales(x, layers[0], layers[1], old, new)
        for tree in every:
            tree["w2"] = named.apply(_scaled, tree["w2"], scale)
        report["rescaled_w2"] = float(scale.mean())
    model.put(part, here, order)
    return report


def _layer(arrays: Arrays) -> calibrate.Layer:
    method = arrays.method
    return calibrate.Layer(
        arrays.params["w1"], arrays.params["w2"], method["beta"], method["bias"], method.get("router")
    )


def _bake(tree: dict[str, Any], method: dict[str, Any], recipe: Recipe, gemms: Sequence[WeightGemm]) -> None:
    """W <- beta S(W) in `tree` for the weights that these products read sparse."""
    beta = method["beta"]
    for gemm in gemms:
        if gemm in recipe.weights:
            name, axis = _FORWARD[gemm]
            tree[name] = named.apply(_baked(axis, recipe.weight_mask), tree[name], beta[..., WEIGHT_GEMMS.index(gemm)])
            if name == "w1" and "up" in tree:
                tree["up"] = named.apply(_baked(axis, recipe.weight_mask), tree["up"], method["beta_up"])


@functools.cache
def _baked(axis: int, mask: WeightMask) -> Callable[[Array, Array], Array]:
    def baked(w: Array, beta: Array) -> Any:
        s = sparse_weight(w.astype(jnp.float32), axis, mask)
        return (beta[..., None, None] * s).astype(w.dtype)

    return baked


def _scaled(w: Array, scale: Array) -> Any:
    return (w * scale[..., None, None]).astype(w.dtype)


def _new_beta(params: dict[str, Any], beta: Any, old: Recipe, new: Recipe, moved: bool) -> Any:
    """The scales of a phase: those that the last one had stay, but where neurons moved into other fours along F."""
    for index, gemm in enumerate(WEIGHT_GEMMS):
        other_fours = moved and (gemm in ("y3", "dx") or new.weight_mask == "transposable")
        kept = gemm in new.weights and gemm in old.weights and new.weight_mask == old.weight_mask
        if kept and not other_fours:
            continue
        scale = jnp.ones(beta.shape[:-1], beta.dtype)
        if gemm in new.weights:
            name, axis = _READS[gemm]
            scale = _scales(jnp.asarray(params[name]), axis, new.weight_mask).astype(beta.dtype)
        beta = jnp.asarray(beta).at[..., index].set(scale)
    return beta


@functools.partial(jax.jit, static_argnums=(1, 2))
def _scales(w: Array, axis: int, mask: WeightMask) -> Any:
    """`optimal_scale` of each matrix of a stack."""
    if w.ndim == 2:
        return optimal_scale(w, axis, mask)
    return jax.lax.map(lambda one: _scales(one, axis, mask), w)


def _agreed(found: np.ndarray, like: Any) -> np.ndarray:
    """What the first process found, where the processes share `like`: BLAS of unlike hosts may round differently."""
    addressable = not isinstance(like, jax.Array) or like.is_fully_addressable
    return found if addressable else multihost_utils.broadcast_one_to_all(found)


def _cluster(w1: Any, recipe: Recipe, seed: int, first: int, x: Array | None) -> np.ndarray:
    """The new order of neurons of each layer of a stack: [..., F]."""
    stack = named.on_host(w1).astype(np.float32).reshape(-1, *w1.shape[-2:])
    samples = [None] * len(stack) if x is None else np.asarray(x, np.float32).reshape(-1, *x.shape[-2:])
    orders = [
        calibrate.neuron_order(one, recipe, seed=_layer_seed(seed, i), x=sample)
        for i, (one, sample) in enumerate(zip(stack, samples, strict=True), first)
    ]
    return _agreed(np.stack(orders).reshape(*w1.shape[:-2], w1.shape[-1]), w1)


def _fit_router(w1: Any, recipe: Recipe, x: Array | None, old: Array) -> Any:
    """The rows of the router of each layer of a stack: [..., E_max, D]; those beyond E keep what they were."""
    if x is None:
        raise ValueError(
            "router = 'learned' needs a sample of the layers' inputs; give transition its argument inputs."
        )
    stack, samples = (named.on_host(t).astype(np.float32).reshape(-1, *t.shape[-2:]) for t in (w1, x))
    rows = [calibrate.fit_router(one, w, recipe) for one, w in zip(samples, stack, strict=True)]
    found = _agreed(np.stack(rows).reshape(*old.shape[:-2], recipe.experts, -1), w1)
    return jnp.asarray(old).at[..., : recipe.experts, :].set(found)


def _output_scales(x: Array | None, before: calibrate.Layer, after: calibrate.Layer, old: Recipe, new: Recipe) -> Any:
    """The factor of W2 of each layer of a stack: [...]."""
    if x is None:
        raise ValueError("rescale needs a sample of the layers' inputs; give transition its argument inputs.")

    def flat(leaf: Any) -> Any:
        return leaf.reshape(-1, *leaf.shape[x.ndim - 2 :])

    stacks = jax.tree.map(flat, (x, before, after))
    return jax.lax.map(lambda one: calibrate.output_scale(one[0], one[1], one[2], old, new), stacks).reshape(
        x.shape[:-2]
    )


def _layer_seed(seed: int, layer: int) -> int:
    """A seed for one layer of a stack, well mixed and stable across processes."""
    return int(np.random.SeedSequence([seed, layer]).generate_state(1)[0])
