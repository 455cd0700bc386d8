"""What a run writes down: metrics.jsonl, TensorBoard events, the progress bar, and the device's peak."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"

# Dense bfloat16 tensor-core FLOP/s by jax's device kind (vendors' data sheets); others report no utilisation.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices: int) -> float | None:
    """Peak of so many devices together, or None where it is not known."""
    one = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if one is None else one * devices


def peak_memory() -> int | None:
    """Most bytes in use at a time so far on the local device that used most, or None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one), default=None)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a line cut off by a kill is left out."""
    records = []
    path = workdir / METRICS_FILE
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def last_record(workdir: Path) -> dict[str, Any] | None:
    """The newest complete record of metrics.jsonl, read from its end; None without one."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None


def cut_metrics(workdir: Path, step: int) -> None:
    """Drops what the steps after a checkpoint wrote, so that each step is there once after a resume.

    A phase that starts at ``step`` goes too: the checkpoint is from before the switch, which happens again, and a run
    without a checkpoint begins its first phase again.
    """
    kept = [
        record
        for record in read_metrics(workdir)
        if record["step"] <= step
        and record["kind"] != "end"
        and not (record["kind"] == "phase" and record["step"] == step)
    ]
    path = workdir / METRICS_FILE
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
    rewritten.replace(path)


class Mirror(Protocol):
    """Another place for the numbers."""

    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends records to metrics.jsonl and their numbers to TensorBoard events."""

    def __init__(self, workdir: Path, *, step: int, seconds: float, mirror: Mirror | None = None):
        """step, seconds: where the run stands, both 0 for a new one.  mirror: also gets the numbers."""
        self._mirror = mirror
        self._file: TextIO = (workdir / METRICS_FILE).open("a")
        self._events = EventFileWriter(str(workdir / "tensorboard"))
        self._offset = seconds - time.monotonic()
        if step:
            # Tells TensorBoard to drop what an interrupted run wrote beyond this step.
            restart = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=restart))

    @property
    def seconds(self) -> float:
        """Time since the start of the run, over all its resumes."""
        return self._offset + time.monotonic()

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """One record; step is the number of optimizer steps completed."""
        record = {"step": step, "kind": kind, "time": round(self.seconds, 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        if self._mirror is not None:
            self._mirror.log(numbers, step)
        return record

    def close(self) -> None:
        self._file.close()
        self._events.close()
        if self._mirror is not None:
            self._mirror.close()


class NoWriter:
    """In the place of a `MetricsWriter` and a `Progress` in all processes but the first."""

    def __init__(self, *, seconds: float):
        self._offset = seconds - time.monotonic()

    @property
    def seconds(self) -> float:
        """As the writer's."""
        return self._offset + time.monotonic()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes nothing."""

    def update(self, step: int, text: str) -> None:
        """Shows nothing."""

    def say(self, text: str) -> None:
        """Prints nothing."""

    def close(self) -> None:
        pass


class Progress:
    """A progress bar on a terminal, a line every ``interval`` seconds elsewhere."""

    def __init__(self, total: int, initial: int, interval: float = 10.0):
        self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, disable=None, file=sys.stdout)
        self._total, self._interval, self._last = total, interval, time.monotonic()

    def update(self, step: int, text: str) -> None:
        """Shows that ``step`` steps are done."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and (time.monotonic() - self._last >= self._interval or step == self._total):
            print(f"step {step}/{self._total}  {text}", flush=True)
            self._last = time.monotonic()
            # A disabled bar does not count.
            self._bar.n = step

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
