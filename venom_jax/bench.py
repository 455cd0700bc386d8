"""Time the whole FFN, forward and backward, against XLA's dense one: python -m venom_jax.bench --json FILE

Everything that a training step pays is inside: thresholding and packing both weights, router, grouping, gathers,
packing the activations both ways, six products. Each recipe is timed only after its outputs and gradients agree with
the masked reference in the same run (on fewer tokens). Operands are random, buffers rotate, recipes take turns with
dense.
With --fp8 all of one size are compiled at once and race together; one size takes about a minute (--d_model, --masters).
`stage_ms` times the parts of a step one by one; their sum is more than the step, in which XLA fuses across them.
"""

import argparse
import datetime
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.array_types import Array
from pallas_kernels.measure import timing
from venom_jax import rivals, router
from venom_jax.ffn import pack_weights, sparse_ffn
from venom_jax.packed_ffn import TokenRows
from venom_jax.pattern import Recipe
from venom_jax.permutation import group_tokens

SIZES = ((2048, 8192), (4096, 16384))
"""(D, F) of the 1B and the 7B model of arXiv 2602.06183."""
RECIPES = {
    "act24": Recipe.act24(),
    "all24": Recipe.all24(),
    "act24 E=4 k=2": Recipe.act24(experts=4, top_k=2),
    "venom E=2 k=1": Recipe.venom(2, 1),
    "venom E=4 k=2": Recipe.venom(4, 2),
    "venom E=4 k=1": Recipe.venom(4, 1),
    "venom E=16 k=4": Recipe.venom(16, 4),
    "venom E=16 k=1": Recipe.venom(16, 1),
    "dense fp8": Recipe.dense(precision="fp8"),
    "act24 fp8": Recipe.act24(precision="fp8"),
    "all24 fp8": Recipe.all24(precision="fp8"),
    "act24 E=4 k=2 fp8": Recipe.act24(experts=4, top_k=2, precision="fp8"),
    "venom E=4 k=2 fp8": Recipe.venom(4, 2, precision="fp8"),
    "venom E=4 k=1 fp8": Recipe.venom(4, 1, precision="fp8"),
}
MAX_ERROR = 1e-2
"""Norm-wise relative error in bf16: roundings of y1, y2 and dy1, and the patterns that change where values tie.
The same in eight bits, where a last bit of y1 or dy2 may move a cast."""
CHECK_TOKENS = 2048
BETA = jnp.full(4, 1.5, jnp.float32)


