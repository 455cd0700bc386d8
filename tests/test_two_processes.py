"""One run in two processes that share a batch and the weights, as on two hosts; its checkpoint in one process."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.trainer import gin_bindings, records, run_to_end
from train.config.settings import CONFIG_ROOT, load_config


def start(bindings, workdir, folder):
    """Both processes of a run of two, on a device each; the first learns from SLURM's variables who it is."""
    port = free_port(65536 - (1 << 12), 65536)  # JAX takes the job's number modulo 2^12, from the end of the range
    slurm = {"JOB_ID": port % (1 << 12), "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": 0, "LOCALID": 0}
    hows = ["auto", f"localhost:{port},2,1"]
    variables = [{f"SLURM_{name}": str(value) for name, value in slurm.items()}, {}]
    program = [sys.executable, "-m", "train.main", *(f"--gin_bindings={binding}" for binding in bindings)]
    flags = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(CONFIG_ROOT),
    }
    return [
        subprocess.Popen(
            [*program, f"--workdir={workdir}", f"--distributed={how}"],
            env=os.environ | flags | more,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for how, more in zip(hows, variables, strict=True)
    ]


def free_port(first, end):
    """A port of this range that nobody listens on."""
    for port in random.sample(range(first, end), 100):
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("localhost", port))
            return port
    raise AssertionError("no free port")


def finish(processes):
    """What each printed, after both ended well."""
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    return printed


def bindings_of(schedule, **overrides):
    options = {"Model_layers": 1, "Train_sample_tokens": 0, "Train_eval_every": 1000, "Train_keep_checkpoints": 10}
    return [*gin_bindings(**options | overrides), f"Phases.schedule = {schedule}", "venom/Recipe.wgrad = 'dense'"]


@pytest.mark.timeout(600)
def test_two_processes_train_and_one_goes_on(tmp_path):
    """Clustering, checkpoints and evaluation by both together; then the steps after a checkpoint by one alone."""
    bindings = bindings_of("[(0, 'dense'), (2, 'venom')]", Train_steps=6, Train_checkpoint_every=4)
    both, alone = tmp_path / "both", tmp_path / "alone"
    printed = finish(start(bindings, both, tmp_path))
    assert "done: 6 steps" in printed[0]
    assert "step" not in printed[1]  # only the first one reports
    shutil.copytree(both, alone)
    shutil.rmtree(alone / "checkpoints" / "6")
    assert run_to_end(load_config([], bindings), alone) == 0
    found, expected = (records(workdir)[-4:] for workdir in (alone, both))
    assert [record["kind"] for record in expected] == ["train", "train", "eval", "end"]
    for ours, theirs in zip(found, expected, strict=True):
        for name in {"loss", "grad_norm", "load_max", "val_loss", "val_loss_sparse"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_both(tmp_path):
    bindings = bindings_of("[(0, 'dense')]", Train_steps=100_000, Train_checkpoint_every=100_000)
    processes = start(bindings, tmp_path / "run", tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < 10:
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    printed = finish(processes)
    assert "SIGTERM: saved step" in printed[0]
    assert list((tmp_path / "run" / "checksums").glob("*.json"))
