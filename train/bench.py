"""Times whole training steps of several recipes against dense, in one process, on real text.

    python -m train.bench --gin_file=configs/size/1b.gin --gin_bindings="Data.folder='DATA'" \\
        --recipes=dense,act24,all24,venom:4:1 --json=steps.json

A step is what a run executes: gradients, clipping, AdamW, the router's bias.  Each recipe takes turns with dense on one
state, which each step donates to the next, so that a card which warms up treats both alike; the weights are the first
ones, neither clustered nor scaled.  ``venom:E:k`` names a routed recipe, ``act24:E:k`` the same with dense weights;
with ``@fp8`` behind it, as in ``dense@fp8`` or ``venom:4:1@fp8``, a recipe runs in eight bits.  A row is printed, and
the file written, as soon as its recipe has run.  With ``--together`` all take turns in one race, without a switch, and
those in eight bits are compared with dense in eight bits, too.

``mfu_dense`` and ``mfu_executed`` are of the device's peak for 16 bits, where an operation on eight bits counts half.

``part_ms``: where the step's time goes, from a trace of two steps (`train.records.trace`): the FFN with its router and
packing, attention with its rotation, the projections around it, the head with its loss, clipping with AdamW, what is
exchanged with other devices and hidden behind nothing, other kernels (norms, embedding, sums), nothing at all.  Left
out, with the kernels' names on stderr, where the trace does not say what the kernels of more than a twentieth of a step
compute.

``switch``: dense and the last recipe once more, both in one program behind `lax.cond`, against their own programs.
"""

from pathlib import Path

from absl import app, flags

from train.command import print_error, program
from train.config.settings import load_config
from train.records.bench import measure, parse_recipe


def work(values: flags.FlagValues) -> int:
    """Measures and writes the file; 1 where a recipe did not run."""
    config = load_config(values.gin_file, values.gin_bindings)
    names = [name for name in values.recipes.split(",") if name != "dense"]
    wanted, output = {parse_recipe(name)[0] for name in ["dense", *names]}, Path(values.json)
    if not output.parent.is_dir():
        raise ValueError(f"--json={values.json}: there is no folder {output.parent}")
    size = Path(values.gin_file[0]).stem if values.gin_file else "model"
    rows = measure(config, names, size, values.rounds, values.parts, values.switch, output, together=values.together)
    missing = len(wanted) - sum(not row["case"].endswith(", switch") for row in rows)
    if missing:
        print_error(f"{missing} of the recipes did not run; the lines above say why")
    return 1 if missing else 0


if __name__ == "__main__":
    flags.DEFINE_multi_string("gin_file", [], "configuration file; later ones override earlier ones")
    flags.DEFINE_multi_string("gin_bindings", [], "single bindings, applied after the files")
    flags.DEFINE_string("recipes", "dense,act24,all24,venom", "recipes, separated by commas")
    flags.DEFINE_string("json", None, "file for the rows", required=True)
    flags.DEFINE_integer("rounds", 5, "turns of every recipe", lower_bound=1)
    flags.DEFINE_boolean("parts", True, "trace where the time of a step goes")
    flags.DEFINE_boolean("together", False, "one race in which all recipes take turns")
    flags.DEFINE_boolean("switch", True, "also time dense and the last recipe behind the phases' switch")
    app.run(program(work))
