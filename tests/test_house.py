"""The house: who may import whom, file sizes, no machine's paths, and documents that say what is true."""

import ast
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name

import pytest
from packaging.requirements import Requirement

from tests.programs import source_of
from train.config.settings import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "venom_jax", "train")
MAX_LINES = 600


def tracked_files():
    """What git tracks, or, in an unpacked archive, everything that is not hidden or built."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        files = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return [p for p in files if p.is_file()]


FILES = tracked_files()
PYTHON = [p for p in FILES if p.suffix == ".py"]
TEXT = [p for p in FILES if p.suffix in {".py", ".md", ".gin", ".toml", ".txt", ".yaml", ".json", ""}]
GIN = sorted(p.relative_to(ROOT).as_posix() for p in FILES if p.suffix == ".gin")


def name(path):
    return path.relative_to(ROOT).as_posix()


def imports_of(path):
    """Top-level packages a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def test_the_lists_of_files_are_not_empty():
    assert len(PYTHON) > 30
    assert len(GIN) > 3


def test_nothing_that_is_installed_imports_the_tests():
    """Who imports whom besides is held by `make lint`."""
    for path in PYTHON:
        if path.relative_to(ROOT).parts[0] in PACKAGES:
            assert "tests" not in imports_of(path), name(path)


def test_commands_are_thin():
    """What they do lives in a wing; `train.loop` alone is the run itself."""
    top = {path.name: len(path.read_text().splitlines()) for path in PYTHON if name(path.parent) == "train"}
    assert len(top) <= 22
    assert not {file: n for file, n in top.items() if n >= 100 and file != "loop.py"}


def test_gin_stays_inside_the_trainers_configuration():
    users = [name(p) for p in PYTHON if "gin" in imports_of(p) and p.relative_to(ROOT).parts[0] != "tests"]
    assert users == ["train/config/settings.py"]


def test_files_fit_into_a_head():
    long = {name(p): n for p in PYTHON if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"longer than {MAX_LINES} lines"


def test_no_paths_of_a_machine_and_no_open_ends():
    pattern = re.compile(r"(?<![\w.~])/(?:root|home|work|Users|mnt)/\w|\b(?:FIXME|XXX|HACK)\b|\bTODO\b(?!\(\S+\))")
    found = [
        f"{name(p)}:{i}: {line.strip()}"
        for p in TEXT
        if p != Path(__file__)
        for i, line in enumerate(p.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def test_every_module_says_what_it_is_for():
    silent = [name(p) for p in PYTHON if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent


@pytest.mark.parametrize("path", GIN)
def test_every_configuration_can_be_read(path):
    base = [] if path.startswith("configs/size/") else ["configs/size/tiny.gin"]
    files = [*base, path] if path != "configs/base.gin" else base
    config = load_config(files, [] if path.startswith("configs/data/") else ["Data.folder = 'data'"])
    assert config.train.steps > 0


@pytest.mark.parametrize("path", GIN)
def test_every_configuration_says_its_command(path):
    text = (ROOT / path).read_text()
    assert text.startswith("#"), f"{path} has no header"


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


DOCUMENTS = [p for p in FILES if p.suffix == ".md"]


def test_the_readmes_python_runs():
    snippets = blocks(ROOT / "README.md", "python")
    assert snippets
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def commands():
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield pytest.param(line, id=f"{name(path)}: {line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_in_the_documents_exist(line):
    words = shlex.split(line, comments=True)
    for word in words:
        if word.startswith("--gin_file="):
            assert (ROOT / word.split("=", 1)[1]).is_file(), word
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {w for w in words[1:] if "=" not in w} <= set(targets)
    program = words[words.index("-m") + 1] if "-m" in words else ""
    if program.split(".")[0] in PACKAGES:
        used = {w.lstrip("-").split("=")[0] for w in words if w.startswith("--")}
        assert used <= flags_of(program), f"{program} lacks a flag of: {line}"


def flags_of(module):
    """Names of the flags that a program defines."""
    source = source_of(module)
    return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)) | set(
        re.findall(r"add_argument\(\s*\"--(\w+)\"", source)
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_inside_the_project_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{name(path)} links to {target}"


def test_what_the_api_pages_are_filled_from_exists():
    """So that `make docs` finds each docstring, also where mkdocs is not installed."""
    names = [n for p in DOCUMENTS for n in re.findall(r"^::: ([\w.]+)$", p.read_text(), flags=re.MULTILINE)]
    assert len(names) > 30
    for dotted in names:
        assert resolve_name(dotted).__doc__, dotted


def test_the_pinned_versions_satisfy_the_declared_ones():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for requirement in map(Requirement, metadata.requires("venom-jax") or []):
        if requirement.marker is None:  # the extras' own pins depend on the machine
            assert pins[requirement.name] in requirement.specifier, requirement
