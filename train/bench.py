"""Times whole training steps of several recipes against dense, in one process, on real text.

    python -m train.bench --gin_file=configs/size/1b.gin --gin_bindings="Data.folder='DATA'" \\
        --recipes=dense,act24,all24,venom:4:1 --json=steps.json

A step is what a run executes: gradients, clipping, AdamW, the router's bias.  The recipes take turns on one state,
which each step donates to the next, so that a card which warms up treats them alike; the weights are the first ones,
neither clustered nor scaled.  ``venom:E:k`` names a routed recipe.  A row is printed as soon as its recipe has run.

``part_ms`` times parts by themselves, forward and backward, times the number of layers: the FFN of a recipe with its
packing, attention with its rotation, the four projections, the head with its loss, clipping with AdamW.  With several
devices a part is one device's share, and ``communication`` is what they exchange with nothing computed meanwhile,
though in a step most of it is hidden.  ``other`` is what is left of the step: norms, embedding, recomputation, sums of
gradients; XLA's fusion across parts, and what is hidden, can make it negative.  ``switch``: the same step in one
program with the last recipe, behind `lax.cond`.
"""

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from train import model
from train.command import print_error, program
from train.communication import exchange
from train.config import Phases, RunConfig, load_config, named_recipe
from train.cross_entropy import weighted_cross_entropy
from train.data import train_iterator
from train.mesh import Layout, layout_of
from train.metrics import peak_flops
from train.optimizer import for_run
from train.schedule import label
from train.sources import open_split
from train.state import TrainState, initial_state
from train.step import make_train_step
from venom_jax import Recipe, router, sparse_ffn
from venom_jax.dispatch import choose_kernels

STEPS_A_TURN = 2


def parse_recipe(text: str) -> tuple[str, Recipe]:
    """'act24' or 'venom:4:1' -> (label, recipe).

    Raises:
      ValueError: an unknown name, or another form.
    """
    name, *numbers = text.split(":")
    if not numbers:
        recipe = named_recipe(name)
    elif name == "venom" and len(numbers) == 2 and all(number.isdecimal() for number in numbers):
        recipe = Recipe.venom(*map(int, numbers))
    else:
        raise ValueError(f"--recipes has {text!r}; give dense, act24, all24, venom or venom:EXPERTS:TOP_K")
    return label(name, recipe), recipe


def with_phases(config: RunConfig, recipes: list[Recipe]) -> RunConfig:
    """The run that has each recipe for a step, so that its program holds them all."""
    return replace(config, phases=Phases(tuple(enumerate(recipes))))


def compiled_step(
    config: RunConfig, experts: int, layout: Layout, state: TrainState, tokens: jax.Array
) -> tuple[Any, float]:
    """The compiled step and the seconds it took to compile."""
    start = time.perf_counter()
    step: Any = make_train_step(model.structure(config.model, experts), config, layout)
    return step.lower(state, tokens).compile(), time.perf_counter() - start


def peak_gib(step: Any) -> float | None:
    """What XLA allots to the program on a device: arguments, results that share no argument's memory, temporaries."""
    memory = step.memory_analysis()
    if memory is None:
        return None
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (size + memory.temp_size_in_bytes) / 2**30


