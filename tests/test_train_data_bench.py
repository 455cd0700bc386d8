"""The benchmark of the input pipeline counts tokens, and nothing else."""

import json
import subprocess
import sys

import pytest

from tests.trainer import token_folder
from train.data import bench


def test_the_rate_is_tokens_over_time(monkeypatch):
    """A source that gives one batch a second, by a clock of its own."""
    clock = [0.0]

    def batches():
        while True:
            clock[0] += 1.0
            yield {}

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench, "train_iterator", lambda *args, **options: batches())
    found = bench.measure(str(token_folder()), batch_size=3, seq_len=5, seconds=10.0, consumed=30.0)
    assert found["tokens_per_second"] == 15.0
    assert found["times_consumed"] == 0.5
    assert found["first_batch_seconds"] == 1.0


def test_the_command_measures_a_prepared_folder():
    command = [sys.executable, "-m", "train.data_bench", f"--folder={token_folder()}", "--seq_len=16", "--seconds=0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens_per_second"] > 0
    assert found["consumed"] == bench.fastest_step(), "what README and docs/data.md say"


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="seconds=0"):
        bench.measure(str(token_folder()), batch_size=1, seq_len=4, seconds=0, consumed=1)
    with pytest.raises(ValueError, match="sequence length 1000000"):
        bench.measure(str(token_folder()), batch_size=1, seq_len=1_000_000, seconds=1, consumed=1)
