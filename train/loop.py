"""The run: everything is checked in ``prepare``, then ``train`` is one visible loop over optimizer steps."""

import contextlib
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from train.branch import branch
from train.command import print_warning
from train.config.settings import RunConfig, changed_bindings
from train.data.sources import Dataset, identity, open_data, verify
from train.data.token_files import train_iterator
from train.evaluation import validation
from train.evaluation.init_from import foreign_tokenizer, load_params
from train.evaluation.sampling import sample_text
from train.model.mesh import ONE_DEVICE, Layout, layout_of, mesh_shape
from train.records.logger import Logger, opening, summary
from train.records.metrics import cut_metrics, read_metrics
from train.records.plots import plot_run
from train.records.profiler import Profiler, parse_steps
from train.records.run_report import write_report
from train.records.wandb_run import require_wandb
from train.state import checkpoint
from train.state.memory import check_fits
from train.state.optimizer import decay_mask, learning_rate
from train.state.processes import first_alone, is_first
from train.state.remote import Remote
from train.state.run_info import read_starts, record_start
from train.state.state import TrainState, abstract_state, first_average, initial_state, run_structure
from train.state.workdir import VERIFIED, WorkdirLock, claim_workdir, set_aside_damaged
from train.step.guard import Watch
from train.step.step import make_diagnosis, make_ffn_inputs, make_train_step
from venom_jax import Recipe, StackRecipe, calibrate, phases
from venom_jax.dispatch import resolve_implementation


@dataclass(frozen=True)
class Run:
    """A run whose inputs have been checked; nothing has been compiled yet."""

    config: RunConfig
    workdir: Path
    train_data: Dataset
    val_data: Dataset
    checkpoints: checkpoint.Checkpoints
    fingerprint: dict[str, Any]
    lock: WorkdirLock | None  # the first process holds it
    layout: Layout
    profile_steps: range = range(0)
    params: dict | None = None  # to start from, where there is no checkpoint to continue
    changed: tuple[str, ...] = ()  # bindings that are not those of the last start


def prepare(
    config: RunConfig,
    workdir: Path,
    profile_steps: str | None = None,
    init_from: str | None = None,
    init_state: bool = False,
    remote: Remote | None = None,
) -> Run:
    """Opens and checks all that a run needs.  Raises ValueError or NotImplementedError with what to change.

    profile_steps: 'START:STOP', the steps to trace.  init_from: what a new run takes its weights from, see
    ``load_params``, or with init_state everything, see ``branch``; a run with a checkpoint goes on from that.
    remote: the address that ``workdir`` is the local copy of.
    """
    if init_state and init_from is None:
        raise ValueError("--init_state says what to take from --init_from=WORKDIR@STEP, which is missing")
    profiled = parse_steps(profile_steps, config.train.steps)
    resolve_implementation(config.train.implementation)
    learning_rate(config.learning_rate, config.train.steps)
    require_wandb(config.train.wandb)
    decay_mask(config.optimizer, abstract_state(config).params)
    layout = layout_of(config)
    if (warning := check_fits(config, *mesh_shape(config, jax.device_count()))) is not None and is_first():
        print_warning(warning)
    train_data, val_data = open_data(config)
    lock = first_alone(lambda: lock_workdir(workdir, remote))
    try:
        train = config.train
        checkpoints = checkpoint.Checkpoints(workdir, train.keep_checkpoints, train.keep_every, remote=remote)
        if init_state and checkpoints.latest is None:
            branch(str(init_from), workdir, checkpoint.fingerprint(config, identity(train_data)))
            checkpoints.reload()
        config, fingerprint = _check_continues(config, workdir, checkpoints, train_data)
        read_starts(workdir)  # refuses a damaged record now and not after the first steps
        starting = checkpoints.latest is None
        first_alone(lambda: verify(config, workdir / VERIFIED))
        params = None
        if starting and init_from is not None:
            params = load_params(init_from, config.model)
            if (line := foreign_tokenizer(init_from, config)) is not None and is_first():
                print_warning(line)
        changed = first_alone(lambda: save_config(workdir, config)) or ()
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return Run(config, workdir, train_data, val_data, checkpoints, fingerprint, lock, layout, profiled, params, changed)


