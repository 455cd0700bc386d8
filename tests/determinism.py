"""Does the same command give the same bits twice?  200 steps of a small model through three phases, twice.

    python -m tests.determinism                      with --deterministic, and without for its cost
    python -m tests.determinism --steps=20           a shorter one
    python -m tests.determinism --all                other flags of XLA too, to see which of them are needed

Prints a line of JSON for each set of flags: whether losses and final arrays have the same bits, and the median rate.
The runs of all sets share the device, each compiles for itself; `--deterministic` and the default then run once more,
one after the other, for their rates.  Exit code 1 if the bits differ under --deterministic, or it fails.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax

from tests.trainer import final_state, gin_bindings, records
from train.command import DETERMINISTIC_FLAGS
from train.config import CONFIG_ROOT
from train.evaluate import read_config
from train.metrics import read_metrics

OPS, NO_TRITON = DETERMINISTIC_FLAGS.split()
SETS = {"--deterministic": DETERMINISTIC_FLAGS, "default": ""}
OTHERS = {
    "deterministic ops alone": OPS,
    "autotuned, without nondeterministic ops": f"--xla_gpu_exclude_nondeterministic_ops=true {NO_TRITON}",
    "not autotuned": f"--xla_gpu_autotune_level=0 {NO_TRITON}",
}


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
    command = [sys.executable, "-m", "train.main", f"--workdir={workdir}"]
    command += [f"--gin_bindings={binding}" for binding in bindings(steps)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CONFIG_ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if name == "--deterministic":
        command.append(name)  # as a user says it
    else:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {(SETS | OTHERS)[name]}".strip()
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
    told = {"flags": name, "device": jax.devices()[0].device_kind, "same_bits": False}
    if "failed" in first | second:
        return told | {"failed": first.get("failed") or second["failed"]}
    pairs = list(zip(first["losses"], second["losses"], strict=True))
    differing = [i + 1 for i, pair in enumerate(pairs) if len(set(pair)) > 1]
    same = first["sha256"] == second["sha256"] and not differing
    return told | {"steps": len(pairs), "same_bits": same, "first_differing_loss": differing[:1],
                   "losses": [first["losses"][0], first["losses"][-1]]}  # fmt: skip


def main() -> int:
    """Two runs with every set of flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--all", action="store_true", help="with the sets of flags that the option does not use")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one run")
    given, worst = parser.parse_args(), 0
    names = [*SETS, *(OTHERS if given.all else ())]
    gin_bindings()  # prepares the tokens once
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2 * len(names)) as pool:
        folder = Path(scratch)
        places = {name: [folder / f"{i}-{j}" for j in range(3)] for i, name in enumerate(names)}

        def start(name: str, number: int, compiled: int) -> Future[dict[str, Any]]:
            workdir, cache = places[name][number] / "run", places[name][compiled] / "compiled"
            return pool.submit(train, workdir, given.steps, name, cache, given.seconds)

        runs = {name: [start(name, 0, 0), start(name, 1, 1)] for name in names}
        found = {name: [run.result() for run in pair] for name, pair in runs.items()}
        for name in names:
            told = compare(name, *found[name])
            if "failed" not in told and name in SETS:
                told["tokens_per_second"] = start(name, 2, 0).result().get("tokens_per_second")
            print(json.dumps(told), flush=True)
            worst |= name == "--deterministic" and not told["same_bits"]
    return int(worst)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # its children need the device too
    sys.exit(main())