def race(steps: dict[str, Any], state: TrainState, batches: list[jax.Array], rounds: int) -> tuple[dict, TrainState]:
    """Median milliseconds of a step of each program, taking turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            jax.block_until_ready(state)
            start = time.perf_counter()
            for turn in range(STEPS_A_TURN):
                state, _ = step(state, batches[(number * STEPS_A_TURN + turn) % len(batches)])
            jax.block_until_ready(state)
            if number:
                times[name].append(1e3 * (time.perf_counter() - start) / STEPS_A_TURN)
    return {name: median(taken) for name, taken in times.items()}, state


def time_of(function: Callable, *arguments: Any, rounds: int = 5) -> float:
    """Median milliseconds of a jitted call."""
    compiled = jax.jit(function).lower(*arguments).compile()
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken[1:])


def through(function: Callable) -> Callable:
    """Forward and backward: (cotangent, *arguments) -> gradients."""
    return lambda cotangent, *arguments: jax.vjp(function, *arguments)[1](cotangent)


def common_parts(config: RunConfig, devices: int) -> dict[str, Callable[[], float]]:
    """Parts that are the same for every recipe, in ms a step; each makes its operands when called."""
    shape, train = config.model, config.train
    batch, dtype, layers = train.batch_size // (train.accumulation * devices), jnp.dtype(train.dtype), shape.layers
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, train.seq_len, shape.d_model)).astype(dtype)
    width = (shape.heads + 2 * shape.key_value_heads) * shape.head_dim

    def attention():
        def mix(qkv):
            parts = jnp.split(qkv, (shape.heads, shape.heads + shape.key_value_heads), axis=2)
            query, key = (model.rotary(part, shape.rope_base) for part in parts[:2])
            implementation = model.attention_implementation(dtype)
            mixed = jax.nn.dot_product_attention(query, key, parts[2], is_causal=True, implementation=implementation)
            return mixed.reshape(x.shape)

        heads = width // shape.head_dim
        qkv = jax.random.normal(keys[1], (batch, train.seq_len, heads, shape.head_dim)).astype(dtype)
        return layers * train.accumulation * time_of(through(mix), x, qkv)

    def projections():
        weights = [jax.random.normal(keys[2], (shape.d_model, n)) for n in (width, shape.d_model)]
        wide = jnp.ones((batch, train.seq_len, width), dtype)

        def project(x, first, second):
            return x @ first.astype(dtype), x @ second.astype(dtype)

        return layers * train.accumulation * time_of(through(project), (wide, x), x, *weights)

    def head():
        weight = jax.random.normal(keys[3], (shape.d_model, shape.vocab_size)) * 0.02
        labels = jnp.zeros(x.shape[:2], jnp.int32)
        shares = jnp.full(labels.shape, 1 / labels.size, jnp.float32)
        loss = jax.grad(lambda x, w: weighted_cross_entropy(x, w, labels, shares, train.loss_chunks), (0, 1))
        return train.accumulation * time_of(loss, x, weight)

    return {"attention": attention, "projections": projections, "head": head}


def ffn_part(config: RunConfig, recipe: Recipe, devices: int) -> float:
    """All FFNs of a step: router, packing and six products."""
    shape, train = config.model, config.train
    keys = jax.random.split(jax.random.key(1), 3)
    tokens = train.batch_size // (train.accumulation * devices) * train.seq_len
    x = jax.random.normal(keys[0], (tokens, shape.d_model)).astype(train.dtype)
    w1 = jax.random.normal(keys[1], (shape.d_model, shape.d_ffn)) * shape.ffn_init_std
    w2 = jax.random.normal(keys[2], (shape.d_ffn, shape.d_model)) * shape.init_std

    # By itself it has one device, however many there are.
    kernels = choose_kernels(train.implementation, recipe, shape.d_model, shape.d_ffn, train.dtype, local=True)
    implementation = train.implementation if kernels is None else kernels

    def ffn(x, w1, w2):
        route = router.route(x, w1, recipe) if recipe.routed else None
        return sparse_ffn(x, w1, w2, route, recipe=recipe, implementation=implementation)

    return shape.layers * train.accumulation * time_of(through(ffn), x, x, w1, w2)


def optimizer_part(config: RunConfig, state: TrainState) -> tuple[float, TrainState]:
    """Clipping and AdamW on the whole state, which is donated; the parameters stand for their gradients."""
    optimizer, _ = for_run(config)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state):
        # Not the parameters themselves, or one read would serve both.
        grads = jax.tree.map(lambda p: jax.lax.optimization_barrier(p * 1e-3), params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state, taken = state.params, state.opt_state, []
    for _ in range(4):
        jax.block_until_ready(params)
        start = time.perf_counter()
        params, opt_state = update(params, opt_state)
        jax.block_until_ready(params)
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken[1:]), replace(state, params=params, opt_state=opt_state)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def measure(config: RunConfig, names: list[str], case: str, rounds: int, parts: bool, switch: bool) -> list[dict]:
    """A row for each recipe, printed as it comes; a recipe that does not run is a row with its failure."""
    recipes = dict(parse_recipe(name) for name in ["dense", *names])
    experts = max(recipe.experts for recipe in recipes.values())
    train, layout = config.train, layout_of(config)
    devices = layout.devices
    state = initial_state(with_phases(config, list(recipes.values())), layout)
    dataset = open_split(config, "train")
    iterator = train_iterator(dataset, batch_size=train.batch_size, seq_len=train.seq_len, seed=train.seed)
    batches = [layout.rows(np.asarray(next(iterator)["tokens"])) for _ in range(4)]

    steps, compile_s, rows = {}, {}, []
    programs = {name: [recipe] for name, recipe in recipes.items()}
    if switch and len(recipes) > 1:
        programs["dense, switch"] = [recipes["dense"], list(recipes.values())[-1]]
    dense_ms = 0.0
    for name, held in programs.items():
        try:
            step, compile_s[name] = compiled_step(with_phases(config, held), experts, layout, state, batches[0])
            # At once and beside dense alone, so that a cut-off job has this row; the turns of all come at the end.
            pair = {"dense": steps["dense"], name: step} if steps else {name: step}
            times, state = race(pair, state, batches, 2)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            print(json.dumps({"case": f"{case} {name}", "failure": first_line(error)}), flush=True)
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                raise  # it failed while running, and the state went with it
            continue
        steps[name], dense_ms = step, times["dense"]
        print(f"{name}: {times[name]:.1f} ms (dense {dense_ms:.1f}), compiled in {compile_s[name]:.1f} s", flush=True)
    times, state = race(steps, state, batches, rounds)

    part_ms: dict[str, float] = {}
    if parts:
        part_ms = {name: part() for name, part in common_parts(config, devices).items()}
        part_ms["optimizer"], state = optimizer_part(config, state)
    tokens = train.batch_size * train.seq_len
    flops_dense = tokens * model.flops_per_token(config.model, train.seq_len, Recipe.dense())
    peak = peak_flops(devices)
    for name, step in steps.items():
        recipe, ms = programs[name][0], times[name]
        executed = tokens * model.flops_per_token(config.model, train.seq_len, recipe)
        row: dict[str, Any] = {
            "bench": "train_step",
            "case": f"{case} {name}",
            "ms": round(ms, 3),
            "rival": "dense",
            "rival_ms": round(times["dense"], 3),
            "speedup": round(times["dense"] / ms, 4),
            "tokens_per_second": round(tokens / ms * 1e3),
            "mfu_dense": None if peak is None else round(flops_dense / ms * 1e3 / peak, 4),
            "mfu_executed": None if peak is None else round(executed / ms * 1e3 / peak, 4),
            "memory_gib": None if (gib := peak_gib(step)) is None else round(gib, 2),
            "compile_s": round(compile_s[name], 1),
            "device": jax.devices()[0].device_kind,
            "devices": devices,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        if parts and name in recipes:
            own = part_ms | {"ffn": ffn_part(config, recipe, devices)}
            if devices > 1:
                own["communication"] = time_of(exchange(config, recipe, layout), state)
            row["part_ms"] = {
                part: round(value, 2) for part, value in (own | {"other": ms - sum(own.values())}).items()
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def work(values: flags.FlagValues) -> int:
    """Measures and writes the file; 1 where a recipe did not run."""
    config = load_config(values.gin_file, values.gin_bindings)
    names = [name for name in values.recipes.split(",") if name != "dense"]
    size = Path(values.gin_file[0]).stem if values.gin_file else "model"
    rows = measure(config, names, size, values.rounds, values.parts, values.switch)
    Path(values.json).write_text(json.dumps(rows, indent=1) + "\n")
    missing = 1 + len(set(names)) - sum(not row["case"].endswith(", switch") for row in rows)
    if missing:
        print_error(f"{missing} of the recipes did not run; the lines above say why")
    return 1 if missing else 0


if __name__ == "__main__":
    flags.DEFINE_multi_string("gin_file", [], "configuration file; later ones override earlier ones")
    flags.DEFINE_multi_string("gin_bindings", [], "single bindings, applied after the files")
    flags.DEFINE_string("recipes", "dense,act24,all24,venom", "recipes, separated by commas")
    flags.DEFINE_string("json", None, "file for the rows", required=True)
    flags.DEFINE_integer("rounds", 5, "turns of every recipe", lower_bound=1)
    flags.DEFINE_boolean("parts", True, "time parts of the step by themselves")
    flags.DEFINE_boolean("switch", True, "also time dense behind the phases' switch")
    app.run(program(work))
