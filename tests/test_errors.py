"""Bad input: one clear line on stderr, exit code 2, and nothing compiled."""

import shutil
import subprocess

import jax
import pytest
from orbax.checkpoint import v1 as ocp

from tests.trainer import gin_bindings, run_config, token_folder
from train import loop
from train.data.token_files import open_dataset
from train.main import run
from train.state.checkpoint import fingerprint


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch):
    """A run that gets past its checks, or compiles on the way, fails the test."""

    def refuse(*_):
        raise AssertionError("training started")

    monkeypatch.setattr(loop, "train", refuse)
    monkeypatch.setattr(jax, "jit", refuse)


@pytest.fixture
def error_of(tmp_path, capsys):
    """error_of(workdir=..., Model_layers=...): the line that the run prints."""

    def run_it(*more, workdir=None, **overrides):
        bindings = gin_bindings(**overrides) + list(more)
        assert run([], bindings, workdir or tmp_path / "run") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return run_it


VENOM = "Phases.schedule = [(0, 'dense'), (4, 'venom')]"


def test_unknown_gin_name(error_of):
    assert "No configurable matching 'Modle'. In bindings string line" in error_of("Modle.layers = 3")


def test_unknown_gin_parameter(error_of):
    assert "'Train' doesn't have a parameter named 'step'" in error_of("Train.step = 3")


def test_ffn_not_divisible_by_four_times_experts(error_of):
    message = error_of(VENOM, Model_d_ffn=72)
    assert "d_ffn = 72" in message
    assert "divisible by 16" in message


def test_d_model_not_divisible_by_four(error_of):
    message = error_of("Phases.schedule = [(0, 'dense'), (4, 'all24')]", Model_d_model=34, Model_heads=1)
    assert "d_model = 34 is no multiple of 4" in message


def test_more_experts_a_token_than_experts(error_of):
    assert "top_k = 5 exceeds experts = 4" in error_of(VENOM, "venom/Recipe.top_k = 5")


def test_phases_out_of_order(error_of):
    message = error_of("Phases.schedule = [(0, 'dense'), (8, 'venom'), (4, 'dense')]")
    assert "the starts [0, 8, 4]; they must increase" in message


def test_sequence_longer_than_the_data(error_of):
    assert "sequence length 1000000 needs 1000001 tokens" in error_of(Train_seq_len=1_000_000)


def test_truncated_token_file(error_of, tmp_path):
    shutil.copytree(token_folder(), tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    message = error_of(Data_folder=str(tmp_path / "data"))
    assert "train-00000.bin" in message
    assert "truncated" in message


def test_foreign_token_file(error_of, tmp_path):
    shutil.copytree(token_folder(), tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.bin"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert "is not the one that was prepared" in error_of(Data_folder=str(tmp_path / "data"))


def test_folder_that_is_no_data(error_of, tmp_path):
    assert "train.prepare" in error_of(Data_folder=str(tmp_path))


def test_tokenizer_larger_than_the_vocabulary(error_of):
    size = open_dataset(token_folder(), "train").vocab_size
    message = error_of(Model_vocab_size=size - 1)
    assert f"has {size} tokens but Model.vocab_size={size - 1}" in message


def test_tokenizer_smaller_than_the_vocabulary_is_fine():
    train, _ = loop.open_data(run_config())
    assert train.vocab_size < run_config().model.vocab_size


def test_workdir_with_another_model(error_of, tmp_path):
    saved = fingerprint(run_config(shape={"layers": 3}), {})
    with ocp.training.Checkpointer(str(tmp_path / "run" / "checkpoints")) as checkpointer:
        metadata = {"fingerprint": saved, "seconds": 0.0, "masks": False}
        checkpointer.save(6, {"x": jax.numpy.zeros(1)}, force=True, custom_metadata=metadata)
    message = error_of()
    assert "Model.layers is 3 there and 2 here" in message
    assert "another --workdir" in message


def test_hopper_without_a_hopper_gpu(error_of):
    message = error_of(Train_implementation="hopper")
    assert "compute capability 9.0" in message


def test_unwritable_workdir(error_of, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in error_of(workdir=tmp_path / "file")


def test_read_only_workdir(error_of, tmp_path):
    """A read-only mount, which stops root too."""
    workdir = tmp_path / "mounted"
    workdir.mkdir()
    bound = subprocess.run(["mount", "--bind", workdir, workdir], capture_output=True, check=False)
    if bound.returncode:
        pytest.skip("mounting needs CAP_SYS_ADMIN")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", workdir], check=True)
        assert "cannot be written to (Read-only file system)" in error_of(workdir=workdir)
    finally:
        subprocess.run(["umount", workdir], check=True)


def test_no_size(capsys, tmp_path):
    assert run(["configs/recipe/venom.gin"], [], tmp_path) == 2
    assert "--gin_file=configs/size/tiny.gin" in capsys.readouterr().err


def test_an_empty_workdir(capsys):
    """As an unset variable of a shell gives."""
    assert run([], gin_bindings(), "") == 2
    assert capsys.readouterr().err == "error: --workdir= is empty; give a folder\n"


def test_a_dry_run_tells_that_there_are_no_data(tmp_path, capsys):
    assert run([], gin_bindings(Data_folder=str(tmp_path / "none")), "", dry_run=True) == 0
    plan = capsys.readouterr().out
    assert "phase           steps 0 to" in plan
    assert f"note            the run would stop: {tmp_path}/none holds no manifest.json" in plan
    assert run([], gin_bindings(), "", dry_run=True) == 0
    assert "note" not in capsys.readouterr().out
