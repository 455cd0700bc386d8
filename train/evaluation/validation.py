"""A run's checkpoint, restored, and its validation loss, bits per byte of a text and tasks of lm-eval."""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from train.config.schedule import Phase
from train.config.settings import RunConfig, load_config
from train.data import sources
from train.data.documents import describe_skipped
from train.data.token_files import Windows, eval_batches
from train.data.tokenizer import Tokenizer
from train.evaluation import harness
from train.evaluation.likelihood import Scorer, score_text
from train.evaluation.sampling import cached_model, sample
from train.model.mesh import ONE_DEVICE, Layout
from train.state import checkpoint
from train.state.remote import Remote, is_remote
from train.state.state import TrainState, abstract_state, run_structure
from train.step.step import make_eval_step
from venom_jax import Recipe, StackRecipe, phases

CONFIG_FILE = "config.gin"  # in the workdir: the bindings of the run


class Evaluator:
    """Mean loss over the validation split.  Compiles once for each recipe it meets."""

    def __init__(
        self, graphdef: nnx.GraphDef, config: RunConfig, dataset: sources.Dataset, layout: Layout = ONE_DEVICE
    ):
        self._config, self._parts, self._layout = config, sources.parts(dataset), layout
        self._step = make_eval_step(graphdef, config, layout)
        self._bake = jax.jit(phases.bake, static_argnums=2)

    def __call__(self, state: TrainState, phase_index: int, *, sparse: bool = True) -> dict[str, float]:
        """val_loss in nats per token and val_bits_per_byte of the dense model.

        Inside a sparse phase that is a temporary baked copy, and with ``sparse`` the same two, computed by the
        phase's recipe, come with the suffix ``_sparse``; with ``_ema`` those of the dense model whose weights are the
        moving average. Of several sources it is the mean by their shares, and each source's own has its name behind a
        slash.
        """
        recipe = self._config.schedule.phases[phase_index].recipe
        params = self._bake(state.params, state.method, recipe) if recipe.weights else state.params
        values = self.dense(params, state.method)
        if sparse and not recipe.is_dense:
            values |= self._figures(state.params, state.method, recipe, "_sparse")
        if state.ema is not None:
            ema = self._bake(state.ema, state.method, recipe) if recipe.weights else state.ema
            values |= self._figures(ema, state.method, Recipe.dense(), "_ema")
        return values

    def dense(self, params: dict, method: dict) -> dict[str, float]:
        """The dense model's figures for these parameters, taken as they are."""
        return self._figures(params, method, Recipe.dense(), "")

    def _figures(self, params: dict, method: dict, recipe: StackRecipe, suffix: str) -> dict[str, float]:
        losses = {name: self._loss(params, method, recipe, data) for name, _, data in self._parts}
        loss = math.fsum(share * losses[name] for name, share, _ in self._parts)
        size = math.fsum(share * data.bytes_per_token for _, share, data in self._parts)
        values = {f"val_loss{suffix}": loss, f"val_bits_per_byte{suffix}": loss / (math.log(2) * size)}
        if len(losses) > 1:
            values |= {f"val_loss{suffix}/{name}": one for name, one in losses.items()}
        return values

    def _loss(self, params: dict, method: dict, recipe: StackRecipe, dataset: Windows) -> float:
        train = self._config.train
        batches = eval_batches(
            dataset,
            batch_size=train.batch_size // train.accumulation,
            seq_len=train.seq_len,
            max_batches=train.eval_batches,
        )
        parts = ([self._layout.whole_rows(batch[name]) for name in ("tokens", "weight")] for batch in batches)
        sums = [self._step(params, method, *part, recipe=recipe) for part in parts]
        losses, counts = zip(*jax.device_get(sums), strict=True)
        return math.fsum(map(float, losses)) / math.fsum(map(float, counts))


def describe(values: dict[str, float]) -> str:
    """The figures of one evaluation in words."""
    text = f"validation loss {values['val_loss']:.4f} ({values['val_bits_per_byte']:.4f} bits per byte)"
    if "val_loss_sparse" in values:
        text += (
            f" dense, {values['val_loss_sparse']:.4f} ({values['val_bits_per_byte_sparse']:.4f} bits per byte) sparse"
        )
    if "val_loss_ema" in values:
        text += f", {values['val_loss_ema']:.4f} ({values['val_bits_per_byte_ema']:.4f} bits per byte) averaged"
    named = [(name.split("/", 1)[1], loss) for name, loss in values.items() if name.startswith("val_loss/")]
    return text + "".join(f", {name} {loss:.4f}" for name, loss in named)


