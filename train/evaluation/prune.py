"""A trained model's feed-forward weights pruned to V:N:M and trained on: what `python -m train.prune` does."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from pallas_kernels.vnm.shapes import stored
from train.config.settings import LearningRate, Phases, RunConfig
from train.data.sources import open_data, open_split
from train.data.token_files import train_iterator
from train.evaluation import export, validation
from train.model.decoder import assemble
from train.state.optimizer import for_run
from train.step.step import make_gradients
from venom_jax import Pattern, Recipe, prune

Weights = dict[str, Array]
"""w1 [L, D, F] and w2 [L, F, D] of all layers, or something of the same shapes."""


class Pruned(NamedTuple):
    """Feed-forward weights as V:N:M along the contraction: W1^T [F, D] along D, W2^T [D, F] along F."""

    weights: Weights
    """Zero where nothing is stored."""
    masks: Weights
    energy: Float[Array, ""]
    """Share of the sum of squares of all weights that is stored."""


def parse_pattern(text: str) -> Pattern:
    """`V:N:M`, or `N:M` for a pattern that keeps all columns, stored as 64:N:4.

    Raises:
      ValueError: another form, or a pattern that cannot be stored.
    """
    parts = text.strip().split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) not in (2, 3) or (len(parts) == 2 and parts[1] != "4"):
        raise ValueError(f"--patterns has {text!r}; it must be V:N:M, such as 64:2:16, or 2:4")
    v, n, m = (64, *map(int, parts)) if len(parts) == 2 else map(int, parts)
    return Pattern(v=v, n=n, m=Fraction(m))


@partial(jax.jit, static_argnames=("pattern", "columns"))
def prune_weights(ffn: Weights, norms: Weights | None, *, pattern: Pattern, columns: prune.ColumnChoice) -> Pruned:
    """Prune every layer; norms: of the inputs of w1 [L, D] and of w2 [L, F], for activation-aware scores.

    Raises:
      ValueError: D or F is no multiple of pattern.m, or the pattern cannot be stored.
    """

    def one(w: Float[Array, "rows columns"], norm: Float[Array, " rows"] | None):
        packed = prune.vnm(w.T, pattern, columns=columns, input_norm=norm)
        return packed.to_dense().T, packed.mask().T

    found = {name: jax.lax.map(lambda layer: one(*layer), (w, norms and norms[name])) for name, w in ffn.items()}
    weights, masks = ({name: pair[i] for name, pair in found.items()} for i in range(2))
    kept, total = (sum(jnp.sum(jnp.square(w)) for w in tree.values()) for tree in (weights, ffn))
    return Pruned(weights, masks, jnp.asarray(kept / total))


def feed_forward(params: dict) -> Weights:
    """The weights that are pruned."""
    return {name: params["blocks"]["ffn"][name] for name in ("w1", "w2")}


def with_feed_forward(params: dict, weights: Weights) -> dict:
    """The parameters with these feed-forward weights."""
    blocks = params["blocks"]
    return params | {"blocks": blocks | {"ffn": blocks["ffn"] | weights}}


def input_norms(run: validation.Restored, params: dict, batches: list[Any]) -> Weights:
    """Norm of each input of w1 (the normed residual stream) and of w2 (relu(x W1)^2) over all tokens of the batches."""

    @jax.jit
    def squares(params, tokens):
        decoder = assemble(run.graphdef, params, run.state.method)
        dtype = jnp.dtype(run.config.train.dtype)
        _, _, inputs = decoder.hidden(tokens[:, :-1], recipe=Recipe.dense(), dtype=dtype, keep_ffn_inputs=True)

        def layer(scanned):
            x, w1 = scanned
            hidden = jnp.square(jax.nn.relu(x @ w1.astype(x.dtype)))
            return [jnp.sum(jnp.square(a.astype(jnp.float32)), axis=(0, 1)) for a in (x, hidden)]

        return jax.lax.map(layer, (inputs, params["blocks"]["ffn"]["w1"]))

    totals = [squares(params, batch) for batch in batches]
    return dict(zip(("w1", "w2"), (jnp.sqrt(sum(parts)) for parts in zip(*totals, strict=True)), strict=True))


def make_recovery_step(run: validation.Restored, config: RunConfig) -> Callable:
    """step(params, opt_state, masks, tokens) -> (params, opt_state, loss): dense AdamW under held masks, jitted."""
    optimizer, _ = for_run(config)
    gradients = make_gradients(run.graphdef, config)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, masks: Weights, tokens):
        grads, _, metrics = gradients(params, run.state.method, tokens, jax.random.key(0), recipe=Recipe.dense())
        # Masked before clipping: what is pruned must not shrink what is trained.
        grads = with_feed_forward(grads, _masked(feed_forward(grads), masks))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params: Any = optax.apply_updates(params, updates)
        return with_feed_forward(params, _masked(feed_forward(params), masks)), opt_state, metrics["loss"]

    return step


def _masked(weights: Weights, masks: Weights) -> Weights:
    return {name: jnp.where(masks[name], w, 0) for name, w in weights.items()}


class Session:
    """One checkpoint, pruned in several ways: what is compiled and read once."""

    def __init__(
        self,
        workdir: str,
        *,
        recovery_steps: int = 0,
        recovery_rate: float | None = None,
        calibration_batches: int = 0,
    ):
        """Open everything.  Raises ValueError where there is no checkpoint, or its data is gone."""
        self.run = validation.restore(workdir)
        config = self.run.config
        peak = config.learning_rate.peak / 10 if recovery_rate is None else recovery_rate
        self.recovery_steps = recovery_steps
        self.config = replace(
            config,
            learning_rate=LearningRate(peak, warmup=recovery_steps // 10, final_fraction=0.05),
            phases=Phases(),  # dense throughout
            train=replace(config.train, steps=max(recovery_steps, 1)),
        )
        self.train_data, val_data = open_data(config)
        self.params = self.run.dense_params()
        self._evaluator = validation.Evaluator(self.run.graphdef, config, val_data)
        self._step = make_recovery_step(self.run, self.config)
        batches = self._batches()
        self.norms = None
        if calibration_batches:
            taken = [next(batches)["tokens"] for _ in range(calibration_batches)]
            self.norms = input_norms(self.run, self.params, taken)

    def _batches(self) -> Any:
        """Training batches in an order of their own, the same for every pattern."""
        train = self.config.train
        return train_iterator(self.train_data, batch_size=train.batch_size, seq_len=train.seq_len, seed=train.seed + 1)

    def loss(self, params: dict) -> float:
        """Validation loss of the dense model with these parameters."""
        return self._evaluator.dense(params, self.run.state.method)["val_loss"]

    def recover(self, pruned: Pruned) -> dict:
        """The pruned model after the recovery's steps."""
        params = jax.tree.map(jnp.copy, with_feed_forward(self.params, pruned.weights))
        opt_state = for_run(self.config)[0].init(params)
        batches, loss = self._batches(), jnp.zeros(())
        for _ in tqdm(range(self.recovery_steps), desc="recovery", disable=None):
            params, opt_state, loss = self._step(params, opt_state, pruned.masks, next(batches)["tokens"])
        if not jnp.isfinite(loss):
            raise ValueError(f"the recovery's loss became {float(loss)}; lower --recovery_rate")
        return params

    def prune(self, pattern: Pattern, columns: prune.ColumnChoice) -> tuple[dict, dict[str, Any]]:
        """Parameters pruned (and recovered, if that was asked for), and the row of figures."""
        pruned = prune_weights(feed_forward(self.params), self.norms, pattern=pattern, columns=columns)
        params = with_feed_forward(self.params, pruned.weights)
        row: dict[str, Any] = {
            "pattern": str(pattern),
            "columns": columns,
            "scores": "magnitude" if self.norms is None else "activations",
            "density": float(pattern.density),
            "energy": round(float(pruned.energy), 4),
            "step": self.run.step,
            "val_loss_before": round(self.loss(self.params), 5),
            "val_loss_pruned": round(self.loss(params), 5),
        }
        if self.recovery_steps:
            params = self.recover(pruned)
            row |= {"recovery_steps": self.recovery_steps, "val_loss_recovered": round(self.loss(params), 5)}
        return params, row


