"""Will it pay? Speed of each recipe on one FFN, as measured: python -m venom_jax.advise --d_model=2048 --d_ffn=8192

Prints one sentence, what to take and what it gains; then, for every recipe, the measured speed of the whole FFN
(forward, backward and every conversion) against XLA's dense one where this very shape was measured, and "not measured"
where it was not: nothing is interpolated. Below it, the measured shapes on either side of the break-even, and what each
kind of GPU gets today.
Measured tables are ffn.json, kernels.json and train.json, as `python -m venom_jax.bench`, `python -m
pallas_kernels.bench` and `python -m train.bench` write them. The package holds those of docs/results as measured.json:

    python -m venom_jax.advise --collect=docs/results      writes it anew
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels import device
from venom_jax import packed_ffn
from venom_jax.bench import RECIPES

Row = dict[str, Any]

MEASURED = Path(__file__).with_name("measured.json")  # the rows of TABLES, without those of single stages
TABLES = ("ffn.json", "kernels.json", "train.json", "train8.json")

FREE = {
    "act24 fp8": "eight bits cost it 0.003 nats in one short run of 42M parameters (docs/fp8_or_24.md)",
    "act24": "its loss is dense's within the scatter of our runs (docs/recipe.md)",
}
"""Recipes to take first, the faster first, and what is known of their loss."""

STEP_WIDTHS = {"1b": 2048, "7b-layers": 4096, "7b": 4096}
"""D of the models whose whole steps are in the tables."""

KERNELS = "all six products on sparse tensor cores, by default, in bf16 and fp16, and in fp8 by precision"
WARP = "all six products on sparse tensor cores, by default, in bf16 and fp16; compiled for it, run on an H200 alone"
REFERENCE = "the masked reference: the same results, by dense products, not faster than dense"

# GPU, compute capability, what runs there today.
SUPPORT = (
    ("H100, H200, H800, GH200", device.HOPPER, KERNELS),
    ("A100, A30", "8.0", WARP),
    ("RTX 30, A10, A40, RTX A6000", "8.6", WARP),
    ("RTX 40, L4, L40, RTX 6000 Ada", "8.9", WARP),
    ("B100, B200, GB200 (Blackwell)", "10.0", REFERENCE),
    ("B300, GB300 (Blackwell)", "10.3", REFERENCE),
    ("RTX 50, RTX PRO 6000 (Blackwell)", "12.0", WARP),
    ("any other device, CPUs, TPUs", "", REFERENCE),
)

# Matched against whole words at the start of the name, as `_plain` has it.
_CAPABILITIES = (
    (r"g?h(100|200|800|20)", device.HOPPER),
    (r"a(100|30)", "8.0"),
    (r"a10g?|a40|rtx (30\d\d|a\d000)", "8.6"),
    (r"l4|l40s?|rtx (40\d\d|6000 ada)", "8.9"),
    (r"g?b[12]00", "10.0"),
    (r"g?b300", "10.3"),
    (r"rtx (50\d\d|pro \d000)", "12.0"),
    (r"cpu|tpu", ""),
)

_FFN_CASE = re.compile(r"(?P<recipe>.+) D=(?P<d_model>\d+) F=(?P<d_ffn>\d+)")


@dataclass(frozen=True)
class Shape:
    """An FFN: D, F, and tokens a call."""

    d_model: int
    d_ffn: int
    tokens: int

    def __str__(self) -> str:
        return f"D={self.d_model} F={self.d_ffn} T={self.tokens}"


@dataclass(frozen=True)
class Measurement:
    """One timed FFN: the speed of a recipe relative to dense; None where its result was wrong or it did not run."""

    recipe: str
    shape: Shape
    masters: str
    device: str
    ms: float | None
    dense_ms: float
    speedup: float | None


def read_rows(folder: Path | None = None) -> list[Row]:
    """The rows of every table below `folder`, or those that the package holds.

    Raises:
      ValueError: a file that is no list of rows.
    """
    rows: list[Row] = []
    for path in [MEASURED] if folder is None else sorted(p for p in folder.rglob("*.json") if p.name in TABLES):
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}); write it anew with the benchmark") from error
        if not isinstance(found, list) or not all(isinstance(row, dict) and "bench" in row for row in found):
            raise ValueError(f"{path} is no list of benchmark rows; write it anew with the benchmark")
        rows += found
    return rows


def collect(folder: Path) -> str:
    """Content of ``MEASURED`` for the tables below `folder`: one row a line.

    Raises:
      ValueError: a file that is no list of rows, or no file at all.
    """
    rows = [{name: value for name, value in row.items() if name != "stage_ms"} for row in read_rows(folder)]
    if not rows:
        raise ValueError(f"--collect={folder} holds none of {', '.join(TABLES)}")
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def measurements(rows: Sequence[Row]) -> list[Measurement]:
    """The rows about whole FFNs."""
    found = []
    for row in rows:
        match = _FFN_CASE.fullmatch(row["case"]) if row["bench"] == "ffn" and row["rival"] == "dense" else None
        if match:
            shape = Shape(int(match["d_model"]), int(match["d_ffn"]), row["tokens"])
            timed = (row["ms"], row["rival_ms"], row["speedup"])
            found.append(Measurement(match["recipe"], shape, row["masters"], row["device"], *timed))
    return found


def compute_capability(gpu: str) -> str:
    """Of a GPU by its name; "" for a device that is none.

    Raises:
      ValueError: an unknown name.
    """
    for pattern, capability in _CAPABILITIES:
        if re.match(rf"({pattern})\b", _plain(gpu)):
            return capability
    names = ", ".join(name for name, capability, _ in SUPPORT if capability)
    raise ValueError(f"gpu = {gpu!r} is not known; name one of {names}, or cpu")


def is_same_gpu(gpu: str, name: str) -> bool:
    """Whether a driver's name ("NVIDIA H100 80GB HBM3") is the GPU asked for ("h100")."""
    short, long = _plain(gpu), _plain(name)
    return long == short or long.startswith(short + " ")


