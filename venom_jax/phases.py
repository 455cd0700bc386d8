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
from venom_jax.pattern import WEIGHT_GEMMS, LayerRecipes, Recipe, StackRecipe, WeightGemm, WeightMask
from venom_jax.threshold import optimal_scale, sparse_weight
from venom_jax.trees import Path, Weight

# Products of the forward, and the weight each reads with its threshold axis (counted from the end).
_FORWARD: dict[WeightGemm, tuple[str, int]] = {"y1": ("w1", -2), "y3": ("w2", -2)}
_READS: dict[WeightGemm, tuple[str, int]] = _FORWARD | {"dy2": ("w2", -1), "dx": ("w1", -1)}

_WEIGHTS = ("w1", "w2")
_STATE = ("beta", "bias", "permutation", "router", "phase")


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
        model = _Model(enter((params, method, [*trees], [*averages])), layer_axis, method_axis)
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
        for row in _on_host(leaves[path]).reshape(-1, memory_of_phase.LENGTH)
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
        model = _Model((*enter((params, method)), [], []), layer_axis, method_axis)
        for part in model.parts(recipe, recipe, 0, remembered=False):
            here = model.take(part)
            _bake(here.params, here.method["beta"], part.old, [*_FORWARD])
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


class _Part(NamedTuple):
    """Layers [first, end) of one FFN node that share both recipes, and the number of the first one in the model."""

    path: Path
    first: int
    end: int
    old: Recipe
    new: Recipe
    number: int


class _Arrays(NamedTuple):
    """Leaves of one FFN by name, layers first, the averages' beside the parameters'."""

    params: dict[str, Any]
    method: dict[str, Any]
    averages: list[dict[str, Any]]


