"""Checkpoints: what is saved, when it is safe to continue from one, and the workdir it lives in.

A step's folder appears under its final name only when it is complete (orbax writes elsewhere and renames), so a
kill at any moment leaves the previous one.
"""

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from train.config.settings import Model, Optimizer, RunConfig
from train.state.processes import first_alone, is_first
from train.state.remote import Remote
from train.state.state import TrainState
from train.state.workdir import CHECKPOINTS, damage, forget_checksums, write_checksums
from venom_jax import LayerRecipes, StackRecipe
from venom_jax.stats import WeightMasks, weight_masks

FORMAT = 1  # of what a checkpoint holds; counts up when an older program could not read it, or misread it
# Optimizer fields that decide what arrays its state has.
_STATE_FIELDS = ("ema", "first_moment_dtype", "kind")
_ROUTER = "room for a learned router"
_RESCALED = ", rescaled"


def fingerprint(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What decides whether a checkpoint belongs to a run: the model, the data's order, the phases, the state's arrays.

    ``data`` identifies the token files.  Values are JSON, as they are compared with what a checkpoint recorded.
    """
    train = config.train
    values = {f"Model.{name}": value for name, value in vars(config.model).items()}
    values |= {f"Optimizer.{name}": getattr(config.optimizer, name) for name in _STATE_FIELDS}
    values["Optimizer.clip is a number"] = config.optimizer.clip is not None
    values |= {f"Train.{name}": getattr(train, name) for name in ("batch_size", "seq_len", "seed")}
    values |= {f"data.{name}": value for name, value in data.items()}
    values["largest number of experts"] = config.max_experts
    values[_ROUTER] = config.learned_router
    phases = [[phase.start, text] for phase, text in zip(config.bound.phases, _phase_texts(config), strict=True)]
    return json.loads(json.dumps(values | {"phases": phases}))


def _phase_texts(config: RunConfig) -> list[str]:
    rescaled = _RESCALED if config.phases.rescale else ""
    return [describe(phase.recipe) + (rescaled if phase.start else "") for phase in config.bound.phases]


def keep_begun(config: RunConfig, begun: Sequence[tuple[int, str]]) -> RunConfig:
    """The run with the starts that phases had when they began: a fraction of Train.steps moves with Train.steps.

    begun: `Checkpoints.begun_phases`.  Starts given as steps, and phases to come, are left as they are.
    """
    entries = list(config.phases.schedule)
    for i, ((start, text), wanted) in enumerate(zip(begun, _phase_texts(config), strict=False)):
        if text == wanted and isinstance(entries[i][0], float):
            entries[i] = (start, entries[i][1])
    schedule = tuple(entries)
    if schedule == config.phases.schedule:
        return config
    return dataclasses.replace(config, phases=dataclasses.replace(config.phases, schedule=schedule))


def describe(recipe: StackRecipe) -> str:
    """The recipe in words that outlast new fields of `Recipe`: later ones are named only where they are set.

    Precision, as `Train.dtype`, is no part of what a run is: it may change from one start to the next.
    """
    if isinstance(recipe, LayerRecipes):
        texts = [(first, describe(part)) for first, part in recipe.starts]
        texts = [own for i, own in enumerate(texts) if i == 0 or own[1] != texts[i - 1][1]]
        return texts[0][1] if len(texts) == 1 else f"LayerRecipes({', '.join(f'{a}: {text}' for a, text in texts)})"
    values = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe) if item.name != "precision"}
    named = {name: value for name, value in values.items() if _LATER_FIELDS.get(name, ...) != value}
    return f"Recipe({', '.join(f'{name}={value!r}' for name, value in named.items())})"


# Fields of Recipe that older checkpoints do not name, with the defaults these had.
_LATER_FIELDS = {"weight_mask": "threshold", "shared": 0, "clustering": "kmeans", "token_copy": "kept"}


def _check_same_run(workdir: Path, saved: dict[str, Any], wanted: dict[str, Any], step: int) -> None:
    def past(values):
        phases = [phase for phase in values["phases"] if phase[0] < step]
        # One that differs from the one before in nothing but its precision goes on with it.
        kept = [own for i, own in enumerate(phases) if i == 0 or _plain(own[1]) != _plain(phases[i - 1][1])]
        return values | {"phases": kept}

    unknown = {name: wanted[name] for name in (_ROUTER, "data.sha256") if name in wanted}
    saved, wanted = past(_EARLIER | unknown | saved), past(wanted)
    differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    if differing:
        parts = [f"{name} is {saved.get(name)!r} there and {wanted.get(name)!r} here" for name in differing]
        if "phases" in differing:
            parts[differing.index("phases")] = _differing_phase(saved["phases"], wanted["phases"])
        raise ValueError(
            f"workdir {str(workdir)!r} holds a different run at step {step}: {', '.join(parts)}; "
            "use the configuration it was started with (config.gin there), or for a new run another --workdir"
        )


def _plain(text: str) -> str:
    return text.removesuffix(_RESCALED)


def _differing_phase(saved: list, wanted: list) -> str:
    """In words, the first of two runs' phases, (start, description of the recipe), that is not the same in both."""
    pairs = enumerate(zip_longest(saved, wanted), 1)
    number, (there, here) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    if here is None:
        return f"Phases.schedule has a phase that begins at step {there[0]} only there"
    if there is None:
        return f"Phases.schedule has a phase that begins at step {here[0]} only here"
    if there[0] != here[0]:
        return (
            f"phase {number} of Phases.schedule begins at step {there[0]} there and {here[0]} here (a start that is a "
            "fraction moves with Train.steps: give it as a step)"
        )
    fields = [dict(re.findall(r"(\w+)=(.*?)(?=, \w+=|\)$)", text)) for _, text in (there, here)]
    names = [name for name in fields[0] | fields[1] if fields[0].get(name) != fields[1].get(name)]
    if any(text.startswith("LayerRecipes") for _, text in (there, here)) or not names:
        return f"phase {number} of Phases.schedule is {there[1]} there and {here[1]} here"
    listed = ", ".join(f"{name}={fields[0].get(name)} there and {fields[1].get(name)} here" for name in names)
    return f"phase {number} of Phases.schedule, which begins at step {here[0]}, has {listed}"


_LATER_SHAPE = (
    *("qk_norm", "document_start", "gated", "activation", "clamp", "experts", "experts_per_token", "shared_experts"),
    *("rope_factor", "rope_original_length", "rope_fast", "rope_slow", "rope_attention_factor"),
    *("d_expert", "expert_scores", "expert_balance_rate", "expert_balance_loss", "expert_z_loss"),
)
# Fields that checkpoints may lack because they are older: these had the default.
_EARLIER = {
    f"{kind.__name__}.{item.name}": item.default
    for kind, names in ((Model, _LATER_SHAPE), (Optimizer, _STATE_FIELDS))
    for item in dataclasses.fields(kind)
    if item.name in names
} | {"Optimizer.clip is a number": True}


class CheckpointError(Exception):
    """A checkpoint could not be written or read; those before it are intact."""


class DamagedCheckpointError(CheckpointError, ValueError):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self, workdir: Path, keep: int, keep_every: int = 0, *, writer: bool = True, remote: Remote | None = None
    ):
        """The newest ``keep`` stay, and those of steps that are multiples of ``keep_every`` (0: none).

        writer: False for who only reads, perhaps beside a run that is just writing one.  remote: what is complete is
        sent there.
        """
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.workdir = workdir
        self._remote = remote
        self._writing: tuple[int, Future[None]] | None = None
        self._failed = False
        self._executor = ThreadPoolExecutor(1, "checksums")
        self._checkpointer = ocp.training.Checkpointer(
            str((workdir / CHECKPOINTS).absolute()),  # orbax takes no relative path
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyrefly: ignore[bad-argument-type]
            cleanup_tmp_directories=writer,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._checkpointer.reload()

    def check(self, wanted: dict[str, Any], step: int | None = None) -> None:
        """Raises ValueError, naming what differs, if the newest checkpoint (or a step's) is not one to continue."""
        step = self.latest if step is None else step
        if step is not None:
            _check_same_run(self.workdir, self._metadata(step)["fingerprint"], wanted, step)

    def begun_phases(self) -> list[tuple[int, str]]:
        """Start and description of each phase that had begun at the newest checkpoint."""
        if (step := self.latest) is None:
            return []
        return [(start, text) for start, text in self._metadata(step)["fingerprint"]["phases"] if start < step]

    def _metadata(self, step: int | None) -> dict[str, Any]:
        metadata = self._checkpointer.metadata(step).custom_metadata
        if not isinstance(metadata, dict) or "fingerprint" not in metadata:
            raise ValueError(f"{self.workdir / 'checkpoints'} holds checkpoints that train.main did not write")
        if metadata.get("format", FORMAT) != FORMAT:  # the first ones did not say it
            raise ValueError(
                f"the checkpoints in {self.workdir} have format {metadata['format']}, this version reads {FORMAT}; use "
                "another version of venom-jax"
            )
        return metadata

    def save(
        self,
        state: TrainState,
        masks: WeightMasks | None,
        iterator: Any,
        *,
        step: int,
        fingerprint: dict[str, Any],
        seconds: float,
    ) -> None:
        """Starts writing; returns once the arrays are out of the next step's reach.

        masks: weight masks of the last diagnosis, or None.  seconds: training time so far.

        Raises:
          CheckpointError: the one before could not be written.
        """
        self.wait()
        first_alone(lambda: forget_checksums(self.workdir, step))
        arrays = {"state": state} if masks is None else {"state": state, "masks": masks}
        if jax.default_backend() == "cpu":
            # On CPU the writer would share the buffers that the next step overwrites (its state is donated).
            arrays = jax.tree.map(jnp.copy, arrays)
        try:
            response = self._checkpointer.save_checkpointables_async(
                step,
                arrays | {"data": _Position(iterator)},
                force=True,
                custom_metadata={
                    "format": FORMAT,
                    "fingerprint": fingerprint,
                    "seconds": seconds,
                    "masks": masks is not None,
                },
            )
        except (OSError, ValueError) as error:
            raise self._failure(step, error) from error
        self._writing = step, self._executor.submit(self._seal, step, response)

    def wait(self) -> None:
        """Waits until what was saved is written, and records its checksums.

        Raises:
          CheckpointError: it could not be written, as on a full disk.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        step, sealed = writing
        try:
            sealed.result()
        except (OSError, ValueError) as error:  # a full disk is an OSError of Python or a ValueError of tensorstore
            raise self._failure(step, error) from error

    def _seal(self, step: int, response: Any) -> None:
        response.result()
        if is_first():
            write_checksums(self.workdir, step)
            if self._remote is not None:
                self._remote.send(step)

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        self._failed = True
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.workdir}: {reason}. Earlier checkpoints are "
            "intact; make room or repair the disk, then run the same command to continue from them"
        )

    def restore(self, state: TrainState, iterator: Any) -> tuple[TrainState, WeightMasks | None, float]:
        """(state, masks or None, seconds of training so far) of the newest; moves ``iterator`` to its position.

        ``state`` gives shapes and dtypes, and the places if it has any.

        Raises:
          DamagedCheckpointError: it cannot be read.
        """
        metadata = self._metadata(self.latest)
        wanted = {"state": _abstract(state), "data": _Position(iterator)}
        if metadata["masks"]:
            ffn = state.params["blocks"]["ffn"]
            masks = jax.eval_shape(jax.vmap(weight_masks), ffn["w1"], ffn["w2"])
            wanted["masks"] = _abstract(masks, state.step.sharding)
        loaded = self._load(self.latest, wanted)
        return loaded["state"], loaded.get("masks"), metadata["seconds"]

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in order."""
        return [saved.step for saved in self._checkpointer.checkpoints]

    def restore_state(self, state: TrainState, step: int | None = None, *, optimizer: bool = True) -> TrainState:
        """The state alone, of ``step`` or the newest; without the optimizer's (None in its place) a third of it.

        Raises:
          DamagedCheckpointError: its files have other checksums than when they were written, or it cannot be read.
        """
        step = self.latest if step is None else step
        if step is not None and (what := damage(self.workdir, step)) is not None:
            raise self._damaged(step, what)
        wanted = _abstract(state)
        if not optimizer:
            left_out = jax.tree.map(lambda _: ocp.PLACEHOLDER, wanted.opt_state)
            wanted = replace(wanted, opt_state=left_out)
        loaded = self._load(step, {"state": wanted})["state"]
        return loaded if optimizer else replace(loaded, opt_state=None)

    def _load(self, step: int | None, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, wanted)
        except (KeyError, OSError, ValueError) as error:
            # Where a file is missing or short orbax raises a KeyError that speaks of its handlers.
            reason = "files are missing or incomplete" if isinstance(error, KeyError) else str(error)[:200]
            raise self._damaged(step, f"it cannot be read: {reason}") from error

    def _damaged(self, step: int | None, what: str) -> DamagedCheckpointError:
        others = ", ".join(str(other) for other in self.steps if other != step) or "none"
        return DamagedCheckpointError(
            f"the checkpoint of step {step} in {self.workdir} is damaged ({what}); move "
            f"{self.workdir / CHECKPOINTS / str(step)} away to use another (steps: {others})"
        )

    def close(self) -> None:
        """Waits until everything is written.  Raises CheckpointError if it could not be."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            # After a failed save orbax raises it once more here, which would hide our message.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Position:
    """Where the data iterator stands, the same in all processes: one file, so that their number may change."""

    FILE = "process_0-of-1.json"  # as grain calls it where there is one process

    def __init__(self, iterator: Any):
        self._iterator = iterator

    async def save(self, directory: Any) -> Awaitable[None]:
        state = json.dumps(self._iterator.get_state(), indent=4)

        async def write():
            folder = await directory.await_creation()
            if is_first():
                await asyncio.to_thread((folder / self.FILE).write_text, state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read():
            self._iterator.set_state(json.loads(await asyncio.to_thread((directory / self.FILE).read_text)))

        return read()


def _abstract(tree: Any, place: jax.sharding.Sharding | None = None) -> Any:
    """Shapes and dtypes, and where to load to: where a leaf says, or ``place``, or the first device."""
    place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or place),
        tree,
    )
