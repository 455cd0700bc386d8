"""What comes from outside is data: nothing in it is executed, and it cannot name files outside its folder."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from tests.test_house import PACKAGES, PYTHON, ROOT
from tests.trainer import gin_bindings, token_folder
from train.config.settings import load_config
from train.data.token_files import MANIFEST, open_dataset
from train.main import run

# Modules that execute what they read, and calls that do so or allow others to.
EXECUTING = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
SWITCHES = {"allow_pickle", "trust_remote_code", "confirm_run_unsafe_code", "shell", "weights_only"}


def in_packages():
    return [path for path in PYTHON if path.relative_to(ROOT).parts[0] in PACKAGES]


def test_nothing_that_is_read_is_executed():
    found = []
    for path in in_packages():
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names} & EXECUTING
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]} & EXECUTING
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & CALLS
            elif isinstance(node, ast.keyword):
                names = {node.arg} & SWITCHES
            found += [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {name}" for name in names]
    assert len(in_packages()) > 60
    assert not found


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module on the path that leaves a trace when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sneaky.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    return tmp_path / "trace"


@pytest.mark.parametrize("statement", ["import sneaky", "from sneaky import x", "import sneaky.deep as train"])
@pytest.mark.parametrize("how", ["binding", "file", "included"])
def test_gin_files_import_nothing_foreign(module, tmp_path, capsys, statement, how):
    (tmp_path / "evil.gin").write_text(statement + "\n")
    (tmp_path / "outer.gin").write_text("include 'evil.gin'\n")
    files = {"binding": [], "file": ["evil.gin"], "included": ["outer.gin"]}[how]
    bindings = [*gin_bindings(), *([statement] if how == "binding" else [])]
    assert run(files, bindings, tmp_path / "run", dry_run=True) == 2
    error = capsys.readouterr().err
    assert "imports sneaky" in error
    assert "--gin_allow_imports" in error
    assert not module.exists()


def test_imports_can_be_allowed(module, tmp_path):
    (tmp_path / "mine.gin").write_text("import sneaky\n")
    assert run(["mine.gin"], gin_bindings(), tmp_path / "run", dry_run=True, gin_allow_imports=True) == 0
    assert module.exists()


def test_gin_cannot_call_what_is_not_the_trainers(tmp_path):
    with pytest.raises(ValueError, match="imports __gin__"):
        load_config([], ["from __gin__ import dynamic_registration", *gin_bindings()])
    with pytest.raises(ValueError, match="No configurable matching"):
        load_config([], [*gin_bindings(), "Data.folder = @os.getcwd()"])


def test_files_that_include_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one, other in ("ab", "ba"):
        Path(f"{one}.gin").write_text(f"include '{other}.gin'\n")
    with pytest.raises(ValueError, match=r"includes [ab]\.gin, which includes it"):
        load_config(["a.gin"], gin_bindings())


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/hostname", "sub/train-00000.bin"])
def test_a_manifest_names_files_of_its_folder_only(tmp_path, name):
    folder = tmp_path / "tokens"
    shutil.copytree(token_folder(), folder)
    shutil.copy(folder / "train-00000.bin", tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"]["files"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="which is not in its folder"):
        open_dataset(folder)
