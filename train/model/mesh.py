"""Where a run's arrays lie: on one device, or cut over a mesh of devices with the axes `data` and `fsdp`.

The batch is cut over both axes. A large parameter, its moments and its gradient are cut over `fsdp` and repeated along
`data`; norms' scales, counters and the method's state are on every device. Gradients are computed inside
`jax.shard_map`, each device on its own rows, with weights gathered layer by layer; the optimizer is left to XLA.

| parameter | cut along        | how a device uses it                                                                  |
|-----------|------------------|--------------------------------------------------------------------------------------|
| w1, up, w2 | neurons, or experts | `venom_jax.sharded_ffn`, `venom_jax.general_ffn`                                  |
| qkv, out  | their input side | gathered in the compute dtype for each of the two passes                              |
| head      | d_model          | gathered for the loss; its gradient is scattered                                      |
| embedding | d_model          | each device looks up its part of the rows of everybody's tokens; parts are exchanged  |
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from train.config.settings import RunConfig
from train.model.embedding import look_up
from venom_jax import LayerRecipes, Recipe, StackRecipe
from venom_jax.dispatch import Implementation
from venom_jax.fp8.sharded_linear import sharded_linear
from venom_jax.sharded_ffn import gather, in_order, local_recipe, scatter

DATA, FSDP = AXES = ("data", "fsdp")
ROWS = P(AXES)
"""Of a batch: its rows over all devices."""

# The dimension, counted from the end, along which a parameter of this name is cut.
CUT = {"w1": -1, "up": -1, "w2": -2, "qkv": -2, "out": -2, "head": -2, "embedding": -1}


@dataclass(frozen=True)
class Shards:
    """What a device does inside `jax.shard_map` to work with the others; `axis` is the mesh axis of the weights."""

    axis: str = FSDP
    by_layer: bool = False
    """Whether the gradients of a layer are summed over `data` in the backward, which goes on with the next layer."""

    def embed(
        self, part: Float[Array, "V Dn"], tokens: Int[Array, "B S"], dtype: Any, deterministic: bool = False
    ) -> Float[Array, "B S D"]:
        """This device's tokens looked up in the whole table: all look up their part of everybody's, sent in `dtype`."""
        if jax.lax.axis_size(self.axis) == 1:
            return look_up(part, tokens, dtype, deterministic)
        everybodys = look_up(part, gather(tokens, self.axis, 0), dtype, deterministic)
        rows = jax.lax.all_to_all(everybodys, self.axis, split_axis=0, concat_axis=2, tiled=True)
        # As the parts come, D would be the slowest axis, and XLA would leave the whole residual stream so.
        return in_order(rows)

    def whole(self, part: Array, name: str, dtype: Any) -> Array:
        """The parameter of that name in `dtype`, in which it travels; without a gradient."""
        return gather(jax.lax.stop_gradient(part).astype(dtype), self.axis, part.ndim + CUT[name])

    def times(self, x: Float[Array, "*B I"], part: Float[Array, "_ _"], name: str) -> Float[Array, "*B O"]:
        """x times the parameter of that name, which travels in x's dtype, for the gradient once more.

        The parameter's gradient is computed and summed in its own dtype.
        """
        return _times(self.axis, part.ndim + CUT[name], x, part)

    def times_in_fp8(
        self, x: Float[Array, "*B I"], part: Float[Array, "_ _"], implementation: Implementation | None
    ) -> Float[Array, "*B O"]:
        """The same in eight bits, of a parameter that is cut along I."""
        return sharded_linear(x, part, axis=self.axis, implementation=implementation)

    def own_key(self, key: Array) -> Array:
        """A key of each device's own: rows of the batch do not share their noise."""
        return jax.random.fold_in(key, jax.lax.axis_index(AXES))

    def of_layer(self, state: Any) -> Any:
        """A layer's nnx state as it reads it: gradients of what is cut are summed over `data` there, if `by_layer`."""
        if not self.by_layer or jax.lax.axis_size(DATA) == 1:
            return state
        return jax.tree_util.tree_map_with_path(  # the last key of a path is that of a variable's value
            lambda path, leaf: leaf if _spec(path[:-1], leaf) == P() else _summed_over_data(leaf), state
        )

    def total_gradients(self, grads: Any) -> Any:
        """Sums over the devices that hold the same part: scattering has summed what is cut over the others."""

        def total(path, gradient):
            if _spec(path, gradient) == P():
                return jax.lax.psum(gradient, AXES)
            done = self.by_layer and jax.tree_util.keystr(path[:1], simple=True) == "blocks"
            return gradient if done else jax.lax.psum(gradient, DATA)

        return jax.tree_util.tree_map_with_path(total, grads)

    def total(self, tree: Any) -> Any:
        """Sums over all devices."""
        return jax.lax.psum(tree, AXES)


