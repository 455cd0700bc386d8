"""A run that goes on in another workdir, with everything the first one had."""

import re
import shlex
import shutil
from dataclasses import replace

import pytest

from tests.test_house import ROOT
from tests.trainer import assert_same_bits, final_state, gin_bindings, records, run_config, three_phases
from train import loop
from train.config.settings import LearningRate, changed_bindings, load_config
from train.state import checkpoint


def going_on(config, workdir, **options):
    return loop.train(loop.prepare(config, workdir, init_from=options.pop("init_from"), init_state=True, **options))


def test_a_branch_ends_as_the_trunk_if_nothing_else_is_asked_for(tmp_path):
    """From step 6, inside the sparse phase: position of the data, moments, beta, phase and metrics come along."""
    config, trunk, _ = three_phases()
    assert going_on(config, tmp_path, init_from=f"{trunk}@6") == 0
    assert records(tmp_path) == records(trunk)
    assert_same_bits(final_state(config, tmp_path), final_state(config, trunk))
    assert (tmp_path / "checksums" / "6.json").read_bytes() == (trunk / "checksums" / "6.json").read_bytes()


def test_a_branch_may_decay_otherwise_and_goes_on_by_itself(tmp_path):
    config, trunk, _ = three_phases()
    decaying = replace(config, learning_rate=LearningRate(peak=1e-2, kind="wsd", warmup=2, decay=3, final_fraction=0))
    for source in (f"{trunk}@9", "gone@9"):  # the second time it has a checkpoint of its own
        prepared = loop.prepare(decaying, tmp_path, init_from=source, init_state=True)
        assert prepared.checkpoints.steps == [9]
        assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, 10))
        assert prepared.lock is not None
        prepared.lock.release()


def test_what_cannot_be_branched_is_refused_and_leaves_no_checkpoint(tmp_path):
    config, trunk, _ = three_phases()
    for source, changed, message in (
        (f"{trunk}@40", config, "no checkpoint of step 40"),
        (str(tmp_path / "none"), config, "needs a workdir of train.main"),
        (f"{trunk}@6", run_config(phases=config.phases.schedule, seed=3), "Train.seed is 0 there and 3 here"),
        (
            f"{trunk}@6",
            run_config(phases=config.phases.schedule, optimizer={"ema": 0.9}),
            "Optimizer.ema is None there",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            going_on(changed, tmp_path / "run", init_from=source)
        assert not any((tmp_path / "run" / "checkpoints").iterdir())
    damaged = shutil.copytree(trunk, tmp_path / "damaged")
    next(path for path in (damaged / "checkpoints" / "6").rglob("*") if path.is_file()).write_bytes(b"")
    with pytest.raises(ValueError, match=r"step 6 in .* is damaged \(.* has 0 bytes"):
        going_on(config, tmp_path / "run", init_from=f"{damaged}@6")
    with pytest.raises(ValueError, match="--init_state says what to take"):
        loop.prepare(config, tmp_path / "run", init_state=True)


def test_the_pages_commands_go_on_with_its_run():
    """Each command of docs/training.md in `runs/a`, and the branch of it, is accepted by that run's checkpoint."""
    lines = re.findall(r"^python -m train\.main .*", (ROOT / "docs" / "training.md").read_text(), flags=re.MULTILINE)
    given = [[word.partition("=")[::2] for word in shlex.split(line)[3:]] for line in lines]
    same = [words for words in given if ("--workdir", "runs/a") in words]
    branches = [words for words in given if any(value.startswith("runs/a@") for _, value in words)]
    assert len(same) >= 3
    assert len(branches) == 1

    def config_of(words):
        files, bindings = ([v for name, v in words if name == f"--gin_{kind}"] for kind in ("file", "bindings"))
        return load_config(files, bindings)

    trunk = config_of(same[0])
    saved = checkpoint.fingerprint(trunk, {})
    for words in (*same, *branches):
        wanted = checkpoint.fingerprint(config_of(words), {})
        checkpoint._check_same_run(ROOT, saved, wanted, trunk.train.steps)
    ((_, source),) = [word for word in branches[0] if word[0] == "--init_from"]
    assert source == f"runs/a@{trunk.train.steps}", "its last checkpoint, which is there"


def test_a_resume_tells_which_bindings_changed(tmp_path, capsys):
    config, trunk, _ = three_phases()
    workdir = shutil.copytree(trunk, tmp_path / "run")
    longer = replace(config, text=config.text.replace("Train.eval_every = 3", "Train.eval_every = 4"))
    assert loop.train(loop.prepare(longer, workdir)) == 0
    assert "changed binding: Train.eval_every = 3 -> 4\n" in capsys.readouterr().out


def test_changes_are_read_from_the_texts_that_gin_writes():
    schedule = [(0, "dense"), *((i, "act24") for i in range(1, 30))]
    texts = [
        load_config([], [*gin_bindings(Train_steps=100, **more), f"Phases.schedule = {schedule}"]).text
        for more in ({}, {"Train_seed": 5, "LearningRate_peak": 0.5})
    ]
    assert changed_bindings(*texts) == ("LearningRate.peak = 0.01 -> 0.5", "Train.seed = 0 -> 5")
    assert changed_bindings("", "Train.seed = 1\n") == ("Train.seed = None -> 1",)
