"""Times whole training steps of several recipes against dense, in one process: what `python -m train.bench` runs.

A step is what a run executes: gradients, clipping, AdamW, the router's bias.  Each recipe takes turns with dense on one
state, which each step donates to the next, so that a card which warms up treats both alike.
"""

import datetime
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from train.command import print_error
from train.config.precision import COMPUTE, split_precision
from train.config.schedule import label
from train.config.settings import PRESETS, Phases, RunConfig, named_recipe
from train.data.sources import open_fitting
from train.data.token_files import train_iterator
from train.model import decoder
from train.model.mesh import Layout, layout_of
from train.records import trace
from train.records.metrics import peak_flops
from train.state.state import TrainState, initial_state, run_structure
from train.step.step import make_train_step
from venom_jax import Recipe

STEPS_A_TURN = 4
"""Between two of them the host is ahead of the GPU, as in a run."""
TRACED_STEPS = 2
MAX_UNKNOWN = 0.05
"""Share of a step whose kernels may be unknown in ``part_ms``, where they count as other."""
SWITCH = "switch"
DENSE_FP8 = "dense fp8"


def parse_recipe(text: str) -> tuple[str, Recipe]:
    """'act24', 'venom:4:1', 'act24:4:2' or one of these with '@fp8' behind it -> (label, recipe).

    Raises:
      ValueError: an unknown name, or another form.
    """
    whole, precision = split_precision(text)
    name, *numbers = whole.split(":")
    if not numbers and name in PRESETS:
        recipe = named_recipe(name)
    elif name in ("venom", "act24") and len(numbers) == 2 and all(number.isdecimal() for number in numbers):
        recipe = Recipe.preset(name, experts=int(numbers[0]), top_k=int(numbers[1]))
    else:
        raise ValueError(
            f"--recipes has {text!r}; give dense, act24, all24, venom, venom:EXPERTS:TOP_K or act24:EXPERTS:TOP_K, "
            "and @fp8 behind it for eight bits"
        )
    recipe = recipe if precision is None else replace(recipe, precision=precision)
    return label(name, recipe), recipe


def with_phases(config: RunConfig, recipes: list[Recipe]) -> RunConfig:
    """The run that has each recipe for a step, so that its program holds them all; recipes say their own precision."""
    steps = max(config.train.steps, len(recipes))
    train = replace(config.train, steps=steps, precision=COMPUTE, fp8_edges=0, fp8_until=None)
    return replace(config, phases=Phases(tuple(enumerate(recipes))), train=train)


@dataclass(frozen=True)
class Program:
    """A compiled step, run in one of its phases."""

    recipe: Recipe
    step: Any
    compile_s: float
    traced: Any
    """The same step, launched so that a trace tells the operation of each kernel."""
    phase: int = 0

    def __call__(self, state: TrainState, tokens: jax.Array) -> TrainState:
        phase = jax.device_put(np.int32(self.phase), state.phase.sharding)
        return self.step(replace(state, phase=phase), tokens)[0]

    @property
    def peak_gib(self) -> float | None:
        """What XLA allots on a device: arguments, results that share no argument's memory, temporaries."""
        memory = self.step.memory_analysis()
        if memory is None:
            return None
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (size + memory.temp_size_in_bytes) / 2**30


def race(
    programs: list[Program], state: TrainState, batches: list[jax.Array], rounds: int
) -> tuple[list[float], TrainState]:
    """Median milliseconds of a step of each program, taking turns; the first round warms up."""
    times: list[list[float]] = [[] for _ in programs]
    for number in range(rounds + 1):
        for one, taken in zip(programs, times, strict=True):
            jax.block_until_ready(state)
            start = time.perf_counter()
            for turn in range(STEPS_A_TURN):
                state = one(state, batches[(number * STEPS_A_TURN + turn) % len(batches)])
            jax.block_until_ready(state)
            if number:
                taken.append(1e3 * (time.perf_counter() - start) / STEPS_A_TURN)
    return [median(taken) for taken in times], state


