"""The examples run, and what their headers say about the loss is so."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_example_has_its_test_here():
    own = {"linen_model", "mixture_of_experts", "phases_without_train", "transformer"}
    assert set(NAMES) == own | {"linen_fsdp", "nnx_scan"}, "the latter in tests/eight_devices"


@pytest.mark.parametrize("name", NAMES)
def test_headers_say_the_command(name):
    assert f"python examples/{name}.py\n" in (load(name).__doc__ or "")


def test_transformer():
    losses = load("transformer").main()
    assert losses[0] > np.log(128) - 0.5
    dense, sparse, final = (np.mean(losses[end - 5 : end]) for end in (60, 120, 180))
    assert final < sparse < dense
    assert final < losses[0] / 2


def test_linen_model_as_a_command(tmp_path):
    """The whole way once, from another folder; the others run in this process, which saves time."""
    command = [sys.executable, str(EXAMPLES / "linen_model.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, sparse, dense = (float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout))
    assert sparse < first
    assert dense < 1.3 * sparse


def test_mixture_of_experts():
    found = load("mixture_of_experts").main()
    assert found["last"] < 2 / 3 * found["first"]
    assert found["difference"] < 1e-5


def test_phases_without_train():
    losses = np.array(load("phases_without_train").main())
    dense, entering, sparse, final = (losses[a:b].mean() for a, b in ((70, 80), (80, 85), (190, 200), (290, 300)))
    assert dense < losses[0] / 2
    assert entering > 1.5 * dense
    assert sparse < entering
    assert final < dense
