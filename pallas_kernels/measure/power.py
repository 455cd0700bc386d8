"""What a GPU draws while a program runs, through NVML: power, energy, and the clock that the power limit leaves.

NVML is the driver's own library (libnvidia-ml.so.1); its counter of energy, unlike its reading of power, is no average
over the last second.
"""

import collections
import ctypes
import statistics
import threading
import time

import jax

from pallas_kernels.measure import timing

_SM_CLOCK = 1
_SW_POWER_CAP = 0x4
"""The bit of the reasons for a lower clock that says: to stay within the power limit."""


class Meter:
    """Energy, clock and power limit of the first GPU.

    Raises:
      OSError: no NVIDIA driver, or it refuses.
    """

    def __init__(self):
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(0), ctypes.byref(self._device))

    def joules(self) -> float:
        """Since the driver was loaded."""
        return self._read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong) / 1e3

    def limit_watts(self) -> float:
        return self._read("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint) / 1e3

    def ghz(self) -> float:
        """The clock of the multiprocessors."""
        return self._read("nvmlDeviceGetClockInfo", ctypes.c_uint, ctypes.c_uint(_SM_CLOCK)) / 1e3

    def is_capped(self) -> bool:
        """Whether the power limit lowers the clock."""
        return bool(self._read("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong) & _SW_POWER_CAP)

    def _read(self, function: str, kind, *arguments) -> int:
        value = kind()
        self._call(function, self._device, *arguments, ctypes.byref(value))
        return value.value

    def _call(self, function: str, *arguments) -> None:
        if status := getattr(self._nvml, function)(*arguments):
            raise OSError(f"{function} of libnvidia-ml.so.1 returned {status}; does `nvidia-smi` work?")


def measure(meter: Meter, run: timing.Run, calls: int, *, settle: float = 0.3, seconds: float = 0.7) -> dict:
    """Repeat `run`, of `calls` calls, without a pause: {"ms", "watts", "joules", "ghz", "capped"} of one call.

    Args:
      settle: seconds before the reading begins, until clock and power have settled.
      seconds: how long to read.
    """
    _repeat(run, settle)
    stop, samples = threading.Event(), []

    def sample():
        while not stop.is_set():
            samples.append((meter.ghz(), meter.is_capped()))
            stop.wait(0.02)

    sampler = threading.Thread(target=sample, daemon=True)
    joules, start = meter.joules(), time.perf_counter()
    sampler.start()
    count = _repeat(run, seconds)
    elapsed, joules = time.perf_counter() - start, meter.joules() - joules
    stop.set()
    sampler.join()
    each = elapsed / (count * calls)
    return {
        "ms": round(1e3 * each, 4),
        "watts": round(joules / elapsed, 1),
        "joules": round(joules / elapsed * each, 4),
        "ghz": round(statistics.mean(ghz for ghz, _ in samples), 3),
        "capped": round(statistics.mean(capped for _, capped in samples), 2),
    }


def _repeat(run: timing.Run, seconds: float) -> int:
    """How often `run` ran; the next is always queued before the last has ended."""
    queued, count, end = collections.deque([run()]), 1, time.perf_counter() + seconds
    while time.perf_counter() < end:
        queued.append(run())
        count += 1
        jax.block_until_ready(queued.popleft())
    jax.block_until_ready(list(queued))
    return count
