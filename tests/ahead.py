"""Compile kernels for an H200 on a machine without a GPU: XLA's compile-only topology, Mosaic GPU's pipeline, ptxas."""

import importlib.util
import pathlib
import re
import shutil
from typing import NamedTuple

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import utils
from jax.sharding import NamedSharding, PartitionSpec

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 dnn_version: "9.10.0"
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "sm_90"
"""


def _has_compiler() -> bool:
    try:
        plugin = importlib.util.find_spec("jax_plugins.xla_cuda13")
    except ModuleNotFoundError:
        plugin = None
    return plugin is not None and shutil.which("ptxas") is not None


needs_compiler = pytest.mark.skipif(
    not _has_compiler(), reason="needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and ptxas on the PATH"
)


class Kernel(NamedTuple):
    """What ptxas says of a kernel."""

    registers: int
    spilled: int
    """Bytes, stores and loads."""
    warnings: list[str]
    """Among them that products in flight were serialized."""


@pytest.fixture
def compile_ahead(monkeypatch, tmp_path):
    """compile(function, *shapes) -> the kernels in it, compiled for an H200."""
    monkeypatch.setattr(utils, "_infer_arch", lambda: (9, 0))
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=_H200, topology="1x1x1")
    except NotImplementedError:
        pytest.skip("needs JAX_PLATFORMS=cpu: a plugin that has looked for a GPU in vain describes none")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("gpu",))
    where = NamedSharding(mesh, PartitionSpec())

    def compile_(function, *shapes) -> list[Kernel]:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
        jax.jit(function).lower(*shapes).compile()
        found = [_read(path) for path in sorted(pathlib.Path(tmp_path).glob("*.ptxas"))]
        assert found, "ptxas reported nothing"
        return found

    return compile_


def _read(path: pathlib.Path) -> Kernel:
    text = path.read_text()
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.findall(r"Used (\d+) registers", text)
    assert registers, text
    assert spilled, text
    odd = [line for line in text.splitlines() if "arning" in line or "C75" in line]
    return Kernel(max(map(int, registers)), sum(int(n) for pair in spilled for n in pair), odd)