def _plain(gpu: str) -> str:
    """ "NVIDIA GeForce RTX 4090" -> "rtx 4090", "rtx4090" as well, "NVIDIA A100-SXM4-80GB" -> "a100 sxm4 80gb"."""
    words = re.sub(r"nvidia|geforce|[^a-z0-9]+", " ", gpu.lower()).split()
    return re.sub(r"\brtx(?=\w)", "rtx ", " ".join(words))


def advise(shape: Shape, gpu: str, rows: Sequence[Row], masters: str = "float32") -> str:
    """The advice as Markdown.

    Args:
      shape: of the FFN on one device.
      gpu: its name.
      rows: as the benchmarks write them.
      masters: dtype of the weights and their gradients.

    Raises:
      ValueError: sizes below 1, or an unknown GPU.
    """
    if min(shape.d_model, shape.d_ffn, shape.tokens) < 1:
        raise ValueError(f"sizes must be positive, got {shape}")
    family = device.family_of(compute_capability(gpu))
    runs = {"hopper": KERNELS, "warp": WARP}.get(family or "", REFERENCE)
    kernels = runs != REFERENCE
    measured = [m for m in measurements(rows) if m.masters == masters]
    here = [m for m in measured if is_same_gpu(gpu, m.device)]
    lines = [
        f"# {shape}, {masters} weights, on {gpu}",
        "",
        verdict(shape, gpu, kernels, here, rows),
        "",
        f"{gpu} runs {runs}.",
        "",
        "Forward and backward of the FFN alone against XLA's dense one. Attention, logits and the dense phases of a",
        "run are not in it; they make the gain of a whole run smaller.",
        "",
        "| recipe | pattern | speed | ms | dense ms |",
        "|---|---|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        speed, ms, dense_ms = _verdict(name, shape, here, kernels)
        pattern = str(recipe.pattern) if recipe.routed or recipe.activations else ""
        lines.append(f"| {name} | {pattern} | {speed} | {ms} | {dense_ms} |")
    if kernels:
        at = lines.index(
            "Forward and backward of the FFN alone against XLA's dense one. Attention, logits and the dense phases of a"
        )
        lines[at:at] = ["## Whole training steps", "", *_training_steps(gpu, rows), "", "## The layer", ""]
        lines += ["", "## Break-even", "", *_break_even(gpu, masters, here, measured, rows)]
    lines += ["", "## What runs where", "", "| GPU | compute capability | runs |", "|---|---|---|"]
    lines += [f"| {names} | {capability} | {runs} |" for names, capability, runs in SUPPORT]
    return "\n".join(lines) + "\n"


def verdict(shape: Shape, gpu: str, kernels: bool, here: Sequence[Measurement], rows: Sequence[Row]) -> str:
    """What to take, in one sentence: by whole steps of a model of this width, else by the layer, both as measured."""
    if not kernels:
        return f"Train dense: on {gpu} every sparse recipe computes the same by dense products and gains no time."
    steps = {}
    for row in rows:
        size, _, recipe = row["case"].partition(" ")
        is_step = row["bench"] == "train_step" and row["rival"] == "dense" and bool(row["speedup"])
        if is_step and STEP_WIDTHS.get(size) == shape.d_model and is_same_gpu(gpu, row["device"]):
            steps[recipe] = (size, row["speedup"])
    for name in FREE:
        if name in steps and steps[name][1] > 1:
            size, gain = steps[name]
            return f"Take {name}: a training step of {size} runs {gain:.2f}x as fast as dense in bf16; {FREE[name]}."
    layer = [m for name in FREE for m in here if m.recipe == name and m.shape == shape and m.speedup]
    if layer and (layer[0].speedup or 0) > 1:
        return (
            f"Take {layer[0].recipe}: this layer runs {layer[0].speedup:.2f}x as fast as dense, a whole step gains "
            f"less; {FREE[layer[0].recipe]}."
        )
    if layer:
        return f"Train dense: this layer runs {layer[0].speedup:.2f}x as fast with {layer[0].recipe}, no gain."
    return f"Nothing of this shape is measured on {gpu}: time act24 with python -m venom_jax.bench before you take it."


def _verdict(name: str, shape: Shape, here: Sequence[Measurement], kernels: bool) -> tuple[str, str, str]:
    recipe = RECIPES[name]
    try:
        recipe.check(shape.d_model, shape.d_ffn)
    except ValueError as error:
        return f"cannot run: {error}", "", ""
    if not kernels:
        return "not faster than dense", "", ""
    reason = packed_ffn.unsupported(recipe, shape.d_model, shape.d_ffn)
    if reason is not None:
        return f"not faster than dense: runs the masked reference, as {reason}", "", ""
    exact = [m for m in here if m.recipe == name and m.shape == shape]
    if not exact:
        return "not measured", "", ""
    newest = exact[-1]
    if newest.speedup is None or newest.ms is None:
        return "failed its check or did not run when it was measured", "", f"{newest.dense_ms:.3f}"
    return f"{newest.speedup:.2f}x", f"{newest.ms:.3f}", f"{newest.dense_ms:.3f}"


def _break_even(
    gpu: str, masters: str, here: Sequence[Measurement], measured: Sequence[Measurement], rows: Sequence[Row]
) -> list[str]:
    """What was measured to win and what to lose."""
    lines = []
    if not here:
        others = sorted({m.device for m in measured})
        where = f"; there are measurements on {', '.join(others)}" if others else ""
        lines.append(f"- Whole FFNs: no table (ffn.json) with {masters} weights for {gpu}{where}.")
    for name in RECIPES:
        timed = [m for m in here if m.recipe == name and m.speedup is not None]
        for verb, chosen in (
            ("faster than dense", [m for m in timed if m.speedup is not None and m.speedup > 1]),
            ("not faster than dense", [m for m in timed if m.speedup is not None and m.speedup <= 1]),
        ):
            if chosen:
                lines.append(f"- {name}, {verb}: " + "; ".join(f"{m.shape} ({m.speedup:.2f}x)" for m in chosen))
    for bench, what in (("sparse24", "Single 2:4 products"), ("grouped24", "2:4 products over groups of tokens")):
        found = [r for r in rows if r["bench"] == bench and r["rival"] == "dense" and is_same_gpu(gpu, r["device"])]
        if not found:
            lines.append(f"- {what}: no table (kernels.json) for {gpu}.")
            continue
        speeds = [row["speedup"] for row in found]
        lost = "; ".join(f"{row['case']} ({row['speedup']:.2f}x)" for row in found if row["speedup"] <= 1)
        spread = f"{min(speeds):.2f}x to {max(speeds):.2f}x dense over {len(found)} cases"
        lines.append(f"- {what}: {spread}{f'; not faster at {lost}' if lost else ''}.")
    return lines


def _training_steps(gpu: str, rows: Sequence[Row]) -> list[str]:
    """What whole steps of some models gained, attention, logits and optimizer included."""
    steps = [r for r in rows if r["bench"] == "train_step" and r["rival"] == "dense" and r["speedup"]]
    found = [r for r in steps if is_same_gpu(gpu, r["device"])]
    lines = [f"- {r['case']}: {r['speedup']:.2f}x dense ({r['ms']:.0f} ms)" for r in found if "dense" not in r["case"]]
    return lines or [f"- No table (train.json) for {gpu}."]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_model", type=int, help="D")
    parser.add_argument("--d_ffn", type=int, help="F")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in one call on one device (default 16384)")
    parser.add_argument("--gpu", help="such as h100, a100, 'RTX 4090' (default: this machine's)")
    parser.add_argument("--masters", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--results", type=Path, help="folder of tables (default: those in the package)")
    parser.add_argument("--collect", type=Path, help="write the package's tables from this folder, and stop")
    arguments = parser.parse_args()
    if arguments.collect is None and None in (arguments.d_model, arguments.d_ffn):
        parser.error("give --d_model and --d_ffn")
    current = device.current()
    gpu = arguments.gpu or (current.name if current else "cpu")
    try:
        if arguments.collect is not None:
            MEASURED.write_text(collect(arguments.collect))
            return 0
        if arguments.results is not None and not arguments.results.is_dir():
            raise ValueError(f"--results={arguments.results} is no folder")
        shape = Shape(arguments.d_model, arguments.d_ffn, arguments.tokens)
        print(advise(shape, gpu, read_rows(arguments.results), arguments.masters), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
