"""Thousands of steps with a switch every few: what the process and the device hold stays as it is.

    python -m tests.long_run --output=long_run.json            10,000 steps, a switch every 500
    python -m tests.long_run --steps=400 --every=40            a shorter one

On a Hopper GPU the model has the smallest sizes that the kernels take, and they are asked for by name, so that nothing
replaces them; elsewhere it is the model of the tests. Prints a line for each phase. Exit code 1 if anything grew or was
compiled again; a run whose time is up is judged by the steps that it made, at least half of them.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from pallas_kernels import device
from tests.trainer import run_config, run_to_end
from train.config.settings import RunConfig
from train.records.logger import Logger
from train.state.checkpoint import Checkpoints

COMPILED = "/jax/core/compile/backend_compile_duration"
SETTLED = 4  # phases: both switches and both kinds of phases have been seen, and checkpoints have been removed
FOR_KERNELS = {
    "shape": {"d_model": 64, "d_ffn": 256, "heads": 2},  # one tile of 64 for the model and for each of four experts
    "dtype": "bfloat16",
    "seq_len": 128,
    "implementation": "hopper",
}


class TimeUpError(Exception):
    """The run has to end before its last step."""


@dataclass
class Readings:
    """What is held at the beginning of each phase."""

    resident_kib: list[int] = field(default_factory=list)
    arrays: list[int] = field(default_factory=list)
    array_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)
    device_bytes: list[int] = field(default_factory=list)  # stays empty where the device does not tell
    device_peak_bytes: list[int] = field(default_factory=list)
    compilations: int = 0
    steps: int = 0

    def note(self) -> None:
        gc.collect()
        live = jax.block_until_ready(jax.live_arrays())  # so that no step on its way holds memory
        self.arrays.append(len(live))
        self.array_bytes.append(sum(array.nbytes for array in live))
        self.files.append(len(os.listdir("/proc/self/fd")))
        status = Path("/proc/self/status").read_text()
        self.resident_kib.append(int(status.split("VmRSS:")[1].split()[0]))
        self.compiled.append(self.compilations)
        if stats := jax.local_devices()[0].memory_stats():
            self.device_bytes.append(stats["bytes_in_use"])
            self.device_peak_bytes.append(stats["peak_bytes_in_use"])

    def growth(self) -> list[str]:
        """What is not flat, in words."""
        if len(self.files) <= SETTLED + 1:
            return [f"only {len(self.files)} phases began: too few to tell"]
        found, middle = [], (SETTLED + len(self.files)) // 2
        if not self.compiled[-1] == self.compiled[SETTLED] > 0:
            found.append(f"compiled again: {self.compiled}")
        # A reading may meet what is closed a moment later; what stays is the least.
        for name, slack in (("arrays", 0), ("array_bytes", 0), ("files", 0), ("device_bytes", 64 * 1024)):
            values = getattr(self, name)
            if values and min(values[middle:]) > min(values[SETTLED:middle]) + slack:
                found.append(f"{name} grew: {values}")
        if self.device_peak_bytes and self.device_peak_bytes[-1] > self.device_peak_bytes[middle] + 2**20:
            found.append(f"device_peak_bytes grew: {self.device_peak_bytes}")
        if self.resident_kib[-1] - self.resident_kib[SETTLED] >= 48 * 1024:
            found.append(f"resident_kib grew: {self.resident_kib}")
        return found


def configuration(steps: int, every: int, **settings: Any) -> RunConfig:
    """Dense and sparse phases in turn, each of so many steps, and a checkpoint at the end of each."""
    phases = [(start, ("dense", "venom")[start // every % 2]) for start in range(0, steps, every)]
    train: dict[str, Any] = {"batch_size": 2, "sample_tokens": 0}
    train |= settings
    return run_config(phases=phases, steps=steps, checkpoint_every=every, eval_every=steps, log_every=steps, **train)


def watch(config: RunConfig, workdir: Path, *, seconds: float = float("inf"), tell: bool = False) -> Readings:
    """Trains, with a reading at the beginning of each phase, when the last checkpoint is on the disk.

    Raises:
      TimeUpError: ``seconds`` have gone before half of the phases began.
    """
    readings, original, began = Readings(), Logger.begin_phase, time.monotonic()
    save, saving = Checkpoints.save, []
    phases = len(config.schedule.phases)

    def noted_save(self, *args, **kwargs):
        saving[:] = [self]
        save(self, *args, **kwargs)

    def begin_phase(self, step, *args):
        for checkpoints in saving:
            checkpoints.wait()  # on its way it holds copies and files
        readings.note()
        readings.steps = step
        taken = time.monotonic() - began
        if tell:
            lists = {name: values for name, values in asdict(readings).items() if isinstance(values, list)}
            last = {name: values[-1] for name, values in lists.items() if values}
            print(json.dumps({"step": step, "seconds": round(taken, 1), **last}), flush=True)
        if taken > seconds:
            raise TimeUpError(f"{len(readings.files) - 1} of {phases} phases in {seconds:.0f} s")
        original(self, step, *args)

    def count(event, *_, **__):
        readings.compilations += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with mock.patch.object(Logger, "begin_phase", begin_phase), mock.patch.object(Checkpoints, "save", noted_save):
            assert run_to_end(config, workdir) == 0
        readings.steps = config.train.steps
    except TimeUpError:
        if len(readings.files) <= phases // 2:
            raise
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return readings


def main() -> int:
    """Runs, writes the result and prints it in short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500, help="steps of a phase")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--output", type=Path, help="a file for the result as JSON")
    given = parser.parse_args()
    config = configuration(given.steps, given.every, **(FOR_KERNELS if device.hopper_available() else {}))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        readings = watch(config, Path(scratch) / "run", seconds=given.seconds, tell=True)
    found = readings.growth()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "every": given.every,
        "implementation": config.train.implementation,
        "seconds": round(time.monotonic() - began, 1),
        "grew": found,
        **asdict(readings),
    }
    text = json.dumps(result)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
