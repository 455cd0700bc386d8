"""The benchmarks and checks of docs/results/h100 once more, on the GPUs that are there; no sweeps, no races of tiles.

    python -m tests.results --list                                       the jobs, in order, and what each may take
    python -m tests.results --tokens=FOLDER --output=RESULTS             all of them
    python -m tests.results --tokens=FOLDER --output=RESULTS --only ffn train --seconds=1500

FOLDER is one that `train.prepare` wrote, with a vocabulary of 16,384.  Each job is a command of its own; RESULTS gets
what it writes, NAME.log with what it prints, and a line in jobs.jsonl.  Jobs that time something have the first GPU to
themselves, one after the other; the others share the next GPUs, or the first one afterwards.  The same command again
leaves out what has succeeded.  What does not begin or end within --seconds is told and comes next time.
Exit code 1 if a job failed or is missing.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

ROOT = Path(__file__).resolve().parent.parent
LEAST = 20.0  # seconds: a job that would have less is not begun


Place = Literal["alone", "shared", "all"]
"""Of a job: a GPU to itself, one that others use too, or every GPU."""


@dataclass(frozen=True)
class Job:
    """A command, what it may take at most, and where it runs."""

    name: str
    seconds: int
    place: Place
    arguments: tuple[str, ...]

    def command(self, tokens: Path, output: Path, seconds: float, gpus: int = 1) -> list[str]:
        """The command with its places filled in; `seconds` for those that end by themselves when time is up."""
        told = {"tokens": tokens, "output": output, "seconds": int(seconds), "gpus": gpus, "rows": 2 * gpus}
        return [sys.executable, "-m", *(argument.format_map(told) for argument in self.arguments)]


def _job(name: str, seconds: int, command: str, *more: str, place: Place = "shared") -> Job:
    return Job(name, seconds, place, (*command.split(), *more))


_DATA = "--gin_bindings=Data.folder='{tokens}'"
_SYNTHETIC = "--gin_bindings=Data.synthetic=True"  # 7b-layers has 512 tokens, fewer than the folder's
_OVER_GPUS = "train.bench --gin_file=configs/size/1b.gin --rounds=3 --switch=false --recipes=dense,venom:4:1"
JOBS = (
    _job("several-gpus", 300, "pytest -m gpu -v tests/test_several_gpus.py", place="all"),
    _job("fsdp", 270, f"{_OVER_GPUS} --json={{output}}/fsdp.json", "--gin_bindings=Train.batch_size={rows}", _DATA,
         place="all"),
    _job("replicated", 270, f"{_OVER_GPUS} --gin_file=configs/options/replicated.gin --json={{output}}/replicated.json",
         "--gin_bindings=Train.batch_size={rows}", _DATA, place="all"),
    _job("fsdp-7b", 400, "train.bench --gin_file=configs/size/7b.gin --rounds=2 --json={output}/fsdp-7b.json", _DATA,
         "--recipes=dense,act24,act24:4:2,venom:4:1", "--parts=false", "--switch=false",
         "--gin_bindings=Train.batch_size={gpus}", place="all"),
    _job("fsdp-7b-unrolled", 400, "train.bench --gin_file=configs/size/7b.gin --rounds=2 --parts=false --switch=false",
         _DATA, "--recipes=dense,venom:4:1", "--json={output}/fsdp-7b-unrolled.json", "--gin_bindings=Train.unroll=32",
         "--gin_bindings=Train.batch_size={gpus}", place="all"),
    _job("ffn", 750, "venom_jax.bench --json {output}/ffn.json --stages", place="alone"),
    _job("train", 400, "train.bench --gin_file=configs/size/1b.gin --rounds=3 --json={output}/train.json",
         "--recipes=dense,act24,all24,venom:4:2,venom:16:1,act24:4:2,venom:4:1", _DATA, place="alone"),
    _job("layers", 300, "train.bench --gin_file=configs/size/7b-layers.gin --rounds=3 --json={output}/layers.json",
         "--recipes=dense,act24,all24,venom:4:2,act24:4:2,venom:4:1", _SYNTHETIC, place="alone"),
    _job("vnm", 300, "pallas_kernels.measure.vnm --json {output}/vnm.json", place="alone"),
    _job("roofline", 330, "pallas_kernels.roofline --parts counters --json {output}/roofline.json --seconds={seconds}",
         "--table={output}/roofline.md", place="alone"),
    _job("kernels", 400, "pallas_kernels.bench --json {output}/kernels.json --table {output}/kernels.md",
         place="alone"),
    _job("bandwidth", 200, "pallas_kernels.bandwidth --json {output}/bandwidth.json", "--table={output}/bandwidth.md",
         place="alone"),
    _job("power", 120, "pallas_kernels.roofline --parts power --json {output}/power.json", place="alone"),
    _job("gpu-tests", 700, "pytest -m gpu -n 12 -v tests"),
    _job("determinism", 300, "tests.determinism --all --seconds=120"),
    _job("same-loss", 360, "tests.same_loss --tokens={tokens} --output={output}/same-loss.json"),
    _job("long-run", 400, "tests.long_run --output={output}/long-run.json --seconds={seconds}"),
    _job("sanitizer", 420, "tests.sanitizer --output={output}/sanitizer.json --seconds={seconds}"),
    _job("trainer", 330, "tests.trainer_on_gpu --tokens={tokens} --output={output} --seconds={seconds}"),
)  # fmt: skip
"""Those whose figures matter most first."""


class Queue:
    """Jobs on the GPUs present, until the time is up."""

    def __init__(self, tokens: Path, output: Path, seconds: float):
        self.tokens, self.output, self.end = tokens, output, time.monotonic() + seconds
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        output.mkdir(parents=True, exist_ok=True)
        self._told = output / "jobs.jsonl"

    def done(self) -> set[str]:
        """Names of the jobs that succeeded, now or in an earlier run."""
        lines = self._told.read_text().splitlines() if self._told.exists() else []
        return {record["job"] for record in map(json.loads, lines) if record["state"] == "done"}

    def work(self, jobs: list[Job], gpu: str) -> None:
        """One job after the other on one GPU."""
        for job in jobs:
            left = min(job.seconds, self.end - time.monotonic() - 5)
            if left < LEAST:
                self._tell(job, gpu, "not begun", 0.0)
                continue
            began = time.monotonic()
            self._tell(job, gpu, self._run(job, gpu, left), time.monotonic() - began)

    def stop(self) -> None:
        """Ends what runs, and begins nothing more: jobs have sessions of their own, which no Ctrl-C reaches."""
        self.end = 0.0
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _run(self, job: Job, gpu: str, seconds: float) -> str:
        preallocate = "false" if job.place == "shared" else "true"
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": preallocate, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
        environment = memory | os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        command = job.command(self.tokens, self.output, seconds - 10, gpu.count(",") + 1)
        with (self.output / f"{job.name}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._running.add(process)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return "late"
            finally:
                self._running.discard(process)
        return "done" if code == 0 else f"exit code {code}"

    def _tell(self, job: Job, gpu: str, state: str, seconds: float) -> None:
        record = {"job": job.name, "state": state, "seconds": round(seconds, 1), "gpu": gpu}
        with self._lock:
            print(f"{job.name}: {state}, {seconds:.0f} s on GPU {gpu}", flush=True)
            with self._told.open("a") as file:
                file.write(json.dumps(record) + "\n")


def gpus() -> list[str]:
    """Indices of the GPUs that may be used; [""] without a driver."""
    if shutil.which("nvidia-smi") is None:
        return [""]
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    present = [str(i) for i in range(listed.count("GPU "))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else present or [""]


def run(jobs: list[Job], queue: Queue) -> list[str]:
    """Names of the jobs that are still missing at the end."""
    present = gpus()
    first, *others = present
    if not others:
        jobs = [job for job in jobs if job.place != "all"]
    waiting = [job for job in jobs if job.name not in queue.done()]
    alone, shared, together = ([job for job in waiting if job.place == place] for place in get_args(Place))
    lanes = {first: alone if others else alone + shared} | {
        gpu: shared[i :: len(others)] for i, gpu in enumerate(others)
    }
    with ThreadPoolExecutor(len(lanes)) as pool:
        try:
            queue.work(together, ",".join(present))
            for lane in [pool.submit(queue.work, part, gpu) for gpu, part in lanes.items()]:
                lane.result()
        except BaseException:
            queue.stop()
            raise
    return [job.name for job in jobs if job.name not in queue.done()]


def main() -> int:
    """Runs the jobs and says which are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [job.name for job in JOBS]
    parser.add_argument("--tokens", type=Path, help="folder that train.prepare wrote")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=" ".join(names))
    parser.add_argument("--seconds", type=float, default=6 * 3600, help="for everything together")
    parser.add_argument("--list", action="store_true", help="print the jobs and stop")
    given = parser.parse_args()
    jobs = [job for job in JOBS if job.name in given.only]
    if given.list:
        for job in jobs:
            print(f"{job.name}: at most {job.seconds} s, {job.place}: python -m {' '.join(job.arguments)}")
        return 0
    if given.tokens is None or given.output is None:
        parser.error("give --tokens and --output")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    missing = run(jobs, Queue(given.tokens.resolve(), given.output.resolve(), given.seconds))
    print(f"missing: {', '.join(missing)}" if missing else "all done", flush=True)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
