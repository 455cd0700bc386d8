"""One optimizer step, one evaluation, one diagnosis: pure functions of a state and tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.config.precision import uses_fp8
from train.config.settings import RunConfig
from train.model.cross_entropy import head_logits, sharded_cross_entropy, weighted_cross_entropy
from train.model.decoder import Decoder, assemble, auxiliary_loss, balance, join_layers, pack_ffns, take_layers
from train.model.mesh import AXES, ONE_DEVICE, ROWS, Layout, Shards, specs
from train.state.optimizer import for_run, updated_average
from train.state.state import TrainState, abstract_state
from train.step.guard import counts, keep_if
from venom_jax import FFNStats, PackedWeights, StackRecipe, calibrate
from venom_jax.stats import WeightMasks, diagnose

Metrics = dict[str, Array]


def hidden_states(
    model: Decoder,
    tokens: Int[Array, "B S+1"],
    *,
    recipe: StackRecipe,
    key: PRNGKeyArray | None,
    config: RunConfig,
    packed: PackedWeights | None = None,
    shards: Shards | None = None,
) -> tuple[Float[Array, "B S D"], FFNStats]:
    """The states that predict tokens[1:], as the run computes them, and the FFNs' statistics."""
    train = config.train
    hidden, stats, _ = model.hidden(
        tokens[:, :-1],
        recipe=recipe,
        dtype=jnp.dtype(train.dtype),
        key=key,
        packed=packed,
        implementation=train.implementation,
        remat=train.remat,
        unroll=train.unroll,
        shards=shards,
        deterministic=train.deterministic,
    )
    return hidden, stats


def token_losses(
    graphdef: nnx.GraphDef,
    params: dict,
    method: dict,
    tokens: Int[Array, "B S+1"],
    *,
    recipe: StackRecipe,
    key: PRNGKeyArray | None,
    config: RunConfig,
    shards: Shards | None = None,
) -> tuple[Float[Array, "B S"], FFNStats]:
    """-log p(tokens[s + 1] | tokens[: s + 1]) in nats, and the FFNs' statistics."""
    model = assemble(graphdef, params, method)
    hidden, stats = hidden_states(model, tokens, recipe=recipe, key=key, config=config, shards=shards)
    head = model.head_weight() if shards is None else shards.whole(model.head_weight(), "head", hidden.dtype)

    def losses(pair):
        return optax.softmax_cross_entropy_with_integer_labels(head_logits(pair[0], head), pair[1])

    labels, chunks = tokens[:, 1:], config.train.loss_chunks
    # The logits of one slice at a time: at a vocabulary of 128k they are the largest array of the step.
    sliced = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0), (hidden, labels)
    )
    return jnp.moveaxis(jax.lax.map(losses, sliced), 0, 1).reshape(labels.shape), stats


