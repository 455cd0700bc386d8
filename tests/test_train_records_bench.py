"""The benchmark of whole steps: its rows, and the names of recipes."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer import gin_bindings, run_config
from train.bench import work
from train.records.bench import measure, parse_recipe, with_phases
from train.records.trace import PARTS
from venom_jax import Recipe


def test_a_row_for_each_recipe_in_the_benchmarks_format(capsys, tmp_path):
    output = tmp_path / "steps.json"
    rows = measure(run_config(), ["venom:4:1"], "small", rounds=1, parts=True, switch=True, output=output)
    names = ["dense", "venom E=4 k=1", "dense, switch", "venom E=4 k=1, switch"]
    assert [row["case"] for row in rows] == [f"small {name}" for name in names]
    assert [row["rival"] for row in rows] == ["dense", "dense", "dense", "venom E=4 k=1"]
    for row in rows:
        assert row["ms"] > 0
        assert row["speedup"] == pytest.approx(row["rival_ms"] / row["ms"], rel=0.01)
        assert row["tokens_per_second"] == pytest.approx(8 * 16 / row["ms"] * 1e3, rel=0.01)
        assert row["memory_gib"] >= 0
    assert rows[0]["rival_ms"] == rows[0]["ms"]
    for row in rows[:2]:
        assert row["part_ms"].keys() == {*PARTS, "communication", "other", "idle"}
        assert min(row["part_ms"][part] for part in PARTS) > 0
        assert sum(row["part_ms"].values()) == pytest.approx(row["ms"], abs=0.1)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert printed == rows == json.loads(output.read_text())


def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(tmp_path):
    values: Any = SimpleNamespace(
        gin_file=[], gin_bindings=gin_bindings(), recipes="dense", json=f"{tmp_path}/no/steps.json"
    )
    with pytest.raises(ValueError, match=r"steps.json: there is no folder .*no"):
        work(values)


def test_tokens_that_the_model_does_not_have_are_told():
    config = run_config()
    small = replace(config, model=replace(config.model, vocab_size=16))
    with pytest.raises(ValueError, match=r"tokenizer of .* has \d+ tokens but Model.vocab_size=16: raise it"):
        measure(small, [], "small", rounds=1, parts=False, switch=False)


def test_more_recipes_than_the_run_has_steps():
    recipes = [Recipe(), Recipe.act24(), Recipe.all24(), Recipe.venom(4, 1)]
    assert [phase.recipe for phase in with_phases(run_config(steps=2), recipes).schedule.phases] == recipes


def test_names_of_recipes():
    assert parse_recipe("venom:16:4") == ("venom E=16 k=4", Recipe.venom(16, 4))
    assert parse_recipe("all24") == ("all24", Recipe.all24())
    assert parse_recipe("act24:4:2") == ("act24 E=4 k=2", Recipe.act24(experts=4, top_k=2))
    for wrong in ("all24:4:1", "act42", ""):
        with pytest.raises(ValueError, match=f"--recipes has '{wrong}'; give dense, .* venom:EXPERTS:TOP_K"):
            parse_recipe(wrong)
