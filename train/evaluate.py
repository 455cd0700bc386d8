"""Validation loss and bits per byte, inside a run and of a finished or interrupted one.

python -m train.evaluate --workdir=runs/a            # the dense model (a baked copy inside a sparse phase)
python -m train.evaluate --workdir=runs/a --sparse   # with the recipe of the checkpoint's phase as well
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from flax import nnx

from train import checkpoint, model
from train.config import RunConfig, load_config
from train.data import TokenDataset, eval_batches, open_dataset
from train.state import TrainState, abstract_state
from train.step import make_eval_step
from venom_jax import Recipe, phases

CONFIG_FILE = "config.gin"  # in the workdir: the bindings of the run


class Evaluator:
    """Mean loss over the validation split.  Compiles once for each recipe it meets."""

    def __init__(self, graphdef: nnx.GraphDef, config: RunConfig, dataset: TokenDataset):
        self._config, self._dataset = config, dataset
        self._step = make_eval_step(graphdef, config)
        self._bake = jax.jit(phases.bake, static_argnums=2)

    def __call__(self, state: TrainState, phase_index: int, *, sparse: bool = True) -> dict[str, float]:
        """val_loss in nats per token and val_bits_per_byte of the dense model.

        Inside a sparse phase that is a temporary baked copy, and with ``sparse`` the same two, computed by the
        phase's recipe, come with the suffix ``_sparse``.
        """
        recipe = self._config.schedule.phases[phase_index].recipe
        params = self._bake(state.params, state.method, recipe) if recipe.weights else state.params
        values = self._figures(params, state.method, Recipe.dense(), "")
        if sparse and not recipe.is_dense:
            values |= self._figures(state.params, state.method, recipe, "_sparse")
        return values

    def _figures(self, params: dict, method: dict, recipe: Recipe, suffix: str) -> dict[str, float]:
        train = self._config.train
        batches = eval_batches(
            self._dataset,
            batch_size=train.batch_size // train.accumulation,
            seq_len=train.seq_len,
            max_batches=train.eval_batches,
        )
        sums = [self._step(params, method, b["tokens"], b["weight"], recipe=recipe) for b in batches]
        losses, counts = zip(*jax.device_get(sums), strict=True)
        loss = math.fsum(map(float, losses)) / math.fsum(map(float, counts))
        bits_per_byte = loss / (math.log(2) * self._dataset.bytes_per_token)
        return {f"val_loss{suffix}": loss, f"val_bits_per_byte{suffix}": bits_per_byte}


def describe(values: dict[str, float]) -> str:
    """The figures of one evaluation in words."""
    text = f"validation loss {values['val_loss']:.4f} ({values['val_bits_per_byte']:.4f} bits per byte)"
    if "val_loss_sparse" in values:
        text += (
            f" dense, {values['val_loss_sparse']:.4f} ({values['val_bits_per_byte_sparse']:.4f} bits per byte) sparse"
        )
    return text


def restore(workdir: Path) -> tuple[nnx.GraphDef, RunConfig, TrainState, int]:
    """Structure, configuration, state and step of a workdir's newest checkpoint.

    Raises:
      ValueError: the workdir holds none.
    """
    saved = workdir / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"{workdir} holds no {CONFIG_FILE}: it is no workdir of train.main")
    config = load_config([str(saved.resolve())])
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints)
    step = checkpoints.latest
    if step is None:
        raise ValueError(f"{workdir} holds no checkpoint yet")
    state = checkpoints.restore_state(abstract_state(config))
    checkpoints.close()
    return model.structure(config.model, config.max_experts), config, state, step


def main(argv: Sequence[str]) -> int:
    del argv
    try:
        graphdef, config, state, step = restore(Path(flags.FLAGS.workdir))
        dataset = open_dataset(config.data.folder, "val")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    values: dict[str, Any] = Evaluator(graphdef, config, dataset)(state, int(state.phase), sparse=flags.FLAGS.sparse)
    print(f"step {step}: {describe(values)}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run of train.main", required=True)
    flags.DEFINE_boolean("sparse", False, "also evaluate with the recipe of the checkpoint's phase")
    app.run(main)