class _Model:
    """The trees of a transition, the leaves of their FFNs taken out to be worked on."""

    def __init__(self, given: tuple[Any, Any, list[Any], list[Any]], layer_axis: int, method_axis: int):
        """given: parameters, Method variables, optimizers' states, averages of the parameters."""
        params, method, *_ = self._given = given
        self._axes = dict.fromkeys(_WEIGHTS, layer_axis) | dict.fromkeys(_STATE, method_axis)
        self.layers = named.find_layers(params, method)
        self._work = {path: self._take_out(path) for path in self.layers}
        self._orders: dict[Path, np.ndarray] = {}

    def _take_out(self, path: Path) -> _Arrays:
        params, method, _, averages = self._given

        def of(tree: Any, names: Sequence[str]) -> dict[str, Any]:
            leaves = {p[-1]: leaf for p, leaf in named.named_leaves(tree) if p[:-1] == path and p[-1] in names}
            return {name: self._turned(leaf, name, 0) for name, leaf in leaves.items()}

        found = _Arrays(of(params, _WEIGHTS), of(method, _STATE), [of(tree, _WEIGHTS) for tree in averages])
        w1, w2 = (found.params[name] for name in _WEIGHTS)
        stack = w1.shape[:-2]
        if w2.shape != (*stack, *w1.shape[:-3:-1]):
            raise ValueError(
                f"layer {'/'.join(path)} has w1 {w1.shape} and w2 {w2.shape}, layers first; want [..., D, F] and "
                "[..., F, D]. Give layer_axis where the layers of a stack do not come first."
            )
        if found.method["beta"].shape[:-1] != stack:
            raise ValueError(
                f"layer {'/'.join(path)} has w1 {w1.shape} and beta {found.method['beta'].shape}, layers first; give "
                "method_axis where those of the Method variables do not."
            )
        return found

    def _turned(self, leaf: Any, name: str, to: int | None) -> Any:
        """The leaf with its layers first (to = 0), or where they were (to = None)."""
        axis = self._axes[name]
        if not axis or np.ndim(leaf) < (2 if name in _STATE else 3):
            return leaf
        return named.move_axis(leaf, axis, 0) if to == 0 else named.move_axis(leaf, 0, axis)

    def parts(
        self, old: StackRecipe | None, new: StackRecipe, first_layer: int, *, remembered: bool = True
    ) -> list[_Part]:
        """The runs of layers that share both recipes.

        Raises:
          ValueError: the layers remember another recipe than `old`, or nothing where old is None.
        """
        counts = {path: int(np.prod(self._work[path].params["w1"].shape[:-2])) for path in self.layers}
        after = self._each(new, counts)
        before = self._each(old, counts) if old is not None else [None] * sum(counts.values())
        pairs, found = iter(zip(before, after, strict=True)), []
        for path, count in counts.items():
            memory = _rows(self._work[path].method.get("phase")) if remembered else None
            for layer in range(count):
                given, wanted = next(pairs)
                known = None if memory is None else memory_of_phase.decode(memory[layer])
                before_it = given or known
                if before_it is None:
                    raise ValueError(f"layer {'/'.join(path)} remembers no recipe; give the one before as old.")
                if given is not None and known is not None and not memory_of_phase.same(given, known):
                    raise ValueError(
                        f"layer {'/'.join(path)} was made for {memory_of_phase.describe(known)}, old says "
                        f"{memory_of_phase.describe(given)}; give the recipe it was trained with, or old = None."
                    )
                last = found[-1] if layer else None
                if last is not None and (last.old, last.new) == (before_it, wanted):
                    found[-1] = last._replace(end=layer + 1)
                else:
                    found.append(_Part(path, layer, layer + 1, before_it, wanted, first_layer + layer))
        return found

    def _each(self, recipe: StackRecipe, counts: dict[Path, int]) -> list[Recipe]:
        """The recipe of every layer."""
        total = sum(counts.values())
        stacks = [self._work[path].params["w1"].ndim - 2 for path in self.layers]
        if isinstance(recipe, LayerRecipes) and any(stacks) and stacks != [1]:
            path = self.layers[stacks.index(max(stacks))]
            raise ValueError(
                f"LayerRecipes take one FFN with a leading axis of layers, or FFNs without one, found {len(stacks)}, "
                f"of which {'/'.join(path)} has w1 {self._work[path].params['w1'].shape}; "
                "give each its own recipe in a transition of its own."
            )
        return [part for first, end, part in recipe.parts(total) for _ in range(first, end)]

    def take(self, part: _Part) -> _Arrays:
        """The arrays of a part, to be changed at will."""

        def of(leaves: dict[str, Any]) -> dict[str, Any]:
            return {
                name: leaf if self._is_whole(part) else leaf[part.first : part.end] for name, leaf in leaves.items()
            }

        work = self._work[part.path]
        return _Arrays(of(work.params), of(work.method), [of(average) for average in work.averages])

    def put(self, part: _Part, arrays: _Arrays, order: np.ndarray | None = None) -> None:
        """The arrays of a part in place of those that it had; `order` of its neurons [..., F] for all other trees."""
        work = self._work[part.path]
        pairs = [(work.params, arrays.params), (work.method, arrays.method)]
        for leaves, new in [*pairs, *zip(work.averages, arrays.averages, strict=True)]:
            for name, leaf in leaves.items():
                whole = self._is_whole(part)
                leaves[name] = new[name] if whole else _pasted(leaf, new[name], part.first)
        if order is not None:
            shape = (*work.params["w1"].shape[:-2], order.shape[-1])
            orders = self._orders.setdefault(part.path, np.broadcast_to(np.arange(shape[-1]), shape).copy())
            orders.reshape(-1, shape[-1])[part.first : part.end] = order.reshape(-1, shape[-1])

    def _is_whole(self, part: _Part) -> bool:
        return part.end - part.first == int(np.prod(self._work[part.path].params["w1"].shape[:-2]))

    def close(self) -> tuple[Any, Any, list[Any], list[Any]]:
        """The trees with the changed leaves, and the optimizers' states in the new order."""
        params, method, others, averages = self._given
        every = [path for path, _ in named.named_leaves(params)]
        weights: dict[Path, Weight] = {
            (*path, name): self._weight(path, name) for path in self._orders for name in _WEIGHTS
        }
        moved = [named.permute(tree, weights, every) if weights else tree for tree in others]

        def back(tree: Any, work: dict[Path, dict[str, Any]]) -> Any:
            def new_value(path: Path, leaf: Any) -> Any:
                return (
                    self._turned(work[path[:-1]][path[-1]], path[-1], None)
                    if path[:-1] in work and path[-1] in work[path[:-1]]
                    else leaf
                )

            return named.map_named(new_value, tree)

        return (
            back(params, {path: work.params for path, work in self._work.items()}),
            back(method, {path: work.method for path, work in self._work.items()}),
            moved,
            [back(t, {path: work.averages[i] for path, work in self._work.items()}) for i, t in enumerate(averages)],
        )

    def _weight(self, path: Path, name: str) -> Weight:
        shape = self._work[path].params[name].shape
        stack, matrix = list(range(len(shape) - 2)), [len(shape) - 2, len(shape) - 1]
        axes = [*stack, *matrix]  # where each axis of the leaf as it is comes from
        if stack and self._axes[name]:
            axes.insert(self._axes[name], axes.pop(0))
        neurons = matrix[1] if name == "w1" else matrix[0]
        at = tuple(axes.index(axis) for axis in stack)
        return Weight(tuple(shape[axis] for axis in axes), axes.index(neurons), at, self._orders[path])