def make_gradients(graphdef: nnx.GraphDef, config: RunConfig, layout: Layout = ONE_DEVICE) -> Callable:
    """gradients(params, method, tokens, rng, *, recipe) -> (grads, loads, metrics), summed over microbatches.

    The mean loss over the batch, of all devices, and its gradient, cut over them as the parameters are; the batch comes
    in ``Train.accumulation`` microbatches, which share weights that are thresholded and packed once.
    """
    shards, devices = layout.shards, layout.devices
    if shards is not None:  # microbatches are added up first
        shards = replace(shards, by_layer=config.train.accumulation == 1)

    def microbatch(params, method, packed, tokens, key, *, recipe):
        def loss(params):
            model = assemble(graphdef, params, method)
            hidden, stats = hidden_states(
                model, tokens, recipe=recipe, key=key, config=config, packed=packed, shards=shards
            )
            labels = tokens[:, 1:]
            weights = jnp.full(labels.shape, 1 / (labels.size * devices), jnp.float32)
            operands, train = (hidden, model.head_weight(), labels, weights), config.train
            in_fp8 = train.fp8_head and uses_fp8(recipe)
            with jax.named_scope("head"):
                if shards is None:
                    value = weighted_cross_entropy(*operands, train.loss_chunks, train.z_loss, in_fp8)
                else:
                    options = (train.loss_chunks, train.z_loss, shards.axis, in_fp8)
                    value = sharded_cross_entropy(*operands, *options)
            return value + auxiliary_loss(config.model, stats) / devices, stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, value, stats.density.mean(), stats.load

    def gradients(params, method, tokens, key, *, recipe: StackRecipe):
        count = config.train.accumulation
        if shards is not None:
            key = shards.own_key(key)
        # In eight bits a single microbatch casts its own: stacked for all layers, casts would be copied once more.
        shared = count > 1 or not uses_fp8(recipe)
        packed = pack_ffns(params, method, recipe, jnp.dtype(config.train.dtype)) if shared else None
        own = layout.local_recipe(recipe, count)
        if count == 1:
            grads, loss, density, load = microbatch(params, method, packed, tokens, key, recipe=own)
        else:
            microbatches = tokens.reshape(count, -1, tokens.shape[-1])

            def accumulate(total, scanned):
                return jax.tree.map(jnp.add, total, microbatch(params, method, packed, *scanned, recipe=own)), None

            shapes = jax.eval_shape(partial(microbatch, recipe=own), params, method, packed, microbatches[0], key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(accumulate, zeros, (microbatches, jax.random.split(key, count)))
            grads, loss, density = jax.tree.map(lambda leaf: leaf / count, total[:3])
            load = total[3]
        if shards is not None:
            grads = shards.total_gradients(grads)
            loss, density, load = shards.total((loss, density / devices, load))
        count = tokens.shape[0] * (tokens.shape[1] - 1) * devices
        return (
            grads,
            load,
            {"loss": loss, "density": density} | _load_metrics(load, recipe, count, config.model.experts),
        )

    if shards is None:
        return gradients

    def on_each(params, method, tokens, key, *, recipe: StackRecipe):
        cut = specs(params)
        compute = layout.each(partial(gradients, recipe=recipe), (cut, P(), ROWS, P()), (cut, P(), P()))
        return compute(params, method, layout.microbatch_rows(tokens, config.train.accumulation), key)

    return on_each


def _load_metrics(load: Float[Array, "L E"], recipe: StackRecipe, tokens: int, experts: int = 0) -> Metrics:
    """Share of the tokens that each routed layer's experts got, but for the shared ones: largest, mean, smallest.

    Where layers differ in their number of experts, the largest and the smallest are relative to their layers' means.

    experts: those of a mixture, which has them whatever the recipe.
    """
    if experts:
        shares = load / tokens
        return {"load_max": shares.max(), "load_mean": shares.mean(), "load_min": shares.min()}
    shares = load / tokens
    parts = [p for p in recipe.parts(load.shape[0]) if p[2].routed or not recipe.routed]
    found = [shares[first:end, part.shared : part.experts] for first, end, part in parts]
    means = [share.mean() for share in found]
    mean = jnp.stack(means).mean()
    scales = [1.0 if len(means) == 1 or not recipe.routed else mean / own for own in means]
    return {
        "load_max": jnp.stack([share.max() * scale for share, scale in zip(found, scales, strict=True)]).max(),
        "load_mean": mean,
        "load_min": jnp.stack([share.min() * scale for share, scale in zip(found, scales, strict=True)]).min(),
    }


def take_branch(index: Int[Array, ""], branches: Sequence[Callable], *operands: Any) -> Any:
    """branches[index](*operands): a call where there is one, `cond` between two, `switch` among more."""
    if len(branches) == 1:
        return branches[0](*operands)
    if len(branches) == 2:
        return jax.lax.cond(index == 0, branches[0], branches[1], *operands)
    return jax.lax.switch(index, branches, *operands)


def make_train_step(
    graphdef: nnx.GraphDef, config: RunConfig, layout: Layout = ONE_DEVICE
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step: gradients by the phase's recipe, clipped AdamW, the router's bias.

    One program holds every recipe.  The branch goes around the whole step: inside the layers it would keep the
    residuals of all branches, around the gradients alone they would be written once more and read once more.  The state
    is donated.

    limit, number: from ``guard.Watch``.  A step that does not count by ``guard.counts``, or whose number is not the
    state's (None: any), leaves the state as ``guard.keep_if`` says.
    """
    optimizer, schedule = for_run(config, layout)
    gradients = make_gradients(graphdef, config, layout)

    def step_with(recipe: StackRecipe, state: TrainState, tokens, limit, number) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grads, load, metrics = gradients(state.params, state.method, tokens, key, recipe=recipe)
        # Stacked first: fused into the stacking, AdamW would be three kernels that each read what they need.
        grads = grads | {"blocks": jax.lax.optimization_barrier(grads["blocks"])}
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)  # pyrefly: ignore[bad-argument-type]
            grad_norm = optax.tree.norm(grads)
        new_state = TrainState(
            params=params,
            method=balance(config.model, state.method, load, recipe),
            opt_state=opt_state,
            step=state.step + 1,
            phase=state.phase,
            rng=state.rng,
            ema=updated_average(state.ema, params, state.step, config.optimizer.ema),
        )
        good = counts(metrics["loss"], grad_norm, limit)
        if number is not None:
            good &= state.step == number
        with jax.named_scope("optimizer"):
            new_state = keep_if(good, new_state, state, skip=config.guard.action == "skip")
        return new_state, metrics | {"grad_norm": grad_norm, "lr": schedule(state.step)}

    recipes = config.schedule.recipes
    places: dict[str, Any] = {"compiler_options": layout.compiler_options}
    if layout.mesh is not None:
        # The new state lies where the old one did, or its step would be compiled again.
        places["out_shardings"] = (layout.shardings(abstract_state(config)), layout.everywhere)

    @partial(jax.jit, donate_argnums=0, **places)
    def train_step(
        state: TrainState, tokens: Int[Array, "B S+1"], limit: Any = np.inf, number: Any = None
    ) -> tuple[TrainState, Metrics]:
        branch = jnp.asarray(config.schedule.branches, jnp.int32)[state.phase]
        branches = [partial(step_with, recipe) for recipe in recipes]
        return take_branch(branch, branches, state, tokens, limit, number)

    return train_step


def make_eval_step(graphdef: nnx.GraphDef, config: RunConfig, layout: Layout = ONE_DEVICE) -> Callable:
    """eval_step(params, method, tokens, weight, recipe=...) -> (summed loss in nats, number of tokens), jitted."""
    shards = layout.shards

    def sums(params, method, tokens: Int[Array, "B S+1"], weight: Float[Array, " B"], *, recipe: StackRecipe):
        # A fixed key: evaluating must not depend on when it happens, also with the random router.
        losses, _ = token_losses(
            graphdef, params, method, tokens, recipe=recipe, key=jax.random.key(0), config=config, shards=shards
        )
        found = (losses * weight[:, None]).sum(), weight.sum() * losses.shape[1]
        return found if shards is None else shards.total(found)

    @partial(jax.jit, static_argnames="recipe")
    def eval_step(params, method, tokens, weight, *, recipe: StackRecipe):
        own = partial(sums, recipe=recipe.forward)
        return layout.each(own, (specs(params), P(), ROWS, ROWS), P())(params, method, tokens, weight)

    return eval_step


def make_ffn_inputs(graphdef: nnx.GraphDef, config: RunConfig, layout: Layout = ONE_DEVICE) -> Callable:
    """ffn_inputs(params, method, tokens, recipe=...) -> what every FFN reads [L, T, D], of few tokens, jitted."""
    places = {} if layout.mesh is None else {"out_shardings": layout.everywhere}

    @partial(jax.jit, static_argnames="recipe", **places)
    def ffn_inputs(params, method, tokens: Int[Array, "B S+1"], *, recipe: StackRecipe) -> Float[Array, "L T D"]:
        inputs = _all_ffn_inputs(graphdef, params, method, tokens, recipe, config, layout)
        inputs = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        return inputs[:, :: -(-inputs.shape[1] // calibrate.MAX_TOKENS)]

    return ffn_inputs


def _all_ffn_inputs(
    graphdef: nnx.GraphDef,
    params: dict,
    method: dict,
    tokens: Int[Array, "B S+1"],
    recipe: StackRecipe,
    config: RunConfig,
    layout: Layout,
) -> Float[Array, "L B S D"]:
    def inputs(params, method, tokens):
        return assemble(graphdef, params, method).hidden(
            tokens[:, :-1],
            recipe=recipe.forward,
            dtype=jnp.dtype(config.train.dtype),
            key=jax.random.key(0),
            implementation=config.train.implementation,
            keep_ffn_inputs=True,
            shards=layout.shards,
        )[2]

    return layout.each(inputs, (specs(params), P(), ROWS), P(None, AXES))(params, method, tokens)


def make_diagnosis(graphdef: nnx.GraphDef, config: RunConfig, layout: Layout = ONE_DEVICE) -> Callable:
    """diagnosis(params, method, tokens, masks, recipe=...) -> ({name: [L]}, masks), jitted.

    ``venom_jax.stats.diagnose`` on the input of every FFN, for the tokens of a microbatch, in the fours in which a step
    prunes them.  ``masks`` is what the last call returned, or None.
    """

    places = {} if layout.mesh is None else {"out_shardings": layout.everywhere}

    @partial(jax.jit, static_argnames="recipe", **places)
    def diagnosis(params, method, tokens: Int[Array, "B S+1"], masks: WeightMasks | None, *, recipe: StackRecipe):
        ffn_inputs = _all_ffn_inputs(graphdef, params, method, tokens, recipe, config, layout)
        ffn, state = params["blocks"]["ffn"], method["blocks"]["ffn"]

        def layer(recipe, scanned):
            x, w1, w2, beta, bias, learned, previous = scanned
            return diagnose(x.reshape(-1, x.shape[-1]), w1, w2, beta, bias, recipe, previous, learned=learned)

        stacked = (ffn_inputs, ffn["w1"], ffn["w2"], state["beta"], state["bias"], state.get("router"), masks)
        parts = layout.gathered_recipe(recipe, config.train.accumulation).parts(config.model.layers)
        return join_layers([jax.lax.map(partial(layer, part), take_layers(stacked, a, b)) for a, b, part in parts])

    return diagnosis
