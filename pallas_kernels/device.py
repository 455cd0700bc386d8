"""What this GPU can do: architecture, multiprocessors, shared memory."""

import dataclasses
import functools

import jax

HOPPER = "9.0"
HOPPER_SMS = 132
"""Multiprocessors of an H100 SXM: what a kernel is laid out for when it is lowered on a machine without a GPU."""
HOPPER_SMEM_BYTES = 227 * 1024
"""Shared memory one block may use."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """name: as the driver gives it; compute_capability: "9.0" is Hopper; sm_count: multiprocessors."""

    name: str
    compute_capability: str
    sm_count: int

    @property
    def is_hopper(self) -> bool:
        return self.compute_capability == HOPPER

    @property
    def file_name(self) -> str:
        """The name of this GPU's file of tuned tiles: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3"."""
        return self.name.lower().replace(" ", "_")


@functools.cache
def current() -> Gpu | None:
    """The default device's GPU, or None where the default device is none."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return None
    return Gpu(device.device_kind, str(device.compute_capability), device.core_count)


def hopper_available() -> bool:
    """Whether the default device is a Hopper GPU."""
    gpu = current()
    return gpu is not None and gpu.is_hopper


def sm_count() -> int:
    """Blocks of a persistent grid: the GPU's multiprocessors, or an H100's where there is no GPU."""
    gpu = current()
    return HOPPER_SMS if gpu is None else gpu.sm_count


def arrays_lie_on_one_device() -> bool:
    """Whether XLA has nothing to split in what is being traced: one device, or inside `jax.shard_map` over all axes.

    A kernel is one call that XLA cannot cut into parts for several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    inside_shard_map = bool(mesh.axis_names) and all(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
    return inside_shard_map or jax.device_count() == 1