def rehearse(config: RunConfig, workdir: Path | None) -> int:
    """Tells why a run would not begin, if so: the data are missing (exit code 0), or not the workdir's (2)."""
    try:
        data = open_data(config)[0]
    except ValueError as error:
        print(f"note            the run would stop: {error}")
        return 0
    if workdir is None or not (workdir / checkpoint.CHECKPOINTS).is_dir():
        return 0
    with checkpoint.Checkpoints(workdir, config.train.keep_checkpoints, writer=False) as checkpoints:
        try:
            _check_continues(config, workdir, checkpoints, data)
        except ValueError as error:
            print(f"note            the run would stop: {error}")
            return 2
    return 0


def _check_continues(
    config: RunConfig, workdir: Path, checkpoints: checkpoint.Checkpoints, data: Dataset
) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration with begun phases where they began, and its fingerprint; ValueError where it does not fit."""
    config = checkpoint.keep_begun(config, checkpoints.begun_phases())
    if (done := checkpoints.latest or 0) > config.train.steps:
        raise ValueError(
            f"Train.steps={config.train.steps}, but workdir {str(workdir)!r} has {done} steps; give more steps to go "
            "on, or for a shorter run another --workdir"
        )
    fingerprint = checkpoint.fingerprint(config, identity(data))
    checkpoints.check(fingerprint)
    return config, fingerprint


def lock_workdir(workdir: Path, remote: Remote | None = None) -> WorkdirLock:
    """Takes the workdir for this run, brings what is at its address and sets damaged checkpoints aside."""
    claim_workdir(workdir)
    lock = WorkdirLock(workdir)
    try:
        if remote is not None:
            remote.bring()
        for line in set_aside_damaged(workdir):
            print_warning(line)
    except BaseException:
        lock.release()
        raise
    return lock


def save_config(workdir: Path, config: RunConfig) -> tuple[str, ...]:
    """Writes the run's bindings, and gives those that the last start had not."""
    saved = workdir / validation.CONFIG_FILE
    changed = changed_bindings(saved.read_text(), config.text) if saved.exists() else ()
    saved.write_text(config.text)
    return changed