def describe(row: dict[str, Any]) -> str:
    """The row in words."""
    text = (
        f"{row['pattern']} ({row['columns']}, {row['scores']}): {100 * row['energy']:.1f} % of the energy kept; "
        f"validation loss {row['val_loss_before']:.4f} before, {row['val_loss_pruned']:.4f} pruned"
    )
    if "val_loss_recovered" in row:
        text += f", {row['val_loss_recovered']:.4f} after {row['recovery_steps']} steps"
    return text


def run(
    workdir: str,
    patterns: Sequence[str],
    *,
    columns: prune.ColumnChoice = "l1",
    json_file: Path | None = None,
    output: Path | None = None,
    **options: Any,
) -> None:
    """Prunes to one pattern after another; options as in `Session`.

    Raises:
      ValueError: bad input, before anything is computed where that can be seen.
    """
    if not patterns:
        raise ValueError("--patterns is empty; give one or more, such as 64:2:16,2:4")
    parsed = [parse_pattern(text) for text in patterns]
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"--json={json_file}: there is no folder {json_file.parent}")
    if output is not None:
        if len(parsed) != 1:
            raise ValueError(f"--output takes one pattern, --patterns has {len(parsed)}; run it once for each")
        export.check_output(output)
    config = validation.read_config(validation.split_source(workdir)[0])
    model = config.model
    if output is not None:
        _ = open_split(config, "train").tokenizer  # goes with the model; raises where there is none
    for pattern in parsed:
        stored(model.d_ffn, model.d_model, pattern.v, pattern.m)
        stored(model.d_model, model.d_ffn, pattern.v, pattern.m)
        prune.check_choice(columns, pattern)
    session = Session(workdir, **options)
    rows = []
    for pattern in parsed:
        params, row = session.prune(pattern, columns)
        rows.append(row)
        print(describe(row), flush=True)
        if json_file is not None:
            json_file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        if output is not None:
            export.write(session.run, params, output, "float32")
