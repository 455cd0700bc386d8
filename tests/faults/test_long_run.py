"""Thousands of steps with a switch every few: memory, compiled programs and open files stay as they are."""

from typing import Any

import pytest

from tests.faults.ledger import tried
from tests.long_run import SETTLED, Readings, configuration, watch


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("steps", "every"), [(80, 8), pytest.param(10_000, 500, marks=pytest.mark.slow)])
def test_a_long_run_holds_what_a_short_one_holds(tmp_path, steps, every):
    readings = watch(configuration(steps, every), tmp_path)
    assert readings.steps == steps
    assert len(readings.files) == steps // every
    assert not readings.growth()
    shown = readings.resident_kib[SETTLED :: max(1, len(readings.files) // 8)]
    outcome = "nothing compiled after the first pass; same files and arrays"
    tried(f"{steps:,} steps, a switch every {every}", 1, outcome, resident_MiB=[kib // 1024 for kib in shown])


def readings_with(**changed):
    """Twelve flat readings but for the named ones."""
    flat = {"resident_kib": 500_000, "arrays": 70, "array_bytes": 10**6, "files": 30, "compiled": 9,
            "device_bytes": 2**21, "device_peak_bytes": 2**23}  # fmt: skip
    lists: dict[str, Any] = {name: [value] * 12 for name, value in flat.items()}
    for name, step in changed.items():
        lists[name] = [flat[name] + step * i for i in range(12)]
    return Readings(**lists)


@pytest.mark.parametrize(
    ("name", "step"),
    [("resident_kib", 8000), ("arrays", 1), ("array_bytes", 4), ("files", 1), ("device_bytes", 20_000),
     ("device_peak_bytes", 400_000)],
)  # fmt: skip
def test_growth_is_seen(name, step):
    assert readings_with().growth() == []
    (found,) = readings_with(**{name: step}).growth()
    assert found.startswith(f"{name} grew")


def test_compiling_again_is_seen_and_too_few_phases_tell_nothing():
    (found,) = readings_with(compiled=1).growth()
    assert found.startswith("compiled again")
    assert Readings(files=[1, 2]).growth() == ["only 2 phases began: too few to tell"]
