"""Which tensor went bad first: a step computed again, tensor by tensor, in the order of its computation.

Slow, and compiled only when a step went wrong: parameters, then the forward pass layer by layer, then the backward
pass from the last layer to the first.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from train.config.precision import COMPUTE, in_precision, uses_fp8
from train.config.settings import Model, RunConfig
from train.model.cross_entropy import weighted_cross_entropy
from train.model.decoder import assemble, find_documents, pack_ffns, rms_norm
from train.model.embedding import look_up
from train.model.mesh import layout_of
from train.state.state import TrainState
from venom_jax import Recipe, StackRecipe

_GRADIENT = "the gradient of "
# Of one layer's parameters, the order in which the backward pass makes their gradients.
_BACKWARD = ("ffn.w2", "ffn.w1", "ffn_scale", "attention.out", "attention", "attention_scale")


def first_bad(
    graphdef: nnx.GraphDef, config: RunConfig, state: TrainState, tokens: Int[Array, "B S+1"], number: int
) -> str:
    """Says what of step ``number`` (from 0) is not finite first, or which gradient is largest if all is finite.

    ``state`` is the one before the step; with a later one the answer is what the step would do now.
    """
    recipe = config.schedule.phases[int(state.phase)].recipe
    found, largest = _look(_tensors(graphdef, config, recipe, state, tokens, number))
    if found is None:
        return f"all is finite when it is computed again; {largest}"
    if uses_fp8(recipe):
        plain = in_precision(recipe, COMPUTE)
        again, _ = _look(_tensors(graphdef, config, plain, state, tokens, number))
        if again is None:
            return (
                f"not finite is {found} in eight bits; in {config.train.dtype} all is: try Train.precision={COMPUTE!r}"
            )
    return f"not finite is {found}"


def _look(tensors: Iterator[tuple[str, Array]]) -> tuple[str | None, str]:
    """The first tensor that is not finite, and if all are the largest gradient."""
    norms = {}
    for name, array in tensors:
        values = jnp.asarray(array, jnp.float32)
        nan, inf = int(jnp.isnan(values).sum()), int(jnp.isinf(values).sum())
        if nan or inf:
            return f"{name} ({nan} NaN and {inf} inf of {values.size} values)", ""
        if name.startswith(_GRADIENT):
            norms[name] = float(np.linalg.norm(np.asarray(values, np.float64)))
    largest = max(norms, key=norms.__getitem__)
    return None, f"{largest} is the largest, of norm {norms[largest]:.3g}"


def _tensors(
    graphdef: nnx.GraphDef, config: RunConfig, recipe: StackRecipe, state: TrainState, tokens: Array, number: int
) -> Iterator[tuple[str, Array]]:
    """Names and tensors of a step, in the order of their computation."""
    train = config.train
    dtype, layers = jnp.dtype(train.dtype), config.model.layers
    yield from _named(state.params, layers, "the parameter ")
    packed = pack_ffns(state.params, state.method, recipe, dtype)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), number)
    keys = [key] if train.accumulation == 1 else jax.random.split(key, train.accumulation)
    decoder = assemble(graphdef, state.params, state.method)
    block, trained, fixed = nnx.split(decoder.blocks, nnx.Param, ...)
    # XLA, which splits this over the devices of a run, cannot split a kernel.
    implementation = train.implementation if jax.device_count() == 1 else "reference"
    part_recipe = layout_of(config).gathered_recipe(recipe, train.accumulation)
    recipes = [own for first, end, own in part_recipe.parts(layers) for _ in range(first, end)]
    static: dict[str, Any] = {"block": block, "implementation": implementation}
    parts = tokens.reshape(train.accumulation, -1, tokens.shape[-1])
    for i, (part, part_key) in enumerate(zip(parts, keys, strict=True)):
        where = f" in microbatch {i}" if train.accumulation > 1 else ""
        layer_keys = jax.random.split(part_key, layers)
        inputs = [
            (*jax.tree.map(lambda leaf, layer=layer: leaf[layer], (trained, fixed, packed)), layer_keys[layer])
            for layer in range(layers)
        ]
        start = config.model.document_start
        documents = None if start is None else find_documents(part[:, :-1], start)
        x = look_up(state.params["embedding"], part[:, :-1], dtype)
        yield f"the embedded tokens{where}", x
        entered = []
        for layer, given in enumerate(inputs):
            entered.append(x)
            x, ffn_input = _block(given[0], x, *given[1:], documents, recipe=recipes[layer], **static)
            yield f"the FFN's input in layer {layer} (behind attention){where}", ffn_input
            yield f"the output of layer {layer} (behind the FFN){where}", x
        top = {name: leaf for name, leaf in state.params.items() if name != "blocks"}
        options = {"slices": train.loss_chunks, "z_loss": train.z_loss, "in_fp8": train.fp8_head and uses_fp8(recipe)}
        loss, (d_top, dx) = _top(top, x, part[:, 1:], model=config.model, **options)
        yield f"the loss{where}", loss
        yield from _named(d_top, layers, _GRADIENT, where)
        yield f"the derivative by the output of layer {layers - 1}{where}", dx
        for layer in reversed(range(layers)):
            given = inputs[layer]
            d_params, dx = _block_gradient(
                dx, given[0], entered[layer], *given[1:], documents, recipe=recipes[layer], **static
            )
            gradients = dict(_paths(nnx.to_pure_dict(d_params)))
            for name in sorted(gradients, key=_place):
                yield f"{_GRADIENT}{name} in layer {layer}{where}", gradients[name]
            yield f"the derivative by the input of layer {layer}{where}", dx


@partial(jax.jit, static_argnames=("block", "recipe", "implementation"))
def _block(trained, x, fixed, packed, key, documents, *, block, recipe: Recipe, implementation):
    x, (_, ffn_input) = nnx.merge(block, trained, fixed)(x, recipe, key, packed, implementation, documents)
    return x, ffn_input


@partial(jax.jit, static_argnames=("block", "recipe", "implementation"))
def _block_gradient(dy, trained, x, *rest, **static):
    _, pull = jax.vjp(lambda trained, x: _block(trained, x, *rest, **static)[0], trained, x)
    return pull(dy)


@partial(jax.jit, static_argnames=("model", "slices", "z_loss", "in_fp8"))
def _top(top: dict, x, labels, *, model: Model, slices: int, z_loss: float, in_fp8: bool):
    """The loss, and its gradients by what lies above the layers and by their output."""

    def loss(top, x):
        hidden = rms_norm(x, top["final_scale"], model.norm_epsilon)
        head = top["embedding"].T if model.tied_head else top["head"]
        weights = jnp.full(labels.shape, 1 / labels.size, jnp.float32)
        return weighted_cross_entropy(hidden, head, labels, weights, slices, z_loss, in_fp8)

    return jax.value_and_grad(loss, (0, 1))(top, x)


def _place(name: str) -> int:
    """Where a layer's parameter stands in `_BACKWARD`."""
    return _BACKWARD.index(name if name in _BACKWARD else name.split(".")[0])


def _paths(tree: Any) -> Iterator[tuple[str, Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _named(params: dict, layers: int, prefix: str, where: str = "") -> Iterator[tuple[str, Array]]:
    """Every parameter, those of the layers one layer after another."""
    for name, leaf in _paths({name: leaf for name, leaf in params.items() if name != "blocks"}):
        yield f"{prefix}{name}{where}", leaf
    for layer in range(layers):
        for name, leaf in _paths(params.get("blocks", {})):
            yield f"{prefix}{name} in layer {layer}{where}", leaf[layer]
