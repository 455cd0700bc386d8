"""Does the same command give the same bits twice?  200 steps of a small model through three phases, twice.

    python -m tests.determinism                      with --deterministic, and without for its cost
    python -m tests.determinism --steps=20           a shorter one
    python -m tests.determinism --all                also with each part of --deterministic left out: is it needed?

Prints a line of JSON for each way: whether losses and final arrays have the same bits, and the median rate.
The runs of all ways share the device, each compiles for itself; those of `RATES` then run once more, one after the
other, for their rates.  Exit code 1 if the bits differ under --deterministic, or it fails.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import jax

from tests.trainer import final_state, gin_bindings, records
from train import command, main
from train.config.settings import CONFIG_ROOT
from train.evaluation.validation import read_config
from train.model import decoder
from train.records.metrics import read_metrics

RATES = ("--deterministic", "default")


def _with_cudnn() -> AbstractContextManager:
    mix = decoder.Attention.mix
    return mock.patch.object(decoder.Attention, "mix", lambda *inputs, deterministic=False: mix(*inputs[:5]))


def _with_a_scatter() -> AbstractContextManager:
    return mock.patch.object(
        decoder, "look_up", lambda table, tokens, dtype, deterministic: table[tokens].astype(dtype)
    )


def _with_flags(flags: str) -> AbstractContextManager:
    return mock.patch.object(command, "DETERMINISTIC_FLAGS", flags)


FLAGS = command.DETERMINISTIC_FLAGS.split()
OTHERS: dict[str, Callable[[], AbstractContextManager]] = {
    "all but the attention": _with_cudnn,
    "all but the embedding": _with_a_scatter,
    "all but fixed kernels": lambda: _with_flags(""),
    "all but products without Triton": lambda: _with_flags(FLAGS[0]),
    "XLA's deterministic ops without cuDNN": lambda: _with_flags(f"--xla_gpu_deterministic_ops=true {FLAGS[1]}"),
}
"""Ways to run with one part of --deterministic as it is without; the last asks if XLA's own mode fails for cuDNN."""


def bindings(steps: int) -> list[str]:
    """Sizes that the kernels for Hopper take."""
    shape = {"d_model": 256, "d_ffn": 1024, "layers": 2, "heads": 4}
    train = {"steps": steps, "batch_size": 16, "seq_len": 128, "dtype": "bfloat16", "checkpoint_every": steps,
             "eval_every": steps, "eval_batches": 1, "sample_tokens": 0}  # fmt: skip
    settings = {f"Model_{name}": value for name, value in shape.items()}
    settings |= {f"Train_{name}": value for name, value in train.items()}
    schedule = f"[(0, 'dense'), ({steps // 4}, 'venom'), ({steps - steps // 4}, 'dense')]"
    return [*gin_bindings(**settings, LearningRate_peak=1e-3), f"Phases.schedule = {schedule}"]


def train(workdir: Path, steps: int, name: str, compiled: Path, seconds: float) -> dict[str, Any]:
    """One run in a process of its own: what came out, and how fast; or the last words of one that failed.

    compiled: its cache of compiled programs; one that another run has not filled makes it choose kernels anew.
    """
    if name in OTHERS:
        program = ["-m", "tests.determinism", f"--one={name}", f"--steps={steps}"]
    else:  # as a user says it
        program = ["-m", "train.main", *(f"--gin_bindings={binding}" for binding in bindings(steps))]
        program += ["--deterministic"] if name == "--deterministic" else []
    command = [sys.executable, *program, f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CONFIG_ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return {"failed": " / ".join(done.stderr.strip().splitlines()[-3:])[-400:]}
    digest = hashlib.sha256()
    for path, array in sorted(final_state(read_config(workdir), workdir).items()):
        digest.update(path.encode() + array.tobytes())
    rates = [record["tokens_per_second"] for record in read_metrics(workdir) if record["kind"] == "train"]
    losses = [record["loss"] for record in records(workdir, "train")]
    return {"losses": losses, "sha256": digest.hexdigest(), "tokens_per_second": median(rates)}


def compare(name: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Whether two runs are the same, and where they part."""
    told = {"run": name, "device": jax.devices()[0].device_kind, "same_bits": False}
    if "failed" in first | second:
        return told | {"failed": first.get("failed") or second["failed"]}
    pairs = list(zip(first["losses"], second["losses"], strict=True))
    differing = [i + 1 for i, pair in enumerate(pairs) if len(set(pair)) > 1]
    same = first["sha256"] == second["sha256"] and not differing
    return told | {"steps": len(pairs), "same_bits": same, "first_differing_loss": differing[:1],
                   "losses": [first["losses"][0], first["losses"][-1]]}  # fmt: skip


def race(names: list[str], steps: int, seconds: float) -> bool:
    """Two runs in every way, all at once; prints a line for each.  Whether those with --deterministic are the same."""
    same = True
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2 * len(names)) as pool:
        folder = Path(scratch)
        places = {name: [folder / f"{i}-{j}" for j in range(3)] for i, name in enumerate(names)}

        def start(name: str, number: int, compiled: int) -> Future[dict[str, Any]]:
            workdir, cache = places[name][number] / "run", places[name][compiled] / "compiled"
            return pool.submit(train, workdir, steps, name, cache, seconds)

        runs = {name: [start(name, 0, 0), start(name, 1, 1)] for name in names}
        found = {name: [run.result() for run in pair] for name, pair in runs.items()}
        for name in names:
            told = compare(name, *found[name])
            if "failed" not in told and name in RATES:
                told["tokens_per_second"] = start(name, 2, 0).result().get("tokens_per_second")
            print(json.dumps(told), flush=True)
            same &= name != "--deterministic" or told["same_bits"]
    return same


def command_line() -> int:
    """The program, or one of its runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--all", action="store_true", help="also with each part of --deterministic left out")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one run")
    parser.add_argument("--one", choices=OTHERS, help="train once in this way, in --workdir")
    parser.add_argument("--workdir")
    given = parser.parse_args()
    if given.one:
        with OTHERS[given.one]():
            return main.run([], bindings(given.steps), given.workdir, deterministic=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # its children need the device too
    gin_bindings()  # prepares the tokens once
    return int(not race([*RATES, *(OTHERS if given.all else ())], given.steps, given.seconds))


if __name__ == "__main__":
    sys.exit(command_line())
