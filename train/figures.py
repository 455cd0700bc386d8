"""The figures of arXiv 2602.06183 that need no training, from the configurations and from the benchmark's results:

    python -m train.figures --output=docs/figures

`operations.svg`: what the parts of a model cost, over its size (Figure 1). `products.svg`: 2:4 products against dense
ones (Figure 6). `routed.svg`: the products of routed tokens, V:N:M = 64:2:4E, against dense ones (Figure 7). The latter
two are drawn from `kernels.json` as `python -m pallas_kernels.bench` writes it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from train import model
from train.command import program
from train.config import load_config
from train.plot import COLORS, new_figure
from venom_jax import Recipe

SIZES = ("40m", "125m", "1b", "7b")
RECIPES = {"act24": Recipe.act24(), "all24": Recipe.all24(), "venom E=4 k=1": Recipe.venom(4, 1)}
_GROUPED = re.compile(r"E=(?P<experts>\d+) D=(?P<d_model>\d+) F=\d+ mode=(?P<mode>\w+) sizes=equal")

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The benchmark's rows against dense products.

    Raises:
      ValueError: no such file, or none in it.
    """
    try:
        rows = [row for row in json.loads(path.read_text()) if row["rival"] == "dense"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of python -m pallas_kernels.bench ({error})") from error
    if not rows:
        raise ValueError(f"{path} holds no comparison with dense products")
    return rows


def draw_operations(output: Path) -> None:
    """Shares of the operations of a dense step, and the operations of a sparse step of each recipe, by size."""
    figure, axes = new_figure()
    places, bottom = np.arange(len(SIZES)), np.zeros(len(SIZES))
    configs = [load_config([f"configs/size/{size}.gin"], ["Data.synthetic = True"]) for size in SIZES]
    parts = [model.component_flops(config.model, config.train.seq_len) for config in configs]
    for name, color in zip(("ffn", "projections", "attention", "head"), COLORS, strict=False):
        share = np.array([100 * part[name] / sum(part.values()) for part in parts])
        axes.bar(places, share, 0.5, bottom, color=color, label=name)
        bottom += share
    for marker, (name, recipe) in zip("o^s", RECIPES.items(), strict=True):
        left = [
            100 * model.flops_per_token(config.model, config.train.seq_len, recipe) / sum(part.values())
            for config, part in zip(configs, parts, strict=True)
        ]
        axes.plot(places, left, marker, color="black", markerfacecolor="white", label=f"executed by {name}")
    axes.set_xticks(places, [f"{s}, S={c.train.seq_len:,}" for s, c in zip(SIZES, configs, strict=True)])
    axes.set_ylabel("share of a dense step's operations (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    _save(figure, output)


def draw_products(rows: Sequence[Row], output: Path) -> None:
    """Speed of the 2:4 products over dense ones of the same shape, B row-major or column-major."""
    found = [row for row in rows if row["bench"] == "sparse24" and "out=" not in row["case"]]
    shapes = list(dict.fromkeys(row["case"].split()[0] for row in found))
    figure, axes = new_figure()
    for i, layout in enumerate(("nmajor", "kmajor")):
        speed = {row["case"].split()[0]: row["speedup"] for row in found if row["case"].endswith(f"b={layout}")}
        values = [speed.get(shape, np.nan) for shape in shapes]
        axes.bar(np.arange(len(shapes)) + 0.4 * i - 0.2, values, 0.38, color=COLORS[i], label=f"B {layout}")
    _against_dense(axes, rows)
    axes.set_xticks(np.arange(len(shapes)), shapes, fontsize="small")
    axes.set_xlabel("m x n x k")
    _save(figure, output)


def draw_routed(rows: Sequence[Row], output: Path) -> None:
    """Speed of one expert a token over the dense product of the same tokens, over the number of experts."""
    curves: dict[tuple[int, str], dict[int, float]] = {}
    for row in rows:
        if row["bench"] == "grouped24" and (case := _GROUPED.fullmatch(row["case"])):
            curve = curves.setdefault((int(case["d_model"]), case["mode"]), {})
            curve[int(case["experts"])] = row["speedup"]
    figure, axes = new_figure()
    modes = list(dict.fromkeys(mode for _, mode in curves))
    widths = list(dict.fromkeys(d_model for d_model, _ in curves))
    for (d_model, mode), curve in curves.items():
        style = {"color": COLORS[widths.index(d_model)], "marker": "o^s"[modes.index(mode)]}
        axes.plot(*zip(*sorted(curve.items()), strict=True), **style, label=f"D={d_model}, {mode}")
    experts = sorted({count for curve in curves.values() for count in curve})
    axes.plot(experts, [2 * count for count in experts], color="0.6", linestyle="--", label="2 E: operations skipped")
    _against_dense(axes, rows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(experts, [f"E={count}\n64:2:{4 * count}" for count in experts])
    axes.yaxis.set_major_formatter("{x:g}")
    _save(figure, output)


def _against_dense(axes: Any, rows: Sequence[Row]) -> None:
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_ylabel("speed over the dense product")
    axes.set_title(f"{rows[0]['device']}, jax {rows[0]['jax']}, {rows[0]['date']}", fontsize="small", loc="left")
    axes.legend(fontsize="small")


def _save(figure: Figure, output: Path) -> None:
    try:
        figure.savefig(output, metadata={"Date": None})  # the same input gives the same file
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}") from error


def draw_all(kernels: Path, output: Path) -> list[Path]:
    """Writes the figures into a folder.

    Raises:
      ValueError: `kernels` is no table of the benchmark, or the folder cannot be written.
    """
    rows = read_rows(kernels)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {output}: {error}") from error
    paths = [output / f"{name}.svg" for name in ("operations", "products", "routed")]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "venom-jax"}):
        draw_operations(paths[0])
        draw_products(rows, paths[1])
        draw_routed(rows, paths[2])
    return paths


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    for path in draw_all(Path(values.kernels), Path(values.output)):
        print(path)


if __name__ == "__main__":
    flags.DEFINE_string("kernels", "docs/results/h100/kernels.json", "results of python -m pallas_kernels.bench")
    flags.DEFINE_string("output", "docs/figures", "folder for the images")
    app.run(main)
