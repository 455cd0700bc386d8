"""The newcomer's page, from own text to an exported model: every command of it, in order, on a smaller model.

They run from a wheel, in a folder without checkout, so that nothing the package needs can be missing from it.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.test_house import FILES, ROOT
from tests.test_train_demo import BINDINGS

PAGE = ROOT / "docs" / "tutorials" / "own-text.md"
# What the tests' own environment stands for.
INSTALLING = ("git clone <this repository> venom-jax && cd venom-jax", "pip install -c constraints.txt -e '.[eval]'")


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
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"venom_jax/measured.json"} | {
        p.relative_to(ROOT).as_posix() for p in FILES if p.relative_to(ROOT).parts[0] == "configs"
    }
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "pallas_kernels" / "tuned").glob("*.json")}
    assert len(wanted) > 20
    assert not wanted - inside


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A newcomer's folder: some texts, and the checkout's test items."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "texts" / "deeper").mkdir(parents=True)
    rng = random.Random(0)
    words = ["the", "people", "of", "these", "states", "have", "seen", "peace", "and", "plenty", "under", "law"]
    documents = [" ".join(rng.choices(words, k=120)) + "." for _ in range(400)]
    (folder / "texts" / "one.txt").write_text(documents[0])
    (folder / "another.txt").write_text(" ".join(rng.choices(words, k=120)) + ".")
    lines = [json.dumps({"text": text}) + "\n" for text in documents[1:]]
    (folder / "texts" / "deeper" / "rest.jsonl").write_text("".join(lines))
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


@pytest.fixture(scope="module")
def results(folder, wheel):
    """(command, exit code, output) of each command of the page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    commands = [line for line in "".join(blocks).splitlines() if line not in INSTALLING]
    smaller = "".join(f' --gin_bindings="{binding}"' for binding in BINDINGS)
    lines = [command + smaller if "train.main" in command else command for command in commands]
    site = wheel.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        [sys.executable, shutil.copy(ROOT / "tests" / "run_commands.py", folder)],
        input="\n".join(lines),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    parts = re.split(r"^exit (\d+)\n", done.stdout, flags=re.MULTILINE)
    assert len(parts) == 2 * len(commands) + 1, done.stdout[-3000:]
    return [(command, int(parts[2 * i + 1]), parts[2 * i]) for i, command in enumerate(commands)]


def output_of(results, words):
    (found,) = [output for command, _, output in results if words in command]
    return found


def test_every_command_succeeds(results):
    """Without the extra eval, the tasks' command names it."""
    without = importlib.util.find_spec("lm_eval") is None
    for command, code, output in results:
        if without and "--tasks" in command:
            assert (code, "pip install -e '.[eval]'" in output) == (2, True), output
        else:
            assert code == 0, f"{command}\n{output}"
    programs = {command.split()[2] for command, *_ in results}
    assert programs == {f"train.{name}" for name in ("prepare", "main", "plot", "evaluate", "generate", "export")}


def test_each_says_what_the_page_says(results, folder):
    assert "documents" in output_of(results, "train.prepare")
    assert "venom E=4 k=1" in output_of(results, "--dry_run")
    assert "bits per byte" in output_of(results, "--text=")
    assert output_of(results, "train.generate").count("The state of") == 1
    for name in ("loss.png", "runs/own/report.md", "runs/own/sample.txt", "runs/own-hf/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    records = [json.loads(line) for line in (folder / "runs" / "more" / "metrics.jsonl").read_text().splitlines()]
    first, own = (next(r["loss"] for r in rows if r["kind"] == "train") for rows in (records, own_records(folder)))
    assert first < own - 0.5, "it goes on from what was learned"


def test_the_code_was_the_wheels(results, folder):
    (start,) = json.loads((folder / "runs" / "own" / "run.json").read_text())["starts"]
    assert start["git"] is None, "a checkout's code has a commit"


def own_records(folder):
    return [json.loads(line) for line in (folder / "runs" / "own" / "metrics.jsonl").read_text().splitlines()]