@dataclass
class Bench:
    """The state that all programs share, the batches, and the rows so far."""

    config: RunConfig
    case: str
    rounds: int
    output: Path | None
    recipes: list[Recipe]
    layout: Layout
    state: TrainState
    batches: list[jax.Array]
    rows: list[dict] = field(default_factory=list)

    @classmethod
    def start(cls, config: RunConfig, recipes: list[Recipe], case: str, rounds: int, output: Path | None) -> "Bench":
        """With a fresh state that holds the arrays of all recipes."""
        train, layout = config.train, layout_of(config)
        dataset = open_fitting(config, "train")
        state = initial_state(with_phases(config, recipes), layout)
        iterator = train_iterator(dataset, batch_size=train.batch_size, seq_len=train.seq_len, seed=train.seed)
        batches = [layout.rows(np.asarray(next(iterator)["tokens"])) for _ in range(4)]
        return cls(config, case, rounds, output, recipes, layout, state, batches)

    def compile(self, name: str, recipes: list[Recipe], traced: bool) -> list[Program]:
        """One program that holds these recipes, in each of its phases; none, and a line that says why, if it fails."""
        start = time.perf_counter()
        config = with_phases(self.config, recipes)
        try:
            graphdef = run_structure(with_phases(self.config, self.recipes))
            step: Any = make_train_step(graphdef, config, self.layout)
            lowered = step.lower(self.state, self.batches[0])
            step = lowered.compile()
            seconds = time.perf_counter() - start
            again = lowered.compile(trace.NO_COMMAND_BUFFERS) if traced and jax.default_backend() == "gpu" else step
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            reason = str(error).strip().split("\n")[0][:300]
            print(json.dumps({"case": f"{self.case} {name}", "failure": reason}), flush=True)
            return []
        return [Program(recipe, step, seconds, again, phase) for phase, recipe in enumerate(recipes)]

    def add_row(self, name: str, program: Program, rival_name: str, rival: Program, *, parts: bool) -> None:
        """Races the program against its rival, prints the row and writes the file."""
        pair = [rival] if rival is program else [rival, program]
        times, self.state = race(pair, self.state, self.batches, self.rounds)
        self.write_row(name, program, rival_name, times[0], times[-1], parts=parts)

    def write_row(
        self, name: str, program: Program, rival_name: str, rival_ms: float, ms: float, *, parts: bool, **more: Any
    ) -> None:
        """Prints the row of a program that took so many milliseconds and writes the file; `more` of its figures."""
        shape, train, devices = self.config.model, self.config.train, self.layout.devices
        tokens, peak = train.batch_size * train.seq_len, peak_flops(devices)

        def utilization(recipe: Recipe) -> float | None:
            """Of the peak for 16 bits; operations on eight bits count half."""
            fp8_head = train.fp8_head
            flops = tokens * decoder.compute_flops_per_token(shape, train.seq_len, recipe, fp8_head=fp8_head)
            return None if peak is None else round(flops / ms * 1e3 / peak, 4)

        row: dict[str, Any] = {
            "bench": "train_step",
            "case": f"{self.case} {name}",
            "precision": "fp8" if program.recipe.in_fp8 else train.dtype,
            "ms": round(ms, 3),
            "rival": rival_name,
            "rival_ms": round(rival_ms, 3),
            "speedup": round(rival_ms / ms, 4),
            **more,
            "tokens_per_second": round(tokens / ms * 1e3),
            "mfu_dense": utilization(Recipe.dense()),
            "mfu_executed": utilization(program.recipe),
            "memory_gib": None if (gib := program.peak_gib) is None else round(gib, 2),
            "compile_s": round(program.compile_s, 1),
            "device": jax.devices()[0].device_kind,
            "devices": devices,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        if parts:
            self.add_parts(row, program, ms)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def add_parts(self, row: dict[str, Any], program: Program, ms: float) -> None:
        """Where the time goes, if it is known."""
        if spent := self.parts(program, ms):
            row["part_ms"] = {part: round(value, 2) for part, value in spent.items()}

    def write(self) -> None:
        """Writes the rows so far."""
        if self.output is not None:
            self.output.write_text(json.dumps(self.rows, indent=1) + "\n")

    def race_all(self, programs: dict[str, Program], parts: bool) -> None:
        """A row of each program, all in one race; of those in eight bits also against dense in these."""
        found, self.state = race(list(programs.values()), self.state, self.batches, self.rounds)
        times = dict(zip(programs, found, strict=True))
        for name, program in programs.items():
            more: dict[str, Any] = {}
            if program.recipe.in_fp8 and (fp8_ms := times.get(DENSE_FP8)):
                more = {"dense_fp8_ms": round(fp8_ms, 3), "speedup_over_dense_fp8": round(fp8_ms / times[name], 4)}
            self.write_row(name, program, "dense", times["dense"], times[name], parts=False, **more)
        if parts:  # last: the rows are there if time runs out
            for row, (name, program) in zip(self.rows, programs.items(), strict=True):
                self.add_parts(row, program, times[name])
                print(json.dumps({"case": row["case"], "part_ms": row.get("part_ms")}), flush=True)
            self.write()

    def parts(self, program: Program, ms: float) -> dict[str, float] | None:
        """Where the program's step of so many milliseconds goes; None, with names on stderr, if too much is unknown."""
        traced = replace(program, step=program.traced)

        def run() -> TrainState:
            for tokens in self.batches[:TRACED_STEPS]:
                self.state = traced(self.state, tokens)
            return self.state

        jax.block_until_ready(run())
        names, found = trace.operation_names(traced.step.as_text()), trace.record(run)
        spent = trace.part_ms(found, names, TRACED_STEPS, ms)
        unknown = spent.pop(trace.UNKNOWN)
        if unknown > MAX_UNKNOWN * ms:
            print_error(f"no part_ms: of {ms:.1f} ms, {unknown:.1f} are in kernels of no known operation, such as")
            lost = [work for work in found if trace.part_of(work, names) == trace.UNKNOWN]
            print(trace.table(lost, names, TRACED_STEPS, 20), file=sys.stderr, flush=True)
            return None
        spent[trace.OTHER] += unknown
        return spent


def measure(
    config: RunConfig,
    names: list[str],
    case: str,
    rounds: int,
    parts: bool,
    switch: bool,
    output: Path | None = None,
    *,
    together: bool = False,
) -> list[dict]:
    """A row for dense, for each recipe and, where asked for, for both phases of a switch; none for what fails.

    together: all recipes take turns in one race, without a switch; those in eight bits also against dense in these.
    """
    recipes = dict(parse_recipe(name) for name in ["dense", *names])
    bench = Bench.start(config, list(recipes.values()), case, rounds, output)
    programs: dict[str, Program] = {}

    def add(name: str, compiled: list[Program]) -> None:
        for programs[name] in compiled:
            if not together:
                bench.add_row(name, programs[name], "dense", programs["dense"], parts=parts)

    add("dense", bench.compile("dense", [recipes["dense"]], parts))
    last = list(recipes)[-1]
    switch = switch and not together
    wanted = {name: [recipe] for name, recipe in recipes.items() if name != "dense" and programs}
    if switch and wanted:
        wanted[SWITCH] = [recipes["dense"], recipes[last]]
    # Side by side, after dense alone: XLA has by then timed most of the products that all share.
    with ThreadPoolExecutor() as pool:
        traced = [parts] * len(wanted)
        compiled = dict(zip(wanted, pool.map(bench.compile, wanted, wanted.values(), traced), strict=True))
    both = compiled.pop(SWITCH, [])
    for name, found in compiled.items():
        add(name, found)
    if together and programs:
        bench.race_all(programs, parts)
    for name, phase in zip(("dense", last), both, strict=False):
        if name in programs:
            bench.add_row(f"{name}, switch", phase, name, programs[name], parts=parts)
    return bench.rows
