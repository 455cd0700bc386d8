"""The package as a wheel, outside the checkout: everything it needs at run time is inside."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest

from tests.test_demo import BINDINGS
from tests.test_house import FILES, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the tracked files, built from a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in FILES:
        target = folder / "source" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "source"]
    done = subprocess.run([sys.executable, "-m", *build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_configurations_and_measurements_are_inside(wheel):
    inside = {re.sub(r"^[^/]+\.data/data/share/venom-jax", "docs", name) for name in zipfile.ZipFile(wheel).namelist()}
    wanted = {p.relative_to(ROOT).as_posix() for p in FILES if p.relative_to(ROOT).parts[0] == "configs"}
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs" / "results" / "h100").glob("*.json")}
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "pallas_kernels" / "tuned").glob("*.json")}
    assert len(wanted) > 20
    assert not wanted - inside


def test_it_trains_where_no_checkout_is(wheel, tmp_path):
    site, home = tmp_path / "site", tmp_path / "elsewhere"
    home.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    shutil.copy(ROOT / "tests" / "run_commands.py", home)
    tiny = "--gin_file=configs/size/tiny.gin --gin_file=configs/data/synthetic.gin"
    smaller = "".join(f' --gin_bindings="{binding}"' for binding in (*BINDINGS, "Train.steps = 3"))
    cache = str(jax.config.jax_compilation_cache_dir or tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, home / "run_commands.py"],
        input=f"python -m train.main {tiny} --workdir=run {smaller}\npython -m train.evaluate --workdir=run\n",
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(site), "JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("exit 0\n") == 2, done.stdout + done.stderr
    (start,) = json.loads((home / "run" / "run.json").read_text())["starts"]
    assert start["git"] is None, "this is the checkout's code, not the wheel's"
    assert "Data.synthetic = True" in (Path(home) / "run" / "config.gin").read_text()
