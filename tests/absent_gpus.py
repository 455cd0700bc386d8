"""Compile the kernels for GPUs that are not there: python -m tests.absent_gpus sm_80 [--all], or table.

Prints a row of JSON for each kernel.

XLA's compile-only topology runs Mosaic's whole pipeline and ptxas. It needs the packages of CUDA's plugin, but neither
a driver nor a GPU. One process compiles for one architecture: Mosaic registers its passes once, for the first it met.
`make aot` puts the packages into .venv/aot, out of the way of processes that run on the CPU.
"""

import argparse
import functools
import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(sys.prefix) / "aot"
_FAST = ("sparse24", "grouped24 rows, [n, k]", "grouped24 columns, transposed", "pack activations")


class Target(NamedTuple):
    """An architecture and one GPU of it."""

    name: str
    capability: tuple[int, int]
    feature: str
    sms: int
    block_bytes: int
    """Shared memory that a block may use; and of a multiprocessor:"""
    sm_bytes: int
    threads: int


TARGETS = {
    "sm_80": Target("A100", (8, 0), "NONE", 108, 166912, 167936, 2048),
    "sm_86": Target("RTX 3090", (8, 6), "NONE", 82, 101376, 102400, 1536),
    "sm_89": Target("L40S", (8, 9), "NONE", 142, 101376, 102400, 1536),
    "sm_90": Target("H200", (9, 0), "ACCELERATED_FEATURES", 132, 232448, 233472, 2048),
    "sm_100": Target("B200", (10, 0), "ACCELERATED_FEATURES", 148, 232448, 233472, 2048),
    "sm_120": Target("RTX 5090", (12, 0), "ACCELERATED_FEATURES", 170, 101376, 102400, 1536),
}


def missing() -> str | None:
    """Why nothing can be compiled here, in words, or None."""
    if not _plugin_folder():
        return "needs the packages of the extra `aot`: make aot"
    if _tool("ptxas") is None:
        return "needs ptxas: make aot, or CUDA 13 on the PATH"
    return None


def compile_kernels(architecture: str, *, every: bool) -> list[dict[str, Any]]:
    """A row for each kernel, from a process of its own."""
    with tempfile.TemporaryDirectory() as root:
        tools = Path(root) / "bin"  # where Mosaic looks for both
        tools.mkdir()
        for name in ("ptxas", "nvdisasm"):
            if (found := _tool(name)) is not None:
                (tools / name).symlink_to(found)
        paths = [str(path) for path in (_plugin_folder(), os.environ.get("PYTHONPATH")) if path]
        environment = os.environ | {
            "CUDA_ROOT": root,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, "-m", "tests.absent_gpus", architecture, *(["--all"] if every else [])]
        options: dict[str, Any] = {"cwd": Path(__file__).resolve().parent.parent, "env": environment, "timeout": 280}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/gpus.md: of each kernel and architecture the registers and KiB of shared memory."""
    architectures = list(TARGETS)
    found = {(row["kernel"], row["architecture"]): row for row in rows}
    lines = [f"| kernel | {' | '.join(architectures)} |", "|---" * (len(architectures) + 1) + "|"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for architecture in architectures:
            row = found.get((kernel, architecture))
            cells.append("" if row is None else f"{row['registers']}, {row['shared_bytes'] / 1024:.0f} KiB")
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plugin_folder() -> Path | None:
    """Where the plugin's packages are: in a folder of their own, or among all others."""
    if (FOLDER / "jax_cuda13_plugin").exists():
        return FOLDER
    spec = importlib.util.find_spec("jax_cuda13_plugin")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent.parent


def _tool(name: str) -> Path | None:
    on_path = shutil.which(name)
    if on_path is not None:
        return Path(on_path)
    folder = _plugin_folder()
    found = sorted(folder.glob(f"nvidia/*/bin/{name}")) if folder is not None else []
    return found[0] if found else None


# ------------------------------------------------------------------------------------- in the process that compiles


