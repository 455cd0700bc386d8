"""A workdir at an address, in fsspec's memory: like object storage it knows no lock and keeps no local file."""

import shutil
import sys

import fsspec
import pytest

from tests.trainer import assert_same_bits, final_state, gin_bindings, records, three_phases
from train.evaluation import validation
from train.main import run
from train.state.remote import Remote
from train.state.run_info import read_starts

URL = "memory://bucket/run"
STORE = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def _this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    STORE.store.clear()


@pytest.fixture
def arrived():
    """The workdir of a run of 12 steps, of which the checkpoints 9 and 12 were sent, 12 last."""
    trunk, local = three_phases()[1], Remote(URL).local
    shutil.copytree(trunk, local)
    for step in (6, 9, 12):
        Remote(URL).send(step)
    shutil.rmtree(local / "checkpoints" / "6")
    Remote(URL).send(12)
    return trunk


def go_on():
    return run([str(three_phases()[1] / "config.gin")], [], URL)


def test_what_is_no_longer_kept_here_is_not_kept_there(arrived):
    assert Remote(URL).steps() == [9, 12]
    there = {name.removeprefix("/bucket/run/") for name in STORE.find("/bucket/run")}
    assert {"config.gin", "metrics.jsonl", "run.json", "report.md", "checksums/12.json"} <= there
    assert not any(name.startswith((".", "checkpoints/6")) for name in there)


def test_a_run_goes_on_from_its_address_on_another_machine(arrived):
    """The newest checkpoint has not arrived, and nothing is left here: from the one before, to the same bits."""
    STORE.rm_file("/bucket/run/checksums/12.json")
    shutil.rmtree(Remote(URL).local)
    assert go_on() == 0
    local = Remote(URL).local
    assert [start["step"] for start in read_starts(local)] == [0, 9]
    assert_same_bits(final_state(three_phases()[0], local), final_state(three_phases()[0], arrived))
    assert records(local) == records(arrived)
    assert Remote(URL).steps() == [9, 10, 11, 12]
    assert b'"step": 9' in STORE.cat_file("/bucket/run/run.json")


def test_the_address_decides(arrived):
    """What was deleted there is not brought back from the local copy."""
    STORE.rm("/bucket/run", recursive=True)
    remote = Remote(URL)
    remote.bring()
    assert not [path for path in remote.local.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_damaged_local_copy_is_fetched_again(arrived):
    remote = Remote(URL)
    remote.bring()
    spoiled = next(path for path in (remote.local / "checkpoints" / "12").rglob("*") if path.is_file())
    content = spoiled.read_bytes()
    spoiled.write_bytes(b"")
    remote.bring()
    assert spoiled.read_bytes() == content


def test_a_checkpoint_is_read_beside_the_run(arrived):
    kept = {path.name for path in (Remote(URL).local / "checkpoints").iterdir()}
    assert validation.restore(f"{URL}@9").step == 9
    assert validation.restore(URL).step == 12
    with pytest.raises(ValueError, match=r"memory://bucket/run holds no checkpoint of step 5; it has \[9, 12\]"):
        validation.restore(f"{URL}@5")
    assert {path.name for path in (Remote(URL).local / "checkpoints").iterdir()} == kept, "as the run left it"


def test_names_that_lead_out_of_the_folder_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(type(STORE), "find", lambda *_: ["/bucket/run/config.gin", "/bucket/run/../../x"])
    with pytest.raises(ValueError, match=r"holds '\.\./\.\./x', which leads out of the folder"):
        Remote(URL).bring()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sent_stops_the_run(monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("quota exceeded")

    three_phases()
    monkeypatch.setattr(type(STORE), "put_file", refuse)
    assert go_on() == 1
    assert f"could not be sent to {URL}: quota exceeded" in capsys.readouterr().err


def test_addresses_that_cannot_be_used_are_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for workdir, message in (("gs://bucket/run", "package gcsfs"), ("nowhere://bucket/run", "Protocol not known")):
        assert run([], gin_bindings(), workdir) == 2
        assert message in capsys.readouterr().err
    assert run([], gin_bindings(Data_folder="gs://bucket/data"), tmp_path / "run") == 2
    assert "token files are mapped into memory; copy the folder" in capsys.readouterr().err