class Restored(NamedTuple):
    """One checkpoint of a run, without the optimizer's state."""

    graphdef: nnx.GraphDef
    config: RunConfig
    state: TrainState
    step: int

    @property
    def phase(self) -> Phase:
        """The phase that the checkpoint stands in."""
        return self.config.schedule.phases[self.phase_index]

    @property
    def phase_index(self) -> int:
        """By its step: phases that differ in their precision only may have come or gone since it was saved."""
        return self.config.schedule.index_at(max(0, self.step - 1))

    def dense_params(self) -> dict:
        """Parameters of the dense model: a baked copy where the phase's forward reads a weight sparse."""
        recipe = self.phase.recipe
        return phases.bake(self.state.params, self.state.method, recipe) if recipe.weights else self.state.params

    def scorers(self, *, sparse: bool) -> Iterator[tuple[str, Scorer]]:
        """The dense model, named "dense"; inside a sparse phase, if asked for, also "sparse" by the phase's recipe."""
        graphdef, config, state, _ = self
        yield "dense", Scorer(graphdef, config, self.dense_params(), state.method, Recipe.dense())
        if sparse and not self.phase.recipe.is_dense:
            yield "sparse", Scorer(graphdef, config, state.params, state.method, self.phase.recipe)


def split_source(source: str | Path) -> tuple[Path, int | None]:
    """`WORKDIR@STEP` as a folder and a step, `WORKDIR` with None for its newest; of an address a local copy.

    Raises:
      ValueError: an address that cannot be read, or holds no such checkpoint.
    """
    found = re.fullmatch(r"(.+)@(\d+)", str(source))
    if found is None or Path(source).is_dir():
        place, step = str(source), None
    else:
        place, step = found[1], int(found[2])
    if not is_remote(place):
        return Path(place), step
    remote = Remote(place, use="reading")
    remote.bring(step)
    return remote.local, step


def read_config(workdir: Path) -> RunConfig:
    """The configuration of the run in ``workdir``.

    Raises:
      ValueError: there is none.
    """
    saved = workdir / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"{workdir} holds no {CONFIG_FILE}: it is no workdir of train.main")
    return load_config([str(saved.resolve())])


def restore(source: str | Path, *, ema: bool = False) -> Restored:
    """The checkpoint `WORKDIR` (its newest) or `WORKDIR@STEP`; with ``ema`` the averaged weights in place of its last.

    Raises:
      ValueError: the workdir holds none, or none of that step, or the run kept no average.
    """
    workdir, step = split_source(source)
    config = read_config(workdir)
    if ema and config.optimizer.ema is None:
        raise ValueError(f"{workdir} has no averaged weights: its run had Optimizer.ema=None; leave out --ema")
    with checkpoint.Checkpoints(workdir, config.train.keep_checkpoints, writer=False) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"{workdir} holds no checkpoint yet")
        step = checkpoints.latest if step is None else step
        if step not in checkpoints.steps:
            raise ValueError(f"{workdir} holds no checkpoint of step {step}; it has {checkpoints.steps}")
        state = checkpoints.restore_state(abstract_state(config), step, optimizer=False)
    if state.ema is not None:
        state = replace(state, params=state.ema if ema else state.params, ema=None)
    return Restored(run_structure(config), config, state, step)


def report_validation(run: Restored, *, sparse: bool) -> None:
    """Prints loss and bits per byte on the validation split."""
    dataset = sources.open_split(run.config, "val")
    values = Evaluator(run.graphdef, run.config, dataset)(run.state, run.phase_index, sparse=sparse)
    print(f"step {run.step}: {describe(values)}")


def report_text(run: Restored, path: Path, *, text_field: str, sparse: bool) -> None:
    """Prints bits per byte of a file."""
    tokenizer = sources.open_split(run.config, "train").tokenizer
    for name, scorer in run.scorers(sparse=sparse):
        score = score_text(scorer, tokenizer, path, text_field=text_field, progress=sys.stderr.isatty())
        print(
            f"step {run.step}, {name}: {score.bits_per_byte:.4f} bits per byte (loss {score.loss:.4f}) of {path}: "
            f"{score.documents:,} documents, {score.tokens:,} tokens, {score.bytes:,} bytes"
        )
        for line in describe_skipped(score.skipped.record(), score.documents):
            print(line)


def _generate(run: Restored, params: dict, tokenizer: Tokenizer, prompt: Sequence[int], **options: Any) -> list[int]:
    """Tokens behind a prompt by the dense model, as lm-eval's tasks ask for them."""
    return sample(
        cached_model(run.graphdef, jnp.dtype(run.config.train.dtype)),
        (params, run.state.method),
        prompt,
        seq_len=run.config.train.seq_len,
        vocab_size=tokenizer.vocab_size,
        stop_id=tokenizer.eos_id,
        **options,
    )


def report_tasks(run: Restored, workdir: Path, tasks: Sequence[str], *, sparse: bool, **options: Any) -> None:
    """Prints lm-eval's table and writes its JSON as `WORKDIR/lm_eval-STEP-dense.json` (and `-sparse`)."""
    tokenizer = sources.open_split(run.config, "train").tokenizer
    for name, scorer in run.scorers(sparse=sparse):
        model_args = {"workdir": str(workdir), "step": run.step, "forward": name}
        writer = partial(_generate, run, run.dense_params(), tokenizer) if name == "dense" else None
        text, table = harness.run_tasks(scorer, tokenizer, tasks, model_args=model_args, generate=writer, **options)
        print(f"step {run.step}, {name}:\n{table}", flush=True)
        output = workdir / f"lm_eval-{run.step}-{name}.json"
        try:
            output.write_text(text)
        except OSError as error:
            raise ValueError(f"{output} cannot be written ({error.strerror}); the table above is all") from error
        print(f"written to {output}")