def operands(tokens: int, d_model: int, d_ffn: int, seed: int, masters: Any) -> tuple[Array, ...]:
    """x, w1, w2 and the cotangent of y."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x, dy = (jax.random.normal(key, (tokens, d_model), jnp.float32).astype(jnp.bfloat16) for key in keys[:2])
    w1 = (jax.random.normal(keys[2], (d_model, d_ffn)) / d_model**0.5).astype(masters)
    w2 = (jax.random.normal(keys[3], (d_ffn, d_model)) / d_ffn**0.5).astype(masters)
    return x, w1, w2, dy


def step(recipe: Recipe, implementation: Any) -> Callable[..., Any]:
    """(x, w1, w2, dy) -> y, dx, dW1, dW2, with the router and the packing of the weights inside."""

    def run(x, w1, w2, dy):
        route = router.route(x, w1, recipe) if recipe.routed else None
        forward = functools.partial(sparse_ffn, recipe=recipe, implementation=implementation)
        y, vjp = jax.vjp(lambda x, w1, w2: forward(x, w1, w2, route, BETA), x, w1, w2)
        return y, *vjp(dy)

    return run


def stages(recipe: Recipe, x, w1, w2, dy) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """The parts of a step as functions of concrete arrays."""
    tokens = x.shape[0]
    weights = jax.jit(lambda w1, w2: pack_weights(w1, w2, BETA, dtype=x.dtype))(w1, w2) if recipe.weights else None
    found: dict[str, tuple[Callable[..., Any], tuple]] = {}
    grouping = None
    if weights is not None:
        found["pack weights"] = (lambda w1, w2: pack_weights(w1, w2, BETA, dtype=x.dtype), (w1, w2))
    if recipe.routed:
        group = functools.partial(
            group_tokens, experts=recipe.experts, align=recipe.group_rows, implementation="hopper"
        )
        found["route and group"] = (lambda x, w1: group(router.route(x, w1, recipe)), (x, w1))
        grouping = jax.jit(found["route and group"][0])(x, w1)
    order = TokenRows(recipe, grouping, tokens, "hopper")
    rows = jax.jit(order.enter)(x)
    sparse = (None, None) if weights is None else (weights.w1, weights.w2)
    along = {"features": recipe.activations, "tokens": recipe.wgrad == "24"}
    pack = functools.partial(order.pack_hidden, by_neuron=False, **along)
    packed = jax.jit(pack)(rows, sparse[0], w1)
    features, along_tokens = packed.features, packed.tokens
    y3 = jax.jit(lambda p, w: order.back(p, None, w, k_major=False))(features, w2)
    return found | {
        "gather rows": (order.enter, (x,)),
        "y1 and pack": (pack, (rows, sparse[0], w1)),
        "y3": (lambda p, w: order.back(p, None, w, k_major=False), (features, w2)),
        "sum copies": (lambda r: order.leave(r, jnp.bfloat16), (y3,)),
        "dy2 and take": (order.take_hidden, (rows, sparse[1], w2, features, along_tokens)),
        "dx": (lambda p, w: order.back(p, None, w, k_major=True), (features, w1)),
        "dW2": (lambda p, r: order.over_tokens(p, None, r, w2.dtype, transpose=False), (along_tokens, rows)),
        "dW1": (lambda p, r: order.over_tokens(p, None, r, w1.dtype, transpose=True), (along_tokens, rows)),
    }


def largest_error(recipe: Recipe, d_model: int, d_ffn: int) -> float:
    """The largest norm-wise relative error of y, dx, dW1 and dW2 against the masked reference."""
    arrays = operands(CHECK_TOKENS, d_model, d_ffn, 99, jnp.bfloat16)
    outputs, expected = (jax.jit(step(recipe, name))(*arrays) for name in ("hopper", "reference"))

    @jax.jit
    def error(out, ref):
        out, ref = out.astype(jnp.float32), ref.astype(jnp.float32)
        return jnp.linalg.norm(out - ref) / jnp.linalg.norm(ref)

    return max(float(error(out, ref)) for out, ref in zip(outputs, expected, strict=True))


def gpu_name() -> str:
    gpu = device.current()
    return "cpu" if gpu is None else gpu.name


def measure(
    tokens: int, d_model: int, d_ffn: int, names: list[str], masters: Any, with_stages: bool
) -> Iterator[dict[str, Any]]:
    """A row for each recipe at one size, as it comes; a recipe takes turns with dense."""
    sets = [operands(tokens, d_model, d_ffn, seed, masters) for seed in range(2)]
    dense = timing.repeated(step(Recipe.dense(), None), sets)
    for name in names:
        row = _row(name, tokens, d_model, d_ffn, masters)
        try:
            error = checked_error(RECIPES[name], d_model, d_ffn)
            runs = {"ours": timing.repeated(step(RECIPES[name], "hopper"), sets), "dense": dense}
            times = timing.race(runs, dict.fromkeys(runs, len(sets)))
        except (RuntimeError, NotImplementedError) as failure:
            yield row | {"failure": str(failure)[:300]}
            continue
        parts = stage_times(RECIPES[name], sets[0]) if with_stages and not RECIPES[name].in_fp8 else {}
        yield row | _against(times, "ours", ["dense"], error) | parts


def measure_fp8(tokens: int, d_model: int, d_ffn: int, names: list[str], masters: Any) -> Iterator[dict[str, Any]]:
    """Rows for recipes in eight bits, all compiled at once and all in one race, against dense layers of two kinds.

    The rival "dense" is XLA's layer in bf16, "dense8" the fastest dense layer in eight bits: ours or one of `rivals8`.
    """
    sets = [operands(tokens, d_model, d_ffn, seed, masters) for seed in range(2)]
    steps = {"dense": step(Recipe.dense(), None)} | rivals8()
    steps |= {name: step(RECIPES[name], "hopper") for name in names}
    jobs: dict[Any, Callable[[], timing.Run]] = {
        name: functools.partial(timing.repeated, function, sets) for name, function in steps.items()
    }
    checks: dict[Any, Callable[[], Any]] = {
        ("error", name): functools.partial(checked_error, RECIPES[name], d_model, d_ffn) for name in names
    }
    built: dict[Any, Any] = timing.build(checks | jobs, at_once=16)
    failed = {name: result for name, result in built.items() if isinstance(result, Exception)}
    runs = {name: built[name] for name in jobs if name not in failed and ("error", name) not in failed}
    times = timing.race(runs, dict.fromkeys(runs, len(sets)), rounds=5)
    dense8 = [name for name in rivals8() if name in times]
    for name in names:
        row = _row(name, tokens, d_model, d_ffn, masters)
        if name not in times:
            yield row | {"failure": str(failed.get(("error", name), failed.get(name)))[:300]}
            continue
        error = built["error", name]
        yield row | _against(times, name, ["dense"], error)
        if not RECIPES[name].is_dense:
            yield row | {"rival": "dense8"} | _against(times, name, dense8, error)


def _row(name: str, tokens: int, d_model: int, d_ffn: int, masters: Any) -> dict[str, Any]:
    return {
        "bench": "ffn",
        "case": f"{name} D={d_model} F={d_ffn}",
        "tokens": tokens,
        "masters": jnp.dtype(masters).name,
        "ms": None,
        "rival": "dense",
        "rival_ms": None,
        "speedup": None,
        "relerr": None,
        "device": gpu_name(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def rivals8() -> dict[str, Callable[..., Any]]:
    """Dense layers in eight bits: ours, and XLA's with a scale for each tensor (`venom_jax.rivals`)."""
    return {
        "dense fp8": step(RECIPES["dense fp8"], "hopper"),
        "tensor scales": rivals.step(),
        "tensor scales, e5m2 gradients": rivals.step(rivals.E5M2),
        "tensor scales, all sums in 14 bits": rivals.step(exact=False),
    }


