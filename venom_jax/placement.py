"""How a layer's arrays lie on a mesh, and the layer run on each device's part of them.

A kernel is one call that XLA cannot cut, so a layer under `jax.jit` on several devices wraps itself in `jax.shard_map`:

    tokens   cut over every axis of the mesh that divides their first dimension
    weights  along neurons over the axes that cut them in memory (FSDP), gathered packed by `venom_jax.sharded_ffn`;
             whole on every device where nothing cuts them

The mesh is the ambient one (`jax.set_mesh`), the one that was given, or the one that the arrays' types name. Axes that
a surrounding `jax.shard_map` has taken are left alone: over those the arrays are one device's part already.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.array_types import Array
from pallas_kernels.tiles import GRANULE

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
Names = P | Sequence[str | Sequence[str] | None]
"""Mesh axes of each dimension of an array, as in a PartitionSpec; others than the mesh's are passed over."""


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the caller knows of the mesh; None is found out.

    Attributes:
      mesh: where no ambient mesh is set.
      token_spec: of the tokens' leading axes, such as P(("data", "fsdp")).
      weight_axes: the mesh axes that cut the weights in memory, whichever dimension; () is none.
    """

    mesh: Mesh | None = None
    token_spec: P | None = None
    weight_axes: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one call runs on a mesh.

    Attributes:
      mesh: as `jax.shard_map` takes it; None is the ambient one.
      free: its axes that no surrounding `jax.shard_map` has taken.
      tokens: the axes over which each leading dimension of the tokens is cut.
      weights: the axes over which the neurons are cut.
      explicit: whether arrays carry their shardings in their types.
    """

    mesh: Mesh | None
    sizes: Mapping[str, int]
    free: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    weights: tuple[str, ...]
    explicit: bool

    @property
    def token_axes(self) -> tuple[str, ...]:
        return tuple(axis for axes in self.tokens for axis in axes)

    @property
    def parts(self) -> int:
        """Into how many parts the batch is cut."""
        return math.prod(self.sizes[axis] for axis in self.token_axes)

    @property
    def batch(self) -> P:
        """Of an array whose leading dimensions are the tokens'."""
        return P(*(axes or None for axes in self.tokens))

    def neurons(self, dimension: int) -> P:
        """Of a weight whose neurons run along that dimension."""
        return P(*[None] * dimension, self.weights) if self.weights else P()

    def run(self, function: Callable, arrays: Sequence[Any], in_specs: Sequence[Any], out_specs: Any) -> Any:
        """function(*arrays) on each device's part, results as `out_specs` puts them together."""
        if self.explicit:
            arrays = [self._moved(array, spec) for array, spec in zip(arrays, in_specs, strict=True)]
        # Kernels tell JAX nothing of which values differ between devices, so it cannot check.
        each = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(in_specs),
            out_specs=out_specs,
            axis_names=set(self.free),
            check_vma=False,
        )
        return each(*arrays)

    def _moved(self, tree: Any, spec: P) -> Any:
        return jax.tree.map(lambda leaf: reshard(leaf, spec, self.mesh), tree)


def reshard(array: Array, spec: P, mesh: Mesh | None) -> Array:
    """The array laid out as `spec`, on a mesh with explicit axes."""
    return jax.sharding.reshard(array, spec if mesh is None else NamedSharding(mesh, spec))


def find(x: Array, w1: Array, hints: Hints, names: Names | None, *, packed: bool = False) -> Placement | None:
    """How x [*batch, D] and w1 [D, F] lie; None where they are one device's, or where nothing is known.

    Args:
      names: how w1 is cut in memory, as far as its module knows.
      packed: whether packed weights were given, which are taken whole.

    Raises:
      ValueError: hints that name axes which the mesh does not have, or cut what they do not divide.
    """
    mesh, ambient = _mesh(x, w1, hints.mesh)
    if mesh is None:
        return None
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = tuple(axis for axis, kind in types.items() if kind != AxisType.Manual)
    if not free:
        return None
    sizes = dict(mesh.shape)
    explicit = any(types[axis] == AxisType.Explicit for axis in free)
    if mesh.size == 1:  # nothing to cut, whatever the hints are for
        return Placement(None if ambient else mesh, sizes, free, (), (), explicit)
    tokens = _token_axes(x, hints.token_spec, sizes, free, explicit)
    known = () if packed else _weight_axes(w1, hints.weight_axes, names, explicit, sizes)
    # In tiles of the kernels where there are such. An axis that does not divide them repeats the weights.
    tiles = w1.shape[1] // (GRANULE if w1.shape[1] % GRANULE == 0 else 4)
    weights = _dividing([axis for axis in free if axis in known], sizes, tiles)
    return Placement(None if ambient else mesh, sizes, free, tokens, weights, explicit)


