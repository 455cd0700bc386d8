"""Does the same command give the same bits twice?  200 steps of a small model through three phases, twice.

    python -m tests.determinism                      with --deterministic, and without for its cost
    python -m tests.determinism --steps=20           a shorter one

Prints a line of JSON for each of the two: whether losses and final arrays have the same bits, and the median rate.
Exit code 1 if the bits differ under --deterministic.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import jax

from tests.trainer import final_state, gin_bindings, records
from train.config import CONFIG_ROOT
from train.evaluate import read_config
from train.metrics import read_metrics


def bindings(steps: int) -> list[str]:
    """Sizes that the kernels for Hopper take."""
    shape = {"d_model": 256, "d_ffn": 1024, "layers": 2, "heads": 4}
    train = {"steps": steps, "batch_size": 16, "seq_len": 128, "dtype": "bfloat16", "checkpoint_every": steps,
             "eval_every": steps, "eval_batches": 1, "sample_tokens": 0}  # fmt: skip
    settings = {f"Model_{name}": value for name, value in shape.items()}
    settings |= {f"Train_{name}": value for name, value in train.items()}
    schedule = f"[(0, 'dense'), ({steps // 4}, 'venom'), ({steps - steps // 4}, 'dense')]"
    return [*gin_bindings(**settings, LearningRate_peak=1e-3), f"Phases.schedule = {schedule}"]


def train(workdir: Path, steps: int, *options: str) -> dict:
    """One run in a process that finds nothing compiled by another: what came out, and how fast."""
    command = [sys.executable, "-m", "train.main", f"--workdir={workdir}", *options]
    command += [f"--gin_bindings={binding}" for binding in bindings(steps)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CONFIG_ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256()
    for name, array in sorted(final_state(read_config(workdir), workdir).items()):
        digest.update(name.encode() + array.tobytes())
    rates = [record["tokens_per_second"] for record in read_metrics(workdir) if record["kind"] == "train"]
    losses = [record["loss"] for record in records(workdir, "train")]
    return {"losses": losses, "sha256": digest.hexdigest(), "tokens_per_second": median(rates)}


def main() -> int:
    """Two runs with --deterministic and two without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps, worst = parser.parse_args().steps, 0
    with tempfile.TemporaryDirectory() as folder:
        for options in (("--deterministic",), ()):
            name = options[0].lstrip("-") if options else "default"
            first, second = (train(Path(folder) / f"{name}-{i}", steps, *options) for i in range(2))
            differing = [
                i + 1
                for i, pair in enumerate(zip(first["losses"], second["losses"], strict=True))
                if len(set(pair)) > 1
            ]
            same = first["sha256"] == second["sha256"] and not differing
            told = {"options": name, "steps": steps, "same_bits": same, "first_differing_loss": differing[:1],
                    "tokens_per_second": [run["tokens_per_second"] for run in (first, second)],
                    "device": jax.devices()[0].device_kind}  # fmt: skip
            print(json.dumps(told), flush=True)
            worst |= bool(options) and not same
    return int(worst)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # its children need the device too
    sys.exit(main())