def _against(times: dict[str, float], ours: str, rivals_of_row: list[str], error: float) -> dict[str, Any]:
    """The measured fields of a row, against the fastest of some rivals."""
    fastest = min(rivals_of_row, key=lambda name: times[name])
    found = {
        "ms": round(times[ours], 4),
        "rival_ms": round(times[fastest], 4),
        "speedup": round(times[fastest] / times[ours], 3),
        "relerr": float(f"{error:.3g}"),
    }
    return found if len(rivals_of_row) == 1 else found | {"rival_form": fastest}


def checked_error(recipe: Recipe, d_model: int, d_ffn: int) -> float:
    """`largest_error`.

    Raises:
      RuntimeError: the recipe's results are wrong; nothing is to be timed.
    """
    error = largest_error(recipe, d_model, d_ffn)
    if not error <= MAX_ERROR:
        raise RuntimeError(f"relative error {error:.2e} exceeds {MAX_ERROR:.0e}; not timed")
    return error


def stage_times(recipe: Recipe, arguments: tuple) -> dict[str, dict[str, float]]:
    """`stage_ms` of a row."""
    jobs = {
        part: functools.partial(timing.repeated, function, [given])
        for part, (function, given) in stages(recipe, *arguments).items()
    }
    parts = {part: run for part, run in timing.build(jobs).items() if not isinstance(run, Exception)}
    part_ms = timing.race(parts, dict.fromkeys(parts, 1), rounds=5, seconds=0.005)
    return {"stage_ms": {part: round(ms, 4) for part, ms in part_ms.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file for the rows")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--recipes", help="names, separated by commas (default: all, or with --fp8 those in 8 bits)")
    parser.add_argument(
        "--fp8", action="store_true", help="recipes in 8 bits, in one race with dense layers of 16 and 8"
    )
    parser.add_argument("--d_model", type=int, nargs="*", default=[size[0] for size in SIZES], help="of the sizes")
    parser.add_argument("--masters", nargs="*", default=["bfloat16", "float32"], help="dtypes of weights and gradients")
    parser.add_argument("--stages", action="store_true", help="time the parts of each step with bfloat16 masters too")
    arguments = parser.parse_args()
    default = [name for name, recipe in RECIPES.items() if recipe.in_fp8] if arguments.fp8 else list(RECIPES)
    names, rows = default if arguments.recipes is None else arguments.recipes.split(","), []
    for masters in arguments.masters:
        for d_model, d_ffn in SIZES:
            if d_model in arguments.d_model:
                given = (arguments.tokens, d_model, d_ffn, names, jnp.dtype(masters))
                with_stages = arguments.stages and masters == "bfloat16"
                for row in measure_fp8(*given) if arguments.fp8 else measure(*given, with_stages):
                    print(json.dumps(row), flush=True)
                    rows.append(row)
                    with open(arguments.json, "w") as file:
                        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