def is_checked(x: Array) -> bool:
    """Whether x lies inside a `jax.shard_map` that follows which values differ between devices (`check_vma=True`)."""
    return bool(varying_axes(x))


def varying_axes(x: Array) -> frozenset[str]:
    """The axes along which JAX knows x to differ between devices."""
    return frozenset(getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", ()))


def vary_alike(tree: Any, x: Array) -> Any:
    """The leaves as arrays that may differ where x does, so that their gradients are summed there."""
    axes = varying_axes(x)

    def leaf_like(leaf: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(leaf_like, tree)


def _mesh(x: Array, w1: Array, given: Mesh | None) -> tuple[Mesh | None, bool]:
    """The mesh, and whether it is the ambient one."""
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.axis_names:
        return ambient, True
    if given is not None:
        return given, False
    for array in (x, w1):
        mesh = getattr(jax.typeof(array).sharding, "mesh", None)
        if mesh is not None and mesh.axis_names:
            return mesh, False
    if jax.device_count() > 1 and not isinstance(x, jax.core.Tracer) and len(x.devices()) == 1:
        return jax.sharding.Mesh(np.array([*x.devices()]), ("one",), axis_types=(AxisType.Auto,)), False
    return None, False


def _token_axes(
    x: Array, spec: P | None, sizes: Mapping[str, int], free: Sequence[str], explicit: bool
) -> tuple[tuple[str, ...], ...]:
    """The axes of each leading dimension of x."""
    if x.ndim < 2:
        return ()
    given = spec
    if given is None and explicit:
        given = P(*jax.typeof(x).sharding.spec[:-1])
    cut = [tuple(axis for axis in axes if axis in free) for axes in _as_tuples(given, x.ndim - 1)]
    if spec is not None:
        unknown = [axis for axes in _as_tuples(spec, x.ndim - 1) for axis in axes if axis not in sizes]
        if unknown:
            raise ValueError(f"token_spec = {spec} names the axis {unknown[0]!r}; the mesh has {', '.join(sizes)}.")
        # A batch of another size, as an initialisation or an evaluation may have, is cut as far as it goes.
        return tuple(_dividing(axes, sizes, size) for axes, size in zip(cut, x.shape, strict=False))
    taken = {axis for axes in cut for axis in axes}
    cut[0] = _dividing([*cut[0], *(axis for axis in free if axis not in taken)], sizes, x.shape[0])
    return tuple(cut)


def _weight_axes(
    w1: Array, given: tuple[str, ...] | None, names: Names | None, explicit: bool, sizes: Mapping[str, int]
) -> set[str]:
    if given is not None:
        unknown = [axis for axis in given if axis not in sizes]
        if unknown:
            raise ValueError(f"weight_axes = {given} names the axis {unknown[0]!r}; the mesh has {', '.join(sizes)}.")
        return set(given)
    if explicit:
        names = jax.typeof(w1).sharding.spec
    elif names is None and not isinstance(w1, jax.core.Tracer):
        names = getattr(w1.sharding, "spec", None)
    return {axis for axes in _as_tuples(names, len(names or ())) for axis in axes}


def _as_tuples(names: Names | None, count: int) -> list[tuple[str, ...]]:
    """The axes of each of so many dimensions."""
    found = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in tuple(names or ())]
    return (found + [()] * count)[:count]


def _dividing(axes: Sequence[str], sizes: Mapping[str, int], size: int) -> tuple[str, ...]:
    """Of the axes, in their order, those whose devices together divide `size`."""
    kept: list[str] = []
    for axis in axes:
        if size % (sizes[axis] * math.prod(sizes[other] for other in kept)) == 0:
            kept.append(axis)
    return tuple(kept)
