"""Shared set-up: compilation is cheap, shapes are checked, GPU tests skip where there is no Hopper GPU."""

import atexit
import os
import platform
import shutil
import sys
import tempfile

# Most of the time of these tests is compilation of programs that run once, on tiny arrays. So every process of a test
# run, those that tests start among them, reads what another one compiled (a warm cache gives the same bits), and on a
# CPU the compiler neither optimises nor verifies its own steps, nor divides what is small. Set before anything imports
# jax, which reads it then. On x86 it also leaves out MLIR, which takes as long as all the rest; what it has instead
# seems to make an FMA of some products and sums and not of others: tests of equal bits need a processor without, AVX.
if shutil.which("nvidia-smi") is None and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    _QUICK = "--xla_backend_optimization_level=0 --xla_cpu_emitter_verification_level=0"
    _QUICK += " --xla_cpu_parallel_codegen_split_count=1"
    if platform.machine() == "x86_64":
        _QUICK += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_max_isa=AVX"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled = tempfile.mkdtemp(prefix="compilation-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import gin
import jax
import pytest
from jaxtyping import install_import_hook

# Before anything of these packages is imported: every annotation of an array function becomes an assertion. Modules
# that validate plain values themselves (venom_jax.pattern, venom_jax.dispatch) are left to their own messages.
_ARRAY_MODULES = [
    "activation.linear",
    "activation.selection",
    "calibrate",
    "expert_parallel",
    "ffn",
    "ffn_parts",
    "formats",
    "layer",
    "linen",
    "mlp",
    "mvue",
    "permutation",
    "phases",
    "pretrained.decoder",
    "prune",
    "router",
    "sharded_ffn",
    "stats",
    "threshold",
    "trees",
    "vnm",
]
install_import_hook(["pallas_kernels", *(f"venom_jax.{name}" for name in _ARRAY_MODULES)], "beartype.beartype")

# tests/test_eight_devices.py runs them where there is one device.
collect_ignore = [] if jax.device_count() >= 8 else ["eight_devices"]


def _has_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    # Python hears no signal while it waits in the driver for a kernel that hangs. A thread ends the process instead,
    # and pytest-xdist names the test and goes on.
    mark = pytest.mark.timeout(method="thread")
    if marked and not _has_hopper():
        mark = pytest.mark.skip(reason="needs an NVIDIA GPU of compute capability 9.0 (H100, H200)")
    for item in marked:
        item.add_marker(mark)


@pytest.fixture
def strict_dtypes():
    """No silent promotion between dtypes; optax and nnx layers in bf16 would not survive it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def no_bindings():
    """Bindings that an earlier test has read would reach every recipe that a test takes by its name; trust likewise."""
    gin.clear_config()
    if settings := sys.modules.get("train.config.settings"):
        settings.trust_imports(False)