def _change(model: _Model, part: _Part, seed: int, inputs: Any, rescale: bool) -> dict[str, float]:
    """Carry one part to its new recipe; the report of it."""
    old, new, here = part.old, part.new, model.take(part)
    before = _Arrays({**here.params}, {**here.method}, [])
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
        _bake(tree, method["beta"], old, turned_off)
    report |= {f"baked_{_FORWARD[gemm][0]}": 1.0 for gemm in turned_off}

    order = None
    if calibrate.reclusters(old, new):
        order = _cluster(here.params["w1"], new, seed, part.number, x)
        for tree in every:
            tree["w1"] = named.take(tree["w1"], order[..., None, :], -1)
            tree["w2"] = named.take(tree["w2"], order[..., :, None], -2)
        method["permutation"] = named.take(method["permutation"], order, -1)
        report["clustered_experts"] = float(new.experts)
    if order is not None or new.experts != old.experts:
        method["bias"] = jnp.zeros_like(method["bias"])
    method["beta"] = _new_beta(here.params, method["beta"], old, new, moved=order is not None)
    if calibrate.refits(old, new):
        method["router"] = _fit_router(here.params["w1"], new, x, method["router"])
    if "phase" in method:
        method["phase"] = jnp.broadcast_to(memory_of_phase.encode(new), method["phase"].shape)
    if new.weights:
        betas = np.asarray(_on_host(method["beta"])).reshape(-1, len(WEIGHT_GEMMS)).mean(0)
        report |= {f"beta_{gemm}": float(betas[WEIGHT_GEMMS.index(gemm)]) for gemm in new.weights}
    if rescale and calibrate.grows(old, new):
        layers = [_layer(arrays) for arrays in (before, here)]
        scale = _output_scales(x, layers[0], layers[1], old, new)
        for tree in every:
            tree["w2"] = named.apply(_scaled, tree["w2"], scale)
        report["rescaled_w2"] = float(scale.mean())
    model.put(part, here, order)
    return report


def _layer(arrays: _Arrays) -> calibrate.Layer:
    method = arrays.method
    return calibrate.Layer(
        arrays.params["w1"], arrays.params["w2"], method["beta"], method["bias"], method.get("router")
    )


def _bake(tree: dict[str, Any], beta: Any, recipe: Recipe, gemms: Sequence[WeightGemm]) -> None:
    """W <- beta S(W) in `tree` for the weights that these products read sparse."""
    for gemm in gemms:
        if gemm in recipe.weights:
            name, axis = _FORWARD[gemm]
            tree[name] = named.apply(_baked(axis, recipe.weight_mask), tree[name], beta[..., WEIGHT_GEMMS.index(gemm)])


@functools.cache
def _baked(axis: int, mask: WeightMask) -> Callable[[Array, Array], Array]:
    def baked(w: Array, beta: Array) -> Any:
        s = sparse_weight(w.astype(jnp.float32), axis, mask)
        return (beta[..., None, None] * s).astype(w.dtype)

    return baked


def _scaled(w: Array, scale: Array) -> Any:
    return (w * scale[..., None, None]).astype(w.dtype)


def _pasted(whole: Any, part: Any, first: int) -> Any:
    if part.shape == whole.shape:
        return part
    if isinstance(whole, np.ndarray):
        return np.concatenate([whole[:first], part, whole[first + part.shape[0] :]])
    return jnp.concatenate([whole[:first], part, whole[first + part.shape[0] :]])


def _rows(memory: Any) -> np.ndarray | None:
    """The numbers of each layer, one a row; None where they are not at hand."""
    if memory is None or isinstance(memory, jax.core.Tracer):
        return None
    return _on_host(memory).reshape(-1, memory_of_phase.LENGTH)


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


def _on_host(array: Any) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _agreed(found: np.ndarray, like: Any) -> np.ndarray:
    """What the first process found, where the processes share `like`: BLAS of unlike hosts may round differently."""
    addressable = not isinstance(like, jax.Array) or like.is_fully_addressable
    return found if addressable else multihost_utils.broadcast_one_to_all(found)


def _cluster(w1: Any, recipe: Recipe, seed: int, first: int, x: Array | None) -> np.ndarray:
    """The new order of neurons of each layer of a stack: [..., F]."""
    stack = _on_host(w1).astype(np.float32).reshape(-1, *w1.shape[-2:])
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
    stack, samples = (_on_host(t).astype(np.float32).reshape(-1, *t.shape[-2:]) for t in (w1, x))
    rows = [calibrate.fit_router(one, w, recipe) for one, w in zip(samples, stack, strict=True)]
    found = _agreed(np.stack(rows).reshape(*old.shape[:-2], recipe.experts, -1), w1)
    return old.at[..., : recipe.experts, :].set(found)


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
