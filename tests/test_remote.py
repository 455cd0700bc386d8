"""A workdir at an address, in fsspec's memory: like object storage it knows no lock and keeps no local file."""

import shutil
import sys

import fsspec
import pytest

from tests.trainer import assert_same_bits, final_state, gin_bindings, records
from train import evaluate
from train.config import load_config
from train.main import run
from train.remote import Remote
from train.run_info import read_starts

URL = "memory://bucket/run"
BINDINGS = [*gin_bindings(Train_checkpoint_every=3), "Phases.schedule = [(0, 'dense'), (4, 'all24'), (8, 'dense')]"]
STORE = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def _this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    STORE.store.clear()


@pytest.fixture
def finished():
    """(its last state, its records) of a run that ended at the address."""
    assert run([], BINDINGS, URL) == 0
    local = Remote(URL).local
    return final_state(load_config([], BINDINGS), local), records(local)


def test_a_run_goes_on_from_its_address_on_another_machine(finished):
    """The newest checkpoint has not arrived, and nothing is left here: from the one before, to the same bits."""
    assert Remote(URL).steps() == [9, 12], "the newest two are kept, there as here"
    there = {name.removeprefix("/bucket/run/") for name in STORE.find("/bucket/run")}
    assert {"config.gin", "metrics.jsonl", "run.json", "report.md", "checksums/12.json"} <= there
    assert not any(name.startswith(".") for name in there)
    STORE.rm_file("/bucket/run/checksums/12.json")
    shutil.rmtree(Remote(URL).local)
    assert run([], BINDINGS, URL) == 0
    local = Remote(URL).local
    assert [start["step"] for start in read_starts(local)] == [0, 9]
    assert_same_bits(final_state(load_config([], BINDINGS), local), finished[0])
    assert records(local) == finished[1]
    assert Remote(URL).steps() == [9, 12]


def test_the_address_decides(finished):
    """What was deleted there is not brought back from the local copy."""
    STORE.rm("/bucket/run", recursive=True)
    remote = Remote(URL)
    remote.bring()
    assert not [path for path in remote.local.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_checkpoint_is_read_beside_the_run(finished):
    assert evaluate.restore(f"{URL}@9").step == 9
    assert evaluate.restore(URL).step == 12
    with pytest.raises(ValueError, match=r"memory://bucket/run holds no checkpoint of step 5; it has \[9, 12\]"):
        evaluate.restore(f"{URL}@5")
    assert {path.name for path in (Remote(URL).local / "checkpoints").iterdir()} == {"9", "12"}, "as the run left it"


def test_names_that_lead_out_of_the_folder_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(type(STORE), "find", lambda *_: ["/bucket/run/config.gin", "/bucket/run/../../x"])
    with pytest.raises(ValueError, match=r"holds '\.\./\.\./x', which leads out of the folder"):
        Remote(URL).bring()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sent_stops_the_run(monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(type(STORE), "put_file", refuse)
    assert run([], BINDINGS, URL) == 1
    assert f"could not be sent to {URL}: quota exceeded" in capsys.readouterr().err


def test_addresses_that_cannot_be_used_are_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for workdir, message in (("gs://bucket/run", "package gcsfs"), ("nowhere://bucket/run", "Protocol not known")):
        assert run([], BINDINGS, workdir) == 2
        assert message in capsys.readouterr().err
    assert run([], [*BINDINGS, "Data.folder = 'gs://bucket/data'"], tmp_path / "run") == 2
    assert "token files are mapped into memory; copy the folder" in capsys.readouterr().err
