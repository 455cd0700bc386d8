"""Runs that go on with something changed, and configurations that say what nobody means."""

import re

import pytest

from tests.trainer import gin_bindings, records, run_config, run_to_end, token_folder
from train import loop, main
from train.config.settings import load_config, trust_imports
from train.data.token_files import open_dataset
from train.evaluation.harness import token_pair
from train.evaluation.validation import read_config
from train.records.run_report import _cells


def test_a_run_with_phases_by_fractions_is_lengthened(tmp_path):
    """Phases that have begun keep their starts; what is to come moves with Train.steps."""
    phases = ((0, "dense"), (0.25, "act24"), (0.75, "dense"))
    assert run_to_end(run_config(phases=phases), tmp_path) == 0
    config = run_config(phases=phases, steps=16)
    assert [phase.start for phase in config.schedule.phases] == [0, 4, 12]
    run = loop.prepare(config, tmp_path)
    assert [phase.start for phase in run.config.schedule.phases] == [0, 3, 9]
    assert loop.train(run) == 0
    assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, 17))


def test_fewer_steps_than_there_are(tmp_path):
    assert run_to_end(run_config(), tmp_path) == 0
    with pytest.raises(ValueError, match=r"Train.steps=7, but workdir .* has 12 steps"):
        loop.prepare(run_config(steps=7), tmp_path)


def test_a_dry_run_of_another_model_than_the_workdirs(tmp_path, capsys):
    assert run_to_end(run_config(), tmp_path) == 0
    assert main.run([], gin_bindings(), tmp_path, dry_run=True) == 0
    assert main.run([], gin_bindings(Model_layers=3), tmp_path, dry_run=True) == 2
    assert "the run would stop: workdir" in capsys.readouterr().out


@pytest.mark.parametrize("binding", ["Recipe.experts = 8", "dense/Recipe.experts = 4"])
def test_the_dense_recipe_stays_dense(binding):
    schedule = "Phases.schedule = [(0, 'dense'), (4, 'venom')]"
    with pytest.raises(ValueError, match=r"'dense' with experts = \d would not be dense.*venom/Recipe.experts"):
        load_config([], [*gin_bindings(), schedule, binding])


def test_a_mistake_in_a_file_is_told_with_the_file(tmp_path):
    (path := tmp_path / "own.gin").write_text("Train.steps = [1,\n")
    with pytest.raises(ValueError, match="line") as told:
        load_config([str(path)], gin_bindings())
    assert not re.match(r"^\(", str(told.value))


def test_the_flag_for_imports_reaches_every_program_that_reads_a_run(tmp_path):
    (tmp_path / "config.gin").write_text("import json\n" + "\n".join(gin_bindings()))
    with pytest.raises(ValueError, match="--gin_allow_imports"):
        read_config(tmp_path)
    trust_imports(True)
    try:
        assert read_config(tmp_path).train.steps == 12
    finally:
        trust_imports(False)
    for name in ("evaluate", "generate", "export", "prune", "main"):
        with open(loop.__file__.replace("loop.py", f"{name}.py")) as source:
            assert "gin_allow_imports" in source.read()


def test_a_token_over_the_border_of_context_and_continuation():
    """'the c' + 'at' is one token more than nothing: the continuation had no token, and the best score."""
    tokenizer = open_dataset(token_folder()).tokenizer
    assert len(tokenizer.encode("the cat")) <= len(tokenizer.encode("the c"))
    context, continuation = token_pair(tokenizer, "the c", "at")
    assert context == tokenizer.encode("the c")
    assert tokenizer.decode(continuation) == "at"
    assert token_pair(tokenizer, "the ", "cat") == (tokenizer.encode("the"), tokenizer.encode(" cat"))


def test_cells_of_a_report_end_where_their_diagnosis_and_their_phase_do():
    assert _cells([10, 20, 40], [0]) == ([0, 10, 20, 40], [0, 1, 2])
    assert _cells([10, 40], [0, 30]) == ([0, 10, 30, 40], [0, None, 1])
    assert _cells([40], [0, 30]) == ([30, 40], [0])
