"""Hardware counters of the kernels' launches, read by running a program under Nsight Compute (`ncu`)."""

import csv
import functools
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator

COUNTERS = {
    "ns": ("gpu__time_duration.sum",),
    "cycles": ("sm__cycles_elapsed.max",),
    "hertz": ("sm__cycles_elapsed.avg.per_second",),
    "l2_hertz": ("lts__cycles_elapsed.avg.per_second",),
    "tensor": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_elapsed",
    ),
    "issue": ("smsp__issue_active.avg.pct_of_peak_sustained_elapsed",),
    "smem_pipe": (
        "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    ),
    "bank_reads": ("l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",),
    "bank_writes": ("l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",),
    "load": ("l1tex__m_xbar2l1tex_read_bytes.sum.pct_of_peak_sustained_elapsed",),
    "load_bytes": ("l1tex__m_xbar2l1tex_read_bytes.sum",),
    "l2": ("lts__t_sectors.avg.pct_of_peak_sustained_elapsed",),
    "l2_bytes": ("lts__t_bytes.sum",),
    "l2_hits": ("lts__t_sector_hit_rate.pct",),
    "dram_read": ("dram__bytes_read.sum",),
    "dram_written": ("dram__bytes_write.sum",),
}
"""What is read: the first of these names that Nsight Compute knows. Names end in "pct" are percent of a unit's peak."""
KERNEL = "body"
"""In the name of the kernel's launches and of no other's."""


def count(command: list[str], log: str) -> dict[str, dict[str, float]]:
    """Counters of each launch of a command that prints "launched NAME" after each; caches cold, clock as it is.

    Args:
      log: where ncu writes its table.

    Raises:
      FileNotFoundError: no ncu.
      RuntimeError: it failed, or saw no launch.
      ValueError: not one row for each launch.
    """
    ncu = find_ncu()
    metrics = choose_metrics(ncu)
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--log-file", log]
    # Not what it starts: ncu has ended in a segmentation fault in a compiler that XLA ran, and XLA waits forever then.
    options += ["--kernel-name", f"regex:{KERNEL}", "--target-processes", "application-only"]
    # A launch inside a CUDA graph would be none; and ncu keeps copies of what a kernel writes.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    while True:
        pathlib.Path(log).unlink(missing_ok=True)  # what an earlier ncu said is no answer of this one
        code, names = _run([ncu, *options, "--metrics", ",".join(metrics.values()), *command], environment)
        lines = pathlib.Path(log).read_text().splitlines() if os.path.exists(log) else []
        if code == 0 and names:
            return parse(lines, names, metrics)
        errors = "\n".join(line for line in lines if line.startswith(("==ERROR==", "==WARNING==")))
        refused = {key for key, metric in metrics.items() if metric in errors}
        if not refused:
            raise RuntimeError(f"ncu ended with {code} after {len(names)} launches\n{errors}")
        print(f"without {sorted(refused)}: {errors}", flush=True)
        metrics = {key: metric for key, metric in metrics.items() if key not in refused}


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
    """The exit code of a command, whose output is passed on, and the names after "launched" in it."""
    names = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("launched "):
                names.append(line.removeprefix("launched ").strip())
    return process.returncode, names


def parse(lines: Iterable[str], names: list[str], metrics: dict[str, str]) -> dict[str, dict[str, float]]:
    """Counters of each launch from the raw page of ncu in CSV and base units.

    Args:
      names: the cases in the order of their launches.
      metrics: key of `COUNTERS` -> the name that was asked for.

    Raises:
      ValueError: not one row for each launch.
    """
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    rows = [row for row in table if KERNEL in (row["Kernel Name"] or "")]
    if len(rows) != len(names):
        raise ValueError(f"ncu shows {len(rows)} launches of {KERNEL!r} for {len(names)} cases: {names}")
    return {name: dict(_numbers(row, metrics)) for name, row in zip(names, rows, strict=True)}


def _numbers(row: dict[str, str], metrics: dict[str, str]) -> Iterator[tuple[str, float]]:
    for key, metric in metrics.items():
        try:
            yield key, float(row[metric].replace(",", ""))
        except (KeyError, ValueError):  # "n/a": this launch has no such counter
            continue


@functools.cache
def choose_metrics(ncu: str) -> dict[str, str]:
    """For each of `COUNTERS` the first name that this ncu lists, or else the first of a counter that it has at all."""
    wanted = [name for names in COUNTERS.values() for name in names]
    query = [ncu, "--query-metrics", "--chips", "gh100"]
    known = set(re.findall(r"\b\w+__\w+", _output(query)))
    bases = sorted({name.split(".")[0] for name in wanted} & known)
    query += ["--query-metrics-mode", "suffix", "--metrics", ",".join(bases)]
    known |= set(re.findall(r"\b\w+__[\w.]+", _output(query)))
    chosen = {}
    for key, names in COUNTERS.items():
        exact = [name for name in names if name in known]
        similar = [name for name in names if name.split(".")[0] in known]
        if found := exact or similar:
            chosen[key] = found[0]
    return chosen


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def find_ncu() -> str:
    """The path of Nsight Compute.

    Raises:
      FileNotFoundError: it is not installed.
    """
    if found := shutil.which("ncu"):
        return found
    places = [
        *pathlib.Path("/opt/nvidia/nsight-compute").glob("*/ncu"),
        *pathlib.Path("/usr/local").glob("cuda*/bin/ncu"),
    ]
    if not places:
        raise FileNotFoundError("no ncu on PATH, in /opt/nvidia/nsight-compute or /usr/local/cuda*/bin: install it")
    return str(sorted(places)[-1])
