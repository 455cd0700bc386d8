"""Times of steps that `train.bench` measured, for runs that told none themselves."""

import json

import pytest

from tests.trainer import run_config
from train.records.bench import parse_recipe
from train.records.step_times import StepTimes, bench_name, read_step_times
from venom_jax import LayerRecipes, Recipe

HALF = Recipe.act24(experts=4, top_k=2)
TIMES = StepTimes("f", "1b", "gpu", {"dense": 1.0, "act24": 0.9, "act24 E=4 k=2": 0.7})


@pytest.mark.parametrize("name", ["dense", "act24", "all24", "venom:4:1", "venom:16:4", "act24:4:2"])
def test_names_are_those_of_the_benchmark(name):
    called, recipe = parse_recipe(name)
    assert bench_name(recipe) == called


def test_what_costs_time_has_a_name_of_its_own_or_none():
    assert bench_name(Recipe.act24(experts=4, top_k=2, shared=1, balance_rate=0.1)) == "act24 E=4 k=2"
    for other in (
        Recipe.act24(wgrad="mvue"),
        Recipe(weights=("y1",)),
        Recipe.all24(weight_mask="transposable"),
        Recipe.act24(token_copy="rebuilt"),
    ):
        assert bench_name(other) is None


def test_a_run_takes_the_mean_of_its_steps_and_a_step_that_of_its_layers():
    assert TIMES.of_step(LayerRecipes(((0, Recipe.act24()), (1, HALF))), 4) == pytest.approx((0.9 + 3 * 0.7) / 4)
    assert TIMES.of_step(Recipe.all24(), 4) is None
    config = run_config(phases=((0, "dense"), (3, HALF), (6, "act24")))  # of 12 steps
    assert TIMES.of_run(config) == pytest.approx((3 * 1.0 + 3 * 0.7 + 6 * 0.9) / 12)
    assert TIMES.of_run(run_config(phases=((0, "dense"), (3, "venom")))) is None


def rows(*cases):
    return [{"bench": "train_step", "case": case, "ms": ms, "rival_ms": 100.0, "device": "gpu"} for case, ms in cases]


def test_a_file_of_several_models_is_asked_for_one(tmp_path):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(rows(("1b dense", 100.0), ("1b act24", 90.0), ("7b dense", 100.0), ("7b act24", 80.0))))
    found = read_step_times(f"{path}@7b")
    assert (found.size, found.device, found.ratios) == ("7b", "gpu", {"dense": 1.0, "act24": 0.8})
    for name in (str(path), f"{path}@2b"):
        with pytest.raises(ValueError, match="has steps of 1b, 7b; name one"):
            read_step_times(name)
    path.write_text(json.dumps(rows(("1b dense", 100.0), ("1b act24", 90.0))))
    assert read_step_times(str(path)).ratios["act24"] == 0.9
    path.write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"is no result of python -m train\.bench"):
        read_step_times(str(path))
