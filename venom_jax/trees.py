"""Pytrees of a model as named leaves: where its FFN layers are, and optimizer state in another order of neurons.

Trees of several libraries name their leaves alike: a path of strings. Arrays are handled where they lie: a result has
its leaf's sharding, a numpy array stays one, and arrays whose types name their shardings are worked on as if they did
not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding

from pallas_kernels.array_types import Array

Path = tuple[str, ...]

_OF_LAYER = ("w1", "w2")
_OF_METHOD = ("beta", "permutation")
_SHARED = "one state for layers whose neurons have other orders"
_FACTORED = {"v_row": -1, "v_col": -2}  # of Adafactor: which of the axes, in the order of their sizes, is averaged away


class Weight(NamedTuple):
    """An FFN weight whose neurons move.

    shape, neurons, layers: of the leaf as it is; the axis of its neurons, and those of the layers in a stack.
    order: [F], or [..., F] over the stack, the old place of each neuron.
    """

    shape: tuple[int, ...]
    neurons: int
    layers: tuple[int, ...]
    order: np.ndarray


def names_of(path: tuple[Any, ...]) -> Path:
    """A key path as names; the wrapper that nnx.Variable and linen's boxes put around a value is left out."""
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


def named_leaves(tree: Any) -> list[tuple[Path, Any]]:
    return [(names_of(path), value) for path, value in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(function: Callable[[Path, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, value: function(names_of(path), value), tree)


def leaf(tree: Any, wanted: Path) -> Any:
    """The leaf of that path.

    Raises:
      ValueError: there is none.
    """
    for path, value in named_leaves(tree):
        if path == wanted:
            return value
    raise ValueError(f"the tree has no leaf {'/'.join(wanted)}; pass the tree of Method variables of the same model.")


def on_host(array: Any) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def find_layers(params: Any, method: Any) -> list[Path]:
    """The nodes that hold w1 and w2 in `params`, and beta and permutation in `method`; layer_10 after layer_9.

    Raises:
      ValueError: there is none, or no state of the method beside any.
    """
    names, state = ({path for path, _ in named_leaves(tree)} for tree in (params, method))
    pairs = _nodes(names, _OF_LAYER)
    if not pairs:
        raise ValueError(
            "no FFN layer found: no two leaves of one node are named w1 and w2. Are the parameters the first tree?"
        )
    found = sorted(pairs & _nodes(state, _OF_METHOD), key=in_order)
    if not found:
        some = "/".join((*min(pairs, key=in_order), "beta"))
        raise ValueError(
            f"the tree of Method variables has no leaf {some}, nor that of any other layer; pass those of the same "
            'model. Under linen\'s nn.scan and nn.vmap they are kept by variable_axes={"params": 0, "Method": 0}.'
        )
    return found


def permute(tree: Any, weights: Mapping[Path, Weight], every: Iterable[Path]) -> Any:
    """Optimizer state, an accumulator or an average with the neurons of every FFN in their new places.

    Args:
      tree: in which a path that has an FFN weight's within it belongs to that weight.
      weights: by the path in the parameters.
      every: the paths of all parameters, so that a leaf is given to the right one.

    Raises:
      ValueError: a leaf whose neurons cannot be told, or that joins neurons of layers with other orders; names the
        kind of state, as `ScaleBySM3State`.
    """
    known, sizes = set(every), {size for weight in weights.values() for size in [weight.shape[weight.neurons]]}
    smallest = min(int(np.prod(weight.shape)) for weight in weights.values())

    def new_value(key_path: tuple[Any, ...], value: Any) -> Any:
        path, shape = names_of(key_path), np.shape(value)
        owner = _owner(path, known)
        if owner in weights:
            axis = _neuron_axis(path, shape, weights[owner])
            if axis is None:
                return value
            if isinstance(axis, str):
                raise ValueError(_refusal(tree, key_path, shape, f"{axis} of {'/'.join(owner)}"))
            return _reordered(value, axis, weights[owner])
        # Of no parameter by itself: all in one vector, as optax.flatten has them, neurons among them.
        large = int(np.prod(shape)) >= smallest or bool(sizes & set(shape))
        if owner is None and int(np.prod(shape)) > 1 and large and not _is_key(value):
            raise ValueError(_refusal(tree, key_path, shape, "it belongs to no single parameter"))
        return value

    return jax.tree_util.tree_map_with_path(new_value, tree)


def apply(function: Callable[..., Array], value: Any, *arguments: Any) -> Any:
    """function(value, *arguments), compiled once for each function, laid out as the value; numpy for numpy."""
    if isinstance(value, jax.core.Tracer):
        return function(value, *arguments)
    if isinstance(value, np.ndarray):
        return np.asarray(_compiled(function, None)(value, *arguments)).astype(value.dtype)
    several = isinstance(value.sharding, NamedSharding) and value.sharding.num_devices > 1
    return _compiled(function, value.sharding if several else None)(value, *arguments)


@contextlib.contextmanager
def automatic(*trees: Any) -> Iterator[tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]]:
    """(enter, leave): trees whose arrays' types name no shardings, and back, for work between.

    leave(new, old) lays each leaf out as the one that it replaces.
    """
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(trees) if _is_explicit(leaf)}

    def enter(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: _moved(leaf, _auto(leaf.sharding.mesh)) if _is_explicit(leaf) else leaf, tree)

    def leave(new: Any, old: Any) -> Any:
        return jax.tree.map(_as_before, new, old)

    ambient = jax.sharding.get_mesh() if meshes else None
    with jax.set_mesh(_auto(ambient)) if ambient is not None and not ambient.empty else contextlib.nullcontext():
        yield enter, leave


def _as_before(new: Any, old: Any) -> Any:
    if isinstance(old, np.ndarray) and isinstance(new, jax.Array) and not isinstance(new, jax.core.Tracer):
        return np.asarray(new)
    if isinstance(new, jax.core.Tracer) or not isinstance(old, jax.Array) or isinstance(old, jax.core.Tracer):
        return new
    if _is_explicit(old):
        return old if new is old else jax.device_put(new, old.sharding)
    several = isinstance(old.sharding, NamedSharding) and new.shape == old.shape
    return jax.device_put(new, old.sharding) if several and new.sharding != old.sharding else new


def _is_explicit(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return isinstance(leaf.sharding, NamedSharding) and AxisType.Explicit in leaf.sharding.mesh.axis_types


def _auto(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _moved(leaf: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))  # pyrefly: ignore[missing-attribute]


@functools.lru_cache(maxsize=256)
def _compiled(function: Callable, sharding: jax.sharding.Sharding | None) -> Callable:
    return jax.jit(function) if sharding is None else jax.jit(function, out_shardings=sharding)


def _nodes(paths: set[Path], names: tuple[str, ...]) -> set[Path]:
    return {path[:-1] for path in paths if path and all((*path[:-1], name) in paths for name in names)}


def in_order(path: Path) -> tuple:
    """A key to sort by: names by their text, numbers in them by value."""
    parts = []
    for name in path:
        digits = "".join(c if c.isdigit() else " " for c in name).split()
        words = "".join(" " if c.isdigit() else c for c in name).split()
        parts.append((words, [int(number) for number in digits], name))
    return tuple(parts)


def _owner(path: Path, known: set[Path]) -> Path | None:
    """The longest parameter's path within a path."""
    for length in range(len(path), 0, -1):
        for start in range(len(path) - length + 1):
            if path[start : start + length] in known:
                return path[start : start + length]
    return None


def _neuron_axis(path: Path, shape: tuple[int, ...], weight: Weight) -> tuple[int, tuple[int, ...]] | str | None:
    """The axes of neurons and layers of a leaf of that weight; None: neurons do not matter; text: why it is unclear."""
    if int(np.prod(shape)) <= 1:
        return None
    count, extra = weight.shape[weight.neurons], len(shape) - len(weight.shape)
    if extra >= 0:  # of the weight's form, of lower rank, or summed along some axes; LBFGS has several of them
        own = shape[extra:]
        if own[weight.neurons] == 1 and all(n in (1, m) for n, m in zip(own, weight.shape, strict=True)):
            return None
        if own[weight.neurons] == count and all(n <= m for n, m in zip(own, weight.shape, strict=True)):
            if any(own[axis] != weight.shape[axis] for axis in weight.layers):
                return _SHARED
            return weight.neurons + extra, tuple(axis + extra for axis in weight.layers)
    axes = range(len(weight.shape))
    if extra == -1:  # averaged along one axis
        candidates = [axis for axis in axes if weight.shape[:axis] + weight.shape[axis + 1 :] == shape]
        for name, rank in _FACTORED.items():
            if name in path:
                candidates = [axis for axis in candidates if axis == int(np.argsort(weight.shape)[rank])]
        if len(candidates) == 1:
            gone = candidates[0]
            if gone in weight.layers:
                return _SHARED
            left = tuple(axis - (gone < axis) for axis in weight.layers)
            return None if gone == weight.neurons else (weight.neurons - (gone < weight.neurons), left)
    at = [axis for axis, size in enumerate(shape) if size == count]
    if not at:
        return None
    if weight.layers and not {weight.shape[axis] for axis in weight.layers} & set(shape):
        return _SHARED
    if len(at) > 1 or weight.layers or weight.shape.count(count) > 1:
        return "which axis is that of the neurons"
    return at[0], ()


def _reordered(value: Any, axes: tuple[int, tuple[int, ...]], weight: Weight) -> Any:
    neurons, layers = axes
    at = (*layers, neurons)  # of each axis of the order, where it goes
    order = weight.order.transpose(np.argsort(at))
    shape = [1] * np.ndim(value)
    for axis, size in zip(sorted(at), order.shape, strict=True):
        shape[axis] = size
    return take(value, order.reshape(shape), neurons)


def take(value: Any, order: np.ndarray, axis: int) -> Any:
    """Along one axis the entries that `order` names, where the value lies."""
    if isinstance(value, np.ndarray):
        return np.take_along_axis(value, order, axis=axis)
    return apply(_take(axis), value, order)


def move_axis(value: Any, source: int, destination: int) -> Any:
    """`moveaxis`, of numpy for numpy."""
    return (np if isinstance(value, np.ndarray) else jnp).moveaxis(value, source, destination)


@functools.cache
def _take(axis: int) -> Callable[[Array, Array], Array]:
    return lambda value, order: jnp.take_along_axis(value, order, axis=axis)


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _refusal(tree: Any, key_path: tuple[Any, ...], shape: tuple[int, ...], why: str) -> str:
    node, holder = tree, ""
    for entry in key_path:
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            holder = f"{type(node).__name__}."
        if isinstance(entry, jax.tree_util.GetAttrKey):
            node = getattr(node, entry.name)
        elif isinstance(entry, jax.tree_util.SequenceKey):
            node = node[entry.idx]
        elif isinstance(entry, jax.tree_util.DictKey):
            node = node[entry.key]
        else:
            break
    name = "/".join(names_of(key_path))
    return (
        f"{holder}{name} of shape {shape} cannot follow the neurons to their new places: {why}. Change the recipe "
        "before the optimizer's state is made, make it anew, or use an optimizer with a state for each parameter."
    )