def train(run: Run) -> int:
    """Trains from the newest checkpoint, or from the start, to the end.  Returns the exit code.

    Raises:
      BadStepError: the guard stopped it; the newest checkpoint is from before.
    """
    config, settings, checkpoints, layout = run.config, run.config.train, run.checkpoints, run.layout
    graphdef = run_structure(config)
    iterator = train_iterator(
        run.train_data,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        seed=settings.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    start, masks, seconds, report = checkpoints.latest or 0, None, 0.0, {}
    if start:
        state, masks, seconds = checkpoints.restore(abstract_state(config, layout), iterator)
        # Phases that differ in their precision only may have come, or gone, since it was saved.
        phase = jax.device_put(np.int32(config.schedule.index_at(start - 1)), state.phase.sharding)
        state = replace(state, phase=phase)
    else:
        state, report = first_state(config, run.params, layout)
    first_alone(lambda: begin_records(run, start))

    train_step = make_train_step(graphdef, config, layout)
    diagnosis = make_diagnosis(graphdef, config, layout)
    evaluator = validation.Evaluator(graphdef, config, run.val_data, layout)
    logged = [(record["step"], record["loss"]) for record in read_metrics(run.workdir) if record["kind"] == "train"]
    watch = Watch(config, graphdef, logged)
    all_phases, phase_index = config.schedule.phases, int(state.phase)
    profiler = Profiler(run.profile_steps, run.workdir)
    logger = Logger(config, run.workdir, start, seconds, watch, layout.devices)
    with run.lock or contextlib.nullcontext(), StopRequest() as stop, checkpoints, profiler, logger:
        logger.say(opening(config, layout.devices))
        if start:
            logger.say(f"continuing {run.workdir} from step {start}, {all_phases[phase_index].label}")
            for line in run.changed:
                logger.say(f"changed binding: {line}")
        else:
            logger.begin_phase(0, 0, report)
        for step in range(start, settings.steps):
            if (index := config.schedule.index_at(step)) != phase_index:
                logger.flush()
                watch.settle(state, logger)
                state, report = switch_phase(state, config, index, layout)
                phase_index, masks = index, None  # the neurons that the masks speak of may have moved
                logger.begin_phase(step, index, report)
                logger.pause(step)

            profiler.before(step, state)
            tokens = layout.rows(next(iterator)["tokens"])
            state, metrics = train_step(state, tokens, *watch.begin(step, tokens))
            done = step + 1
            if profiler.after(step, state):
                logger.say(f"step {done}: trace of the last steps in {profiler.folder}")
                logger.pause(done)
            logger.log(done, phase_index, metrics)

            last, stopping = done == settings.steps, stop.asked(done)
            sampling = not last and has_sample(config) and is_due(done, settings.sample_every)
            diagnosing = is_due(done, settings.diagnosis_every)
            evaluating = last or is_due(done, settings.eval_every)
            saving = last or stopping or is_due(done, settings.checkpoint_every)
            if sampling or diagnosing or evaluating or saving:
                logger.flush()
            watch.settle(state, logger)  # raises before a state is saved that should have gone on
            if diagnosing:
                few = tokens[: settings.batch_size // settings.accumulation]
                recipe = all_phases[phase_index].recipe
                figures, masks = diagnosis(state.params, state.method, few, masks, recipe=recipe)
                logger.diagnosis(done, figures)
            if evaluating:
                logger.evaluation(done, evaluator(state, phase_index))
            if sampling:
                logger.sample(done, sample(run, graphdef, state))
            if saving:
                checkpoints.save(state, masks, iterator, step=done, fingerprint=run.fingerprint, seconds=logger.seconds)
            if sampling or diagnosing or evaluating or saving:
                logger.pause(done)
            if stopping and not last:
                logger.say(f"{stop.name}: saved step {done}; run again to continue")
                return stop.exit_code
        finish(run, logger, graphdef, state)
    return 0


def begin_records(run: Run, start: int) -> None:
    """Prepares the workdir's records for a start after ``start`` steps."""
    cut_metrics(run.workdir, start)
    if start < run.config.train.steps:
        record_start(run.workdir, run.config, start)


def is_due(step: int, every: int) -> bool:
    """Whether what happens ``every`` so many steps (0: never) is due after ``step`` steps."""
    return every > 0 and step % every == 0


def first_state(
    config: RunConfig, params: dict | None, layout: Layout = ONE_DEVICE
) -> tuple[TrainState, dict[str, float]]:
    """The state before the first step: random weights, or ``params``, made ready for the first phase's recipe."""
    state = initial_state(config, layout)
    if params is not None:
        state = layout.place(replace(state, params=params, ema=first_average(config, params)))
    if config.schedule.phases[0].recipe.is_dense:
        return state, {}
    return enter_phase(state, config, Recipe.dense(), 0, layout)


def switch_phase(
    state: TrainState, config: RunConfig, index: int, layout: Layout = ONE_DEVICE
) -> tuple[TrainState, dict[str, float]]:
    """The state at the start of phase ``index``, after another."""
    return enter_phase(state, config, config.schedule.phases[int(state.phase)].recipe, index, layout)


def enter_phase(
    state: TrainState, config: RunConfig, old: StackRecipe, index: int, layout: Layout
) -> tuple[TrainState, dict[str, float]]:
    """The state at the start of phase ``index``: clustered, scaled or baked as the change from ``old`` needs."""
    new = config.schedule.phases[index].recipe
    averages = [] if state.ema is None else [state.ema]
    options: dict[str, Any] = {"seed": config.train.seed, "rescale": config.phases.rescale}
    if calibrate.needs_inputs(old, new, config.model.layers, rescale=config.phases.rescale):
        options["inputs"] = {("blocks", "ffn"): sample_ffn_inputs(state, config, old, layout)}
    out = phases.transition(state.params, state.method, [state.opt_state], old, new, averages=averages, **options)
    changed = replace(
        state,
        params=out.params,
        method=out.method,
        opt_state=out.trees[0],
        phase=jnp.asarray(index, jnp.int32),
        ema=out.averages[0] if averages else None,
    )
    return layout.place(changed), out.report


def sample_ffn_inputs(state: TrainState, config: RunConfig, recipe: StackRecipe, layout: Layout) -> jax.Array:
    """What every FFN reads [L, T, D] in one microbatch of windows spread evenly over the data, the same each time."""
    train, dataset = config.train, open_data(config)[0]
    rows = train.batch_size // train.accumulation
    last = dataset.num_windows(train.seq_len) - 1
    tokens = dataset.windows(np.linspace(0, last, rows).astype(np.int64), train.seq_len)
    ffn_inputs = make_ffn_inputs(run_structure(config), config, layout)
    return ffn_inputs(state.params, state.method, layout.whole_rows(tokens), recipe=recipe)


def finish(run: Run, logger: Logger, graphdef: nnx.GraphDef, state: TrainState) -> None:
    """The summary line, a text sample and the plot, the last two also as files in the workdir."""
    settings = run.config.train
    text = sample(run, graphdef, state) if has_sample(run.config) else None  # by all processes together
    if not is_first():
        return
    values = summary(run.workdir)
    logger.end(settings.steps, values)
    if text is not None:
        (run.workdir / "sample.txt").write_text(text + "\n")
        logger.say(f"sample: {text}")
    plot_run(run.workdir, run.workdir / "loss.png")
    logger.say(f"loss curve: {run.workdir / 'loss.png'}")
    logger.say(f"report: {write_report(run.workdir)}")
    logger.say(
        f"done: {settings.steps} steps in {values['seconds']:.0f} s, training loss {values['train_loss_last_100']:.4f} "
        f"(mean of the last 100 steps), {validation.describe(values)}"
    )


def has_sample(config: RunConfig) -> bool:
    """Whether the run writes text samples; random tokens have no text."""
    return config.train.sample_tokens > 0 and not config.data.synthetic


def sample(run: Run, graphdef: nnx.GraphDef, state: TrainState) -> str:
    """A text by the dense model, the same for the same weights."""
    settings = run.config.train
    recipe = run.config.schedule.phases[int(state.phase)].recipe
    params = phases.bake(state.params, state.method, recipe) if recipe.weights else state.params
    return sample_text(
        graphdef, run.config, params, state.method, run.train_data.tokenizer, settings.sample_prompt,
        new_tokens=settings.sample_tokens, seed=settings.seed,
    )  # fmt: skip


class StopRequest:
    """Turns the first SIGTERM, SIGINT or SIGHUP into a flag, so that the loop can save; a second one acts as usual.

    A SIGHUP that is ignored, as under nohup, stays ignored.

    With several processes jax.distributed catches SIGTERM in any of them and finds a step at which all can stop.
    """

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        caught = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else []
        if caught and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            caught.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def asked(self, step: int) -> bool:
        """Whether to save and stop after ``step`` steps; all processes get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @property
    def name(self) -> str:
        return "" if self.signal is None else signal.Signals(self.signal).name

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: Any) -> None:
        self._restore()

    @property
    def exit_code(self) -> int:
        """0 on SIGTERM, which asks for just this; 128 + number on the others, as shells expect."""
        return 0 if self.signal in (None, signal.SIGTERM) else 128 + self.signal
