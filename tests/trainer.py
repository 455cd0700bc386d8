"""A model and a corpus so small that a whole run of the trainer takes seconds."""

import functools
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from train import loop
from train.config.settings import Data, LearningRate, Model, Optimizer, Phases, RunConfig, Train, load_config
from train.data.prepare import prepare
from train.evaluation import validation
from train.model import decoder
from train.records.metrics import read_metrics
from train.state.checkpoint import Checkpoints
from train.state.state import abstract_state

MODEL = Model(vocab_size=320, d_model=32, d_ffn=64, layers=2, heads=2)
TRAIN = Train(
    steps=12,
    batch_size=8,
    seq_len=16,
    dtype="float32",
    eval_every=6,
    eval_batches=2,
    checkpoint_every=6,
    sample_tokens=5,
)

# Runs of the same configuration in one process share its programs: to trace one takes longer than such a run computes.
# That another process finds the same bits is for test_resume's kill to show.
for _module, _maker in (
    (loop, "make_train_step"),
    (loop, "make_diagnosis"),
    (loop, "make_ffn_inputs"),
    (validation, "make_eval_step"),
):
    setattr(_module, _maker, functools.lru_cache(maxsize=8)(getattr(_module, _maker)))


@functools.cache
def token_folder() -> Path:
    """A prepared folder of a few thousand tokens, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="tokens-"))
    source = folder / "text"
    source.mkdir()
    rng = random.Random(0)
    subjects, verbs = ["the cat", "a dog", "my house", "the state"], ["sees", "was", "likes", "is not"]
    for split, count in (("train", 400), ("val", 60)):
        lines = [f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(subjects)}." for _ in range(count)]
        (source / f"{split}.txt").write_text("\n".join(lines))
    prepare(
        [source / "train.txt"],
        folder / "tokens",
        validation=[source / "val.txt"],
        vocab_size=300,
        progress=False,
    )
    return folder / "tokens"


def run_config(
    *,
    shape: dict[str, Any] | None = None,
    phases: Any = ((0, "dense"),),
    data: Data | None = None,
    optimizer: dict[str, Any] | None = None,
    **train: Any,
) -> RunConfig:
    """The small run with some fields of its model, its data, its optimizer and its training changed."""
    return RunConfig(
        model=replace(MODEL, **(shape or {})),
        data=data or Data(str(token_folder())),
        optimizer=Optimizer(**(optimizer or {})),
        learning_rate=LearningRate(peak=1e-2, warmup=2),
        phases=Phases(phases),
        train=replace(TRAIN, **train),
    )


def gin_bindings(**overrides: Any) -> list[str]:
    """The same small run as gin bindings, keyed Class_field."""
    values = {f"Model.{name}": value for name, value in vars(MODEL).items()}
    values |= {f"Train.{name}": value for name, value in vars(TRAIN).items()}
    values |= {"Data.folder": str(token_folder()), "LearningRate.peak": 1e-2, "LearningRate.warmup": 2}
    values |= {name.replace("_", ".", 1): value for name, value in overrides.items()}
    return [f"{name} = {value!r}" for name, value in values.items()]


def build(shape: Model, max_experts: int, seed: int) -> tuple[nnx.GraphDef, dict, dict]:
    """Structure, parameters and method's state of a model."""
    params, method = jax.jit(lambda key: decoder.initial(shape, max_experts, key))(jax.random.key(seed))
    return decoder.structure(shape, max_experts), params, method


def run_to_end(config: RunConfig, workdir: Path) -> int:
    """Trains in ``workdir`` and returns the exit code."""
    return loop.train(loop.prepare(config, workdir))


@functools.cache
def three_phases() -> tuple[RunConfig, Path, Any]:
    """(config, workdir, jitted step) of one whole run, made once per process: do not write into its workdir.

    The phases change after 4 and 8 of 12 steps; the router's bias moves; every step is saved.
    """
    bindings = gin_bindings(
        Train_checkpoint_every=1, Train_keep_checkpoints=100, Train_eval_every=3, Train_diagnosis_every=3
    )
    routed = ["routed/Recipe.preset = 'venom'", "routed/Recipe.balance_rate = 0.01"]
    schedule = "Phases.schedule = [(0, 'dense'), (4, @routed/Recipe()), (8, 'dense')]"
    config = load_config([], [*bindings, *routed, schedule])  # from gin, so that the workdir can be opened again
    workdir, steps = Path(tempfile.mkdtemp(prefix="run-")), []
    with pytest.MonkeyPatch.context() as patch:
        original = loop.make_train_step
        patch.setattr(loop, "make_train_step", lambda *args: steps.append(original(*args)) or steps[-1])
        assert run_to_end(config, workdir) == 0
    return config, workdir, steps[0]


def records(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of metrics.jsonl without what depends on the clock."""
    timed = {"time", "tokens_per_second", "seconds"}
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in read_metrics(workdir)
        if kind in (None, record["kind"])
    ]


def final_state(config: RunConfig, workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by its path."""
    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        leaves = jax.tree_util.tree_leaves_with_path(checkpoints.restore_state(abstract_state(config)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every array equal bit for bit; names those that are not."""
    assert found.keys() == expected.keys()
    differing = [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    assert not differing
