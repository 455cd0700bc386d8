"""What a run says about itself: a line and a record per step, phases, evaluations, and the summary at its end."""

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import jax

from train.config.precision import uses_fp8
from train.config.settings import RunConfig
from train.evaluation.validation import describe
from train.model import decoder
from train.model.mesh import check_divisible, mesh_shape
from train.records.metrics import MetricsWriter, NoWriter, Progress, peak_flops, peak_memory, read_metrics
from train.records.wandb_run import WandbRun
from train.state.memory import estimate
from train.state.processes import is_first
from train.step.guard import Watch
from venom_jax import Recipe, StackRecipe
from venom_jax.dispatch import choose_kernels


class Throughput:
    """Tokens per second between two logged steps, without the time spent on anything else."""

    def __init__(self, tokens_per_step: int, step: int):
        self._tokens_per_step = tokens_per_step
        self.restart(step)

    def restart(self, step: int) -> None:
        """Leaves out the time since the last measurement: an evaluation, a checkpoint."""
        self._step, self._time = step, time.monotonic()

    def measure(self, step: int) -> float:
        """Tokens per second of the steps since the last measurement."""
        now, steps = time.monotonic(), step - self._step
        elapsed = max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return steps * self._tokens_per_step / elapsed


class Logger:
    """Writes metrics.jsonl, TensorBoard events and the progress bar.

    Metrics of a step are fetched when the next step has been dispatched, so that the device never waits for the host.
    """

    def __init__(self, config: RunConfig, workdir: Path, start: int, seconds: float, watch: Watch, devices: int = 1):
        """start, seconds: steps completed and time taken so far.  watch: judges the metrics.  devices: of the run."""
        train = config.train
        self._config, self._watch = config, watch
        silent, first = NoWriter(seconds=seconds), is_first()
        mirror = WandbRun(train.wandb, workdir, config.text) if first and train.wandb is not None else None
        self._writer = MetricsWriter(workdir, step=start, seconds=seconds, mirror=mirror) if first else silent
        self._progress = Progress(train.steps, start) if first else silent
        self._throughput = Throughput(train.batch_size * train.seq_len, start)
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None
        options = {"fp8_head": train.fp8_head}
        self._dense_flops = decoder.flops_per_token(config.model, train.seq_len, Recipe.dense())
        self._flops = {
            recipe: decoder.compute_flops_per_token(config.model, train.seq_len, recipe, **options)
            for recipe in config.schedule.recipes
        }
        self._peak = peak_flops(devices)
        self._step = start

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.close()
        self._writer.close()

    @property
    def seconds(self) -> float:
        """Time since the start of the run, over all its resumes."""
        return self._writer.seconds

    def say(self, text: str) -> None:
        """Prints a line."""
        self._progress.say(text)

    def log(self, step: int, phase_index: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step that made ``step`` steps complete; writes those of the step before."""
        pending, self._pending = self._pending, (step, phase_index, metrics)
        if pending is not None:
            self._write_step(*pending)

    def flush(self) -> None:
        """Writes what is pending."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._write_step(*pending)

    def pause(self, step: int) -> None:
        """Says that the time since the last step was not spent on training."""
        self._throughput.restart(step)

    def begin_phase(self, step: int, index: int, report: dict[str, float]) -> None:
        """Records that phase ``index`` begins after ``step`` steps."""
        label = self._config.schedule.phases[index].label
        self._writer.write("phase", step, phase=label, phase_index=index, report=report)
        details = "".join(f", {name} {value:.4g}" for name, value in report.items())
        self.say(f"step {step}: {label} begins{details}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Records validation figures."""
        self._writer.write("eval", step, **values)
        self.say(f"step {step}: {describe(values)}")

    def sample(self, step: int, text: str) -> None:
        """Records a text that the model wrote."""
        self._writer.write("sample", step, text=text)
        self.say(f"step {step}: sample: {text}")

    def diagnosis(self, step: int, figures: dict[str, jax.Array]) -> None:
        """Records each figure: its mean over the layers, and under ``layers`` that of every layer."""
        layers = {name: [float(layer) for layer in value] for name, value in jax.device_get(figures).items()}
        means = {name: fmean(values) for name, values in layers.items()}
        self._writer.write("diagnosis", step, **means, layers=layers)

    def bad_step(self, step: int, *, skipped: bool, **values: str) -> None:
        """Records a step that did not count."""
        self._writer.write("bad_step", step, skipped=skipped, **values)
        done = "left out" if skipped else "stopping"
        self.say(f"step {step}: {done}, {', '.join(f'{name} {value}' for name, value in values.items())}")

    def end(self, step: int, values: dict[str, Any]) -> None:
        """Records the summary."""
        self._writer.write("end", step, **values)

    def _write_step(self, step: int, phase_index: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not self._watch.accepts(step, values["loss"], values["grad_norm"]):
            return
        train = self._config.train
        if step % train.log_every and step != train.steps:
            return
        self._watch.learn(step, values["loss"])
        phase = self._config.schedule.phases[phase_index]
        if not (phase.recipe.routed or self._config.model.experts):
            values = {name: value for name, value in values.items() if not name.startswith("load_")}
        rate = self._throughput.measure(step)
        values["tokens_per_second"] = round(rate, 1)
        utilisation = ""
        if self._peak:
            # Of the peak for 16 bits; executed operations on eight bits count half, as their peak is twice that.
            values["mfu_dense"] = rate * self._dense_flops / self._peak
            values["mfu_executed"] = rate * self._flops[phase.recipe] / self._peak
            utilisation = f", MFU {values['mfu_dense']:.1%} dense-equivalent {values['mfu_executed']:.1%} executed"
        if (peak := peak_memory()) is not None:
            values["peak_memory_gib"] = round(peak / 2**30, 3)
            utilisation += f", {values['peak_memory_gib']:.1f} GiB"
        self._writer.write("train", step, **values, phase=phase.label, phase_index=phase_index)
        self._progress.update(step, f"loss {values['loss']:.4f}, {rate:,.0f} tokens/s{utilisation}, {phase.label}")


def opening(config: RunConfig, devices: int) -> str:
    """The first line of a run: what is trained on what, and which sparse phases have no kernels here."""
    shape, train = config.model, config.train
    active = f", {decoder.active_parameter_count(shape):,} of them active," if shape.experts else ""
    text = f"{decoder.parameter_count(shape):,} parameters{active} on {devices} x {jax.devices()[0].device_kind}"

    def has_kernels(recipe: Recipe) -> bool:
        sizes = (shape.d_model, shape.expert_neurons, train.dtype)
        plain = recipe.is_dense and not recipe.in_fp8
        return plain or choose_kernels(train.implementation, recipe, *sizes, local=True) is not None

    phases = {
        phase.label: [part for _, _, part in phase.recipe.parts(shape.layers)] for phase in config.schedule.phases
    }
    without = [label for label, parts in phases.items() if not all(map(has_kernels, parts))]
    if without:
        rounded = [label for label in without if any(part.in_fp8 for part in phases[label])]
        masked = [label for label in without if label not in rounded]
        if masked:
            text += f"; as dense products with masks, no sparse kernels: {', '.join(masked)}"
        if rounded:
            text += f"; as products of rounded operands, no kernels of eight bits: {', '.join(rounded)}"
    elif not all(part.is_dense for parts in phases.values() for part in parts):
        text += "; with sparse kernels"
    return f"{text}; the first step compiles"


def plan(config: RunConfig) -> str:
    """What a run would do: parameters, FLOPs, batch, devices and their memory, phases.

    Devices are those that ``Mesh`` names, whether they are there or not; where it leaves them open, those that are.

    Raises:
      ValueError: batch or model do not divide among them.
    """
    train = config.train
    data, fsdp = mesh_shape(config, jax.device_count())
    check_divisible(config, data, fsdp)
    tokens = train.batch_size * train.seq_len

    def flops(recipe: StackRecipe) -> float:
        return decoder.flops_per_token(config.model, train.seq_len, recipe)

    def executed(recipe: StackRecipe) -> str:
        shapes = (config.model, train.seq_len, recipe)
        share = 2 - 2 * decoder.compute_flops_per_token(*shapes, fp8_head=train.fp8_head) / flops(recipe)
        text = f"executes {flops(recipe) / dense_flops:.1%} of the dense FLOPs"
        return f"{text}, {share:.1%} of them on eight bits" if uses_fp8(recipe) else text

    dense_flops = flops(Recipe.dense())
    count = decoder.parameter_count(config.model)
    active = f"{decoder.active_parameter_count(config.model):,} active, " if config.model.experts else ""
    lines = [
        f"parameters      {count:,} ({active}{count * 12 / 2**30:.2f} GiB with two moments, float32)",
        f"batch           {train.batch_size} x {train.seq_len} = {tokens:,} tokens, accumulation {train.accumulation}",
        f"devices         {data * fsdp} (Mesh.data={data} x Mesh.fsdp={fsdp})",
        f"memory          {estimate(config, data, fsdp)}",
        f"steps           {train.steps:,} ({train.steps * tokens:,} tokens)",
        f"dense FLOPs     {dense_flops:.4g} a token, {dense_flops * tokens:.4g} a step",
    ]
    ends = [phase.start for phase in config.schedule.phases[1:]] + [train.steps]
    for phase, end in zip(config.schedule.phases, ends, strict=True):
        lines.append(f"phase           steps {phase.start:,} to {end:,}: {phase.label}, {executed(phase.recipe)}")
    return "\n".join(lines)


def summary(workdir: Path) -> dict[str, Any]:
    """Last validation figures, mean training loss of the last 100 steps, steps and seconds, from metrics.jsonl."""
    records = read_metrics(workdir)
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    figures = {name: value for name, value in evaluations[-1].items() if name.startswith("val_")}
    return figures | {"train_loss_last_100": fmean(losses[-100:]), "seconds": records[-1]["time"]}
