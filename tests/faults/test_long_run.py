"""Thousands of steps with a switch every few: memory, compiled programs and open files stay as they are."""

import gc
import os
from dataclasses import dataclass, field
from pathlib import Path

import jax
import pytest

from tests.faults.ledger import tried
from tests.trainer import run_config, run_to_end
from train.report import Logger

COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass
class Readings:
    """What the process holds at the beginning of each phase."""

    resident: list[int] = field(default_factory=list)  # KiB
    arrays: list[int] = field(default_factory=list)
    array_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)
    compilations: int = 0

    def note(self) -> None:
        gc.collect()
        live = jax.live_arrays()
        self.arrays.append(len(live))
        self.array_bytes.append(sum(array.nbytes for array in live))
        self.files.append(len(os.listdir("/proc/self/fd")))
        status = Path("/proc/self/status").read_text()
        self.resident.append(int(status.split("VmRSS:")[1].split()[0]))
        self.compiled.append(self.compilations)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("steps", "every"), [(80, 8), pytest.param(10_000, 500, marks=pytest.mark.slow)])
def test_a_long_run_holds_what_a_short_one_holds(tmp_path, monkeypatch, steps, every):
    phases = [(start, ("dense", "venom")[start // every % 2]) for start in range(0, steps, every)]
    config = run_config(
        phases=phases, steps=steps, checkpoint_every=every, eval_every=steps, sample_tokens=0, batch_size=2,
        log_every=steps,
    )  # fmt: skip
    readings, original = Readings(), Logger.begin_phase

    def begin_phase(self, *args):
        readings.note()
        original(self, *args)

    def count(event, *_, **__):
        readings.compilations += event == COMPILED

    monkeypatch.setattr(Logger, "begin_phase", begin_phase)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        assert run_to_end(config, tmp_path) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(readings.files) == len(phases)
    settled = 4  # both switches and both kinds of phases have been seen, and checkpoints have been removed
    assert readings.compiled[-1] == readings.compiled[settled] > 0, f"compiled again: {readings.compiled}"
    middle = (settled + len(phases)) // 2
    # A reading may meet a checkpoint on its way to the disk, with its copies and its files; what stays is the least.
    for name in ("arrays", "array_bytes", "files"):
        values = getattr(readings, name)
        assert min(values[middle:]) <= min(values[settled:middle]), f"{name} grew: {values}"
    growth = readings.resident[-1] - readings.resident[settled]
    assert growth < 48 * 1024, f"resident KiB: {readings.resident}"
    shown = readings.resident[settled :: max(1, len(phases) // 8)]
    outcome = "nothing compiled after the first pass; same files and arrays"
    tried(f"{steps:,} steps, a switch every {every}", 1, outcome, resident_MiB=[kib // 1024 for kib in shown])
