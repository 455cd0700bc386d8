"""What this GPU can do: its family, multiprocessors, shared memory."""

import dataclasses
import functools
from typing import Literal

import jax

HOPPER = "9.0"
HOPPER_SMS = 132
"""Multiprocessors of an H100 SXM: what a kernel is laid out for when it is lowered on a machine without a GPU."""
HOPPER_SMEM_BYTES = 227 * 1024
"""Shared memory one block may use."""

Family = Literal["hopper", "warp", "blackwell"]
"""Which kernels a GPU takes by itself: those of Hopper (`wgmma.sp`, 9.0), those of single warps (`mma.sp`, 8.x and
12.x), or XLA's dense products, since its fast sparse path is written and has not run (`tcgen05.mma.sp`, 10.x)."""

FAMILIES: dict[Family, str] = {
    "hopper": "H100, H200, GH200",
    "warp": "A100, RTX 30, RTX 40, L4, L40S, RTX 50, RTX PRO 6000",
    "blackwell": "B200, GB200, B300",
}


def family_of(compute_capability: str) -> Family | None:
    """The family of a compute capability such as "8.6"; None below 8.0, and for what is no NVIDIA GPU."""
    major = int(compute_capability.split(".")[0]) if compute_capability[:1].isdigit() else 0
    if major == 9:
        return "hopper" if compute_capability == HOPPER else None
    if major in (8, 12):
        return "warp"
    return "blackwell" if major in (10, 11) else None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """name: as the driver gives it; compute_capability: "9.0" is Hopper; sm_count: multiprocessors; smem_bytes: shared
    memory that a block may use."""

    name: str
    compute_capability: str
    sm_count: int
    smem_bytes: int = HOPPER_SMEM_BYTES

    @property
    def is_hopper(self) -> bool:
        return self.compute_capability == HOPPER

    @property
    def family(self) -> Family | None:
        return family_of(self.compute_capability)

    @property
    def file_name(self) -> str:
        """The name of this GPU's file of tuned tiles: "NVIDIA H100 80GB HBM3" -> "nvidia_h100_80gb_hbm3"."""
        return self.name.lower().replace(" ", "_")


ASSUMED = Gpu("H100", HOPPER, HOPPER_SMS, HOPPER_SMEM_BYTES)
"""What a kernel is laid out for when it is lowered on a machine without a GPU."""


@functools.cache
def current() -> Gpu | None:
    """The default device's GPU, or None where the default device is none."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return None
    smem = getattr(device, "shared_memory_per_block_optin", HOPPER_SMEM_BYTES)
    return Gpu(device.device_kind, str(device.compute_capability), device.core_count, smem)


def current_or_assumed() -> Gpu:
    return current() or ASSUMED


def hopper_available() -> bool:
    """Whether the default device is a Hopper GPU."""
    gpu = current()
    return gpu is not None and gpu.is_hopper


def family() -> Family | None:
    """The default device's family; None for a GPU without sparse tensor cores, and for no GPU."""
    if hopper_available():
        return "hopper"
    gpu = current()
    return None if gpu is None else gpu.family


def sm_count() -> int:
    """Blocks of a persistent grid: the GPU's multiprocessors, or an H100's where there is no GPU."""
    return current_or_assumed().sm_count


def arrays_lie_on_one_device() -> bool:
    """Whether XLA has nothing to split in what is being traced: one device, or inside `jax.shard_map` over all axes.

    A kernel is one call that XLA cannot cut into parts for several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    inside_shard_map = bool(mesh.axis_names) and all(t == jax.sharding.AxisType.Manual for t in mesh.axis_types)
    return inside_shard_map or jax.device_count() == 1