@jax.custom_vjp
def _summed_over_data(part: Array) -> Array:
    return part


_summed_over_data.defvjp(lambda part: (part, None), lambda _, gradient: (jax.lax.psum(gradient, DATA),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _times(axis: str, dimension: int, x: Array, part: Array) -> Array:
    return x @ gather(part.astype(x.dtype), axis, dimension)


def _times_forward(axis, dimension, x, part):
    return _times(axis, dimension, x, part), (x, part)


def _times_backward(axis, dimension, residuals, dy):
    x, part = residuals
    dx = dy @ gather(part.astype(x.dtype), axis, dimension, after=x).T
    gradient = jnp.einsum("...i,...o->io", x, dy, preferred_element_type=part.dtype)
    return dx, scatter(gradient, axis, dimension)


_times.defvjp(_times_forward, _times_backward)


@dataclass(frozen=True)
class Layout:
    """A mesh, or None for the default device alone, where nothing of this module is in the way."""

    mesh: jax.sharding.Mesh | None = None

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def shards(self) -> Shards | None:
        return None if self.mesh is None else Shards()

    def shardings(self, tree: Any) -> Any:
        """Where each leaf of a tree shaped like parameters, or holding such trees, lies."""
        if self.mesh is None:
            alone = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda _: alone, tree)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs(tree))  # pyrefly: ignore

    @property
    def everywhere(self) -> jax.sharding.Sharding:
        """Of an array that every device holds."""
        return SingleDeviceSharding(jax.devices()[0]) if self.mesh is None else NamedSharding(self.mesh, P())

    def over_devices(self, stack: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Inside a jitted function, the stack with its first axis, a multiple of the devices, cut over all of them."""
        if self.mesh is None:
            return stack
        return jax.lax.with_sharding_constraint(stack, NamedSharding(self.mesh, ROWS))

    def place(self, tree: Any) -> Any:
        """The tree, committed to where it belongs."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self.shardings(tree))
        return jax.tree.map(_place_global, tree, self.shardings(tree))

    def abstract(self, tree: Any) -> Any:
        """Shapes, dtypes and places."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, self.shardings(tree)
        )

    def rows(self, mine: np.ndarray) -> jax.Array:
        """A batch of which this process holds its rows, as `train_iterator` of `train.data` gives them."""
        if self.mesh is None:
            return jax.device_put(mine)
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, ROWS), mine)

    def whole_rows(self, everybodys: np.ndarray) -> jax.Array | np.ndarray:
        """A batch that every process has read whole."""
        if self.mesh is None:
            return everybodys
        return _from_host(everybodys, NamedSharding(self.mesh, ROWS))

    def microbatch_rows(self, tokens: Int[Array, "B S"], count: int) -> Int[Array, "B S"]:
        """Rows in such an order that the i-th of `count` equal parts of each device make microbatch i of the batch."""
        if self.mesh is None or count == 1:
            return tokens
        moved = jnp.swapaxes(tokens.reshape(count, self.devices, -1, tokens.shape[-1]), 0, 1).reshape(tokens.shape)
        return jax.lax.with_sharding_constraint(moved, NamedSharding(self.mesh, ROWS))

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What XLA is told for a program of several GPUs: exchange weights while computing."""
        overlapping = self.devices > 1 and jax.default_backend() == "gpu"
        return {"xla_gpu_enable_latency_hiding_scheduler": True} if overlapping else {}

    def each(self, function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        """`function` on each device's part of the arguments; results as `out_specs` puts them together."""
        if self.mesh is None:
            return function
        # Values differ between devices or not as the specs say; kernels tell JAX nothing of it, so it cannot check.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def local_recipe(self, recipe: StackRecipe, microbatches: int = 1) -> StackRecipe:
        """The recipe for a device's rows of one of so many microbatches."""
        return _each_part(recipe, lambda part: local_recipe(part, self.devices * microbatches))

    def gathered_recipe(self, recipe: StackRecipe, microbatches: int) -> StackRecipe:
        """The recipe for a whole microbatch in one place: in the fours that form on the devices."""
        own = self.local_recipe(recipe, microbatches)
        return _each_part(own, lambda part: replace(part, token_blocks=part.token_blocks * self.devices))


ONE_DEVICE = Layout()


def specs(tree: Any) -> Any:
    """How each leaf is cut."""
    return jax.tree_util.tree_map_with_path(_spec, tree)


def _spec(path: tuple, leaf: Any) -> P:
    name = jax.tree_util.keystr(path[-1:], simple=True) if path else ""
    if name not in CUT or leaf.ndim < 2:
        return P()
    parts: list[str | None] = [None] * leaf.ndim
    parts[CUT[name]] = FSDP
    return P(*parts)


def layout_of(config: RunConfig) -> Layout:
    """The layout that a run asks for, on the devices that are there.

    Raises:
      ValueError: not enough devices, or sizes that do not divide among them; says what to change.
    """
    data, fsdp = mesh_shape(config, jax.device_count())
    size, processes = data * fsdp, jax.process_count()
    if size > jax.device_count():
        raise ValueError(
            f"Mesh.data={data} x Mesh.fsdp={fsdp} needs {size} devices, but there are {jax.device_count()}; bind "
            "smaller values, leave one of them None, or start more processes"
        )
    if processes > 1 and size < jax.device_count():
        raise ValueError(
            f"Mesh.data={data} x Mesh.fsdp={fsdp} uses {size} of the {jax.device_count()} devices of {processes} "
            "processes; with several processes use all of them, or start fewer"
        )
    check_divisible(config, data, fsdp)
    if jax.device_count() == 1:
        return ONE_DEVICE
    # By process: its rows of the batch lie on its own devices.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[:size]
    grid = np.array(devices).reshape(data, fsdp)
    return Layout(jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2))


def mesh_shape(config: RunConfig, devices: int) -> tuple[int, int]:
    """(data, fsdp), where None takes what the other one leaves of `devices`.

    Raises:
      ValueError: the one that is given does not divide `devices`.
    """
    data, fsdp = config.mesh.data, config.mesh.fsdp
    given = data if fsdp is None else fsdp
    if given is not None and None in (data, fsdp) and devices % given:
        name = "data" if fsdp is None else "fsdp"
        raise ValueError(f"Mesh.{name}={given} does not divide {devices} devices; bind both Mesh.data and Mesh.fsdp")
    if fsdp is None:
        fsdp = devices // (data or 1)
    return data or devices // fsdp, fsdp


def check_divisible(config: RunConfig, data: int, fsdp: int) -> None:
    """Raise ValueError, with what to change, unless batch and model divide among the devices."""
    train, shape, size = config.train, config.model, data * fsdp
    rows = train.accumulation * size
    if train.batch_size % rows:
        raise ValueError(
            f"Train.batch_size={train.batch_size} does not divide into Train.accumulation={train.accumulation} "
            f"microbatches over {size} devices (Mesh.data={data} x Mesh.fsdp={fsdp}); use a multiple of {rows}, or "
            "fewer devices"
        )
    for name in ("d_model", "d_expert" if shape.d_expert else "d_ffn"):
        if getattr(shape, name) % fsdp:
            raise ValueError(f"Model.{name}={getattr(shape, name)} does not divide over Mesh.fsdp={fsdp} devices")
    for recipe in config.schedule.recipes:
        _each_part(recipe, lambda part: local_recipe(part, rows))
        if not recipe.is_dense and not shape.experts and shape.d_ffn // fsdp % 4:
            raise ValueError(
                f"Model.d_ffn={shape.d_ffn} over Mesh.fsdp={fsdp} devices leaves {shape.d_ffn // fsdp} neurons each, "
                "no multiple of 4; bind a smaller Mesh.fsdp"
            )


def _each_part(recipe: StackRecipe, change: Callable[[Recipe], Recipe]) -> StackRecipe:
    if isinstance(recipe, LayerRecipes):
        return LayerRecipes(tuple((first, change(part)) for first, part in recipe.starts))
    return change(recipe)


def _from_host(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _place_global(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """With several processes: a leaf that each of them holds whole, or one that is cut over them already."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return _from_host(np.asarray(leaf), sharding)
