"""Phases: what starts when."""

import pytest

from train.config.schedule import PhaseSchedule, label, resolve_step
from venom_jax import LayerRecipes, Recipe

DENSE, VENOM = Recipe.dense(), Recipe.venom()
UPPER = LayerRecipes(((0, Recipe.act24()), (4, VENOM)))


def build(*entries, steps=1000):
    return PhaseSchedule.build([(start, None, recipe) for start, recipe in entries], steps)


def test_fractions_are_of_all_steps():
    schedule = build((0, DENSE), (0.1, VENOM), (0.55, DENSE))
    assert [phase.start for phase in schedule.phases] == [0, 100, 550]


def test_a_recipe_used_twice_is_one_branch():
    schedule = build((0, DENSE), (10, VENOM), (20, DENSE), (30, Recipe.act24()))
    assert schedule.recipes == (DENSE, VENOM, Recipe.act24())
    assert schedule.branches == (0, 1, 0, 2)


def test_a_phase_holds_from_its_start_on():
    schedule = build((0, DENSE), (10, VENOM), (20, DENSE))
    assert [schedule.index_at(step) for step in (0, 9, 10, 19, 20, 999)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(1, DENSE)], "first phase must start at 0"),
        ([(0, DENSE), (20, VENOM), (10, DENSE)], r"\[0, 20, 10\]; they must increase"),
        ([(0, DENSE), (20, VENOM), (20, DENSE)], "they must increase"),
        ([(0, DENSE), (1000, VENOM)], "would never run"),
        ([(0, DENSE), (1001, VENOM)], "between 0 and Train.steps=1000"),
        ([(0, DENSE), (-1, VENOM)], "between 0 and"),
        ([(0, DENSE), (1.5, VENOM)], r"1.5 as a float is a fraction"),
        ([(0, DENSE), (0.0001, VENOM)], "they must increase"),
    ],
)
def test_out_of_order(entries, message):
    with pytest.raises(ValueError, match=message):
        build(*entries)


def test_resolve_step_names_what_it_resolves():
    assert resolve_step(7, 100, "x") == 7
    assert resolve_step(0.25, 100, "x") == 25
    with pytest.raises(ValueError, match=r"LearningRate.warmup=101"):
        resolve_step(101, 100, "LearningRate.warmup")


@pytest.mark.parametrize(
    ("name", "recipe", "expected"),
    [
        (None, DENSE, "dense"),
        (None, VENOM, "act24+w24 E=4 k=1"),
        ("venom", VENOM, "venom E=4 k=1"),
        (None, Recipe(weights=("y1",)), "w24"),
        (None, Recipe(experts=2), "routed E=2 k=1"),
        ("act24", Recipe.act24(), "act24"),
        ("act24/venom", UPPER, "act24, venom E=4 k=1 from layer 4"),
        (None, UPPER, "act24, act24+w24 E=4 k=1 from layer 4"),
    ],
)
def test_label(name, recipe, expected):
    assert label(name, recipe) == expected


def test_reroutings_are_where_experts_or_top_k_of_a_layer_change():
    layers = LayerRecipes(((0, DENSE), (4, Recipe.act24())))
    steps = [DENSE, layers, VENOM, Recipe.venom(weights=()), Recipe.venom(4, 2), UPPER, Recipe.act24(), DENSE]
    schedule = build(*((10 * i, recipe) for i, recipe in enumerate(steps)))
    assert schedule.reroutings == (20, 40, 50, 60)