def _config(architecture: str) -> str:
    target = TARGETS[architecture]
    major, minor = target.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {target.sm_bytes} threads_per_core_limit: {target.threads} core_count: {target.sms}
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 1000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 42505273344
  shared_memory_per_block_optin: {target.block_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {target.feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 dnn_version: "9.10.0"
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{architecture}"
"""


def _compile(architecture: str, function, shapes: tuple) -> list[dict[str, Any]]:
    """What Mosaic compiled of a function: of each of its kernels the report of ptxas, PTX and SASS."""
    import jax
    from jax.experimental import topologies
    from jax.experimental.mosaic.gpu import utils
    from jax.sharding import NamedSharding, PartitionSpec

    with tempfile.TemporaryDirectory() as dump:
        os.environ |= {"MOSAIC_GPU_DUMP_TO": dump, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        os.environ |= {"MOSAIC_GPU_DUMP_SASS": "1"} if shutil.which("nvdisasm") else {}
        topology = topologies.get_topology_desc(platform="cuda", target_config=_config(architecture), topology="1x1x1")
        mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
        sharding = NamedSharding(mesh, PartitionSpec())
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
        # Mosaic asks the default device for its architecture; without one it assumes Hopper.
        utils._infer_arch = lambda: TARGETS[architecture].capability
        jax.jit(function).lower(*shapes).compile()

        def read(suffix: str) -> list[str]:
            return [Path(path).read_text() for path in sorted(glob.glob(f"{dump}/*{suffix}"))]

        sass = read(".sass*") or [None] * len(read(".ptx"))
        files = zip(read(".ptxas"), read(".ptx"), read(".resources.txt"), sass, strict=True)
        return [dict(zip(("report", "ptx", "resources", "sass"), found, strict=True)) for found in files]


def _kernels() -> dict[str, tuple[Any, tuple]]:
    """Functions and the shapes of their arguments, by name."""
    import jax

    from pallas_kernels.epilogue import Epilogue
    from pallas_kernels.grouped24 import api as grouped
    from pallas_kernels.pack import activations, api
    from pallas_kernels.permute import api as permute
    from pallas_kernels.sparse24 import sparse24
    from pallas_kernels.vnm import vnm

    def array(*shape: int, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    def packed(m: int, k: int):
        return array(m // 64, k // 64, 8, 256), array(m // 64, k // 64, 128, dtype="uint32")

    def warp(function, **options):
        return functools.partial(function, implementation="warp", **options)

    def added(values, metadata, b, operand):
        options = {"epilogue": Epilogue(operand="add"), "out_dtype": "float32"}
        return warp(sparse24, **options)(values, metadata, b, operand=operand)

    def scaled(values, metadata, b, operand, row_scale):
        epilogue = Epilogue("relu2", "multiply", row_scale=True, alpha=0.5)
        return warp(sparse24, epilogue=epilogue)(values, metadata, b, operand=operand, row_scale=row_scale)

    whole, sizes = packed(4096, 4096), array(4, dtype="int32")
    y = array(4096, 4096)
    taken: Any = activations.Packed(*packed(4096, 4096))  # pyrefly: ignore[bad-argument-type]
    return {
        "sparse24": (warp(sparse24), (*whole, array(4096, 4096))),
        "sparse24, [n, k], ragged": (warp(sparse24, b_k_major=True), (*whole, array(4104, 4096))),
        "sparse24, rows, transposed": (
            warp(sparse24, transpose_out=True), (array(4096, 2048), whole[1], array(4096, 4096))
        ),
        "sparse24, interleaved, f32": (
            warp(sparse24, b_interleaved=True, out_dtype="float32"), (*whole, array(4096, 4096))
        ),
        "sparse24, f32, added": (added, (*whole, array(4096, 4096), array(4096, 4096, dtype="float32"))),
        "sparse24, relu2, scaled, multiplied": (
            scaled, (*whole, array(4096, 4096), array(4096, 4096), array(4096, dtype="float32"))
        ),
        "grouped24 rows, [n, k]": (
            warp(grouped.rows, b_k_major=True), (*packed(16384, 1024), array(4096, 4, 1024), sizes)
        ),
        "grouped24 columns, transposed": (
            warp(grouped.columns, b_k_major=True, transpose_out=True), (*whole, array(16384, 4096), sizes)
        ),
        "grouped24 contraction, f32": (
            warp(grouped.contraction, out_dtype="float32"), (*packed(1024, 16384), array(16384, 4096), sizes)
        ),
        "vnm, v = 64": (warp(vnm), (*packed(4096, 1024), array(64, 1024, dtype="int32"), array(4096, 4096))),
        "vnm, v = 128": (warp(vnm), (*packed(4096, 1024), array(32, 1024, dtype="int32"), array(4096, 4096))),
        "pack activations": (warp(api.pack_activations, features=True, tokens=True, interleaved=True), (y,)),
        "take activations": (warp(api.take_activations, interleaved=True), (y, taken, taken)),
        "pack weights": (
            warp(api.pack_thresholded, axis=0, dtype="bfloat16"),
            (array(4096, 4096, dtype="float32"), array(dtype="float32")),
        ),
        "gather rows": (warp(permute.gather_rows), (y, array(8192, dtype="int32"))),
        "sum copies": (warp(permute.sum_copies), (y, array(2048, 2, dtype="int32"))),
        "sort into groups": (
            warp(permute.sort_into_groups, groups=8, align=64, interleaved=True), (array(4096, 2, dtype="int32"),)
        ),
        "choose experts": (
            warp(permute.choose_experts, bias=None, top_k=2, cosine=True), (y, array(8, 4096, dtype="float32"))
        ),
    }  # fmt: skip


def _of_blackwell() -> dict[str, tuple[Any, tuple]]:
    """The kernels of sm_100 alone."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.blackwell import kernel

    def case(dtype: str, **options):
        values, b = (jax.ShapeDtypeStruct((4096, size), dtype) for size in (2048, 4096))
        return functools.partial(kernel.matmul, **options), (values, positions, b)

    positions = jax.ShapeDtypeStruct((32, 32, 128, 64), jnp.uint2)
    return {
        "tcgen05": case("bfloat16", b_k_major=False),
        "tcgen05, [n, k], two CTAs": case("bfloat16", two_ctas=True),
        "tcgen05, FP8": case("float8_e4m3fn"),
        "tcgen05, FP8, two CTAs": case("float8_e4m3fn", two_ctas=True),
    }


def _sparse_in(code: str) -> int:
    """Sparse products in SASS, or in PTX where it is not disassembled."""
    return len(re.findall(r"[HQ]MMA\.SP|UTC\w+MMA|mma\.sp", code))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", choices=[*TARGETS, "table"], help="or the table of all, for docs/gpus.md")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    if arguments.architecture == "table":
        print(table([row for name in TARGETS for row in compile_kernels(name, every=True)]), end="")
        return

    from pallas_kernels import device

    target = TARGETS[arguments.architecture]
    gpu = device.Gpu(target.name, ".".join(map(str, target.capability)), target.sms, target.block_bytes)
    setattr(device, "current", lambda: gpu)  # noqa: B010, a cached function's type is another
    kernels = _kernels() | (_of_blackwell() if arguments.architecture == "sm_100" else {})
    for name, (function, shapes) in kernels.items():
        if not arguments.all and name not in _FAST:
            continue
        for i, found in enumerate(_compile(arguments.architecture, function, shapes)):
            report, ptx, sass = found["report"], found["ptx"], found["sass"]
            spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
            row = {
                "kernel": name if i == 0 else f"{name} ({i + 1})",
                "architecture": arguments.architecture,
                "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
                "spills": sum(map(int, spills)),
                "shared_bytes": int(re.findall(r"smem_scratch_bytes=(\d+)", found["resources"])[0]),
                "sparse": min(len(re.findall(r"mma\.sp", ptx)), _sparse_in(ptx if sass is None else sass)),
                "foreign": sorted(set(re.findall(r"UTMA\w*|HGMMA", sass or ""))) if "tcgen05" not in name else [],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
