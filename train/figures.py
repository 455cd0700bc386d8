"""The figures of arXiv 2602.06183 that need no training, and loss against time, from results and configurations:

    python -m train.figures --output=docs/figures

`operations.svg`: what the parts of a model cost, over its size (Figure 1). `products.svg`: 2:4 products against dense
ones (Figure 6). `routed.svg`: the products of routed tokens, V:N:M = 64:2:4E, against dense ones (Figure 7). The latter
two are drawn from `kernels.json` as `python -m pallas_kernels.bench` writes it. With ``--sweep``, `front.svg`: what the
runs of `train.sweep` lost against the time they take by ``--step_times``, of their twins'. With ``--steps``,
`steps.svg`: where the time of a step goes, from the parts in the rows of `train.bench`.
"""

from pathlib import Path

from absl import app, flags

from train.command import program
from train.sweeps.figures import draw_all


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    for path in draw_all(
        Path(values.kernels), Path(values.output), *(name and Path(name) for name in (values.sweep, values.steps))
    ):
        print(path)


if __name__ == "__main__":
    flags.DEFINE_string("kernels", "docs/results/h100/kernels.json", "results of python -m pallas_kernels.bench")
    flags.DEFINE_string("sweep", None, "table.json of python -m train.sweep --step_times, for front.svg")
    flags.DEFINE_string("steps", None, "results of python -m train.bench with parts, for steps.svg")
    flags.DEFINE_string("output", "docs/figures", "folder for the images")
    app.run(main)
