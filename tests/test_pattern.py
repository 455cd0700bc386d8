"""Recipes and patterns: presets, equivalences, and what they refuse."""

import math
from fractions import Fraction

import pytest

from venom_jax import Pattern, Recipe


def test_presets():
    assert Recipe.dense().is_dense
    assert Recipe.act24() == Recipe(activations=True, wgrad="24")
    assert Recipe.all24() == Recipe(activations=True, wgrad="24", weights=("y1", "dy2"))
    assert Recipe.venom(16, 4) == Recipe.all24(experts=16, top_k=4)
    assert Recipe.preset("venom", experts=8) == Recipe.venom(8, 1)
    assert Recipe(weights=("dy2", "y1")) == Recipe(weights=("y1", "dy2")), "order of products does not matter"


@pytest.mark.parametrize(
    ("experts", "top_k", "m"), [(4, 1, 16), (16, 4, 16), (16, 2, 32), (16, 1, 64), (4, 3, Fraction(16, 3)), (1, 1, 4)]
)
def test_equivalent_pattern(experts, top_k, m):
    pattern = Recipe.venom(experts, top_k).pattern
    assert pattern == Pattern(64, 2, Fraction(m))
    assert pattern.density == Fraction(2) / m


def test_table_5_of_the_paper():
    assert [1 - Pattern(64, 2, Fraction(m)).density for m in (16, 32, 64)] == [0.875, 0.9375, 0.96875]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 2}, "top_k = 2 exceeds experts = 1"),
        ({"experts": 0}, "experts = 0"),
        ({"experts": 2.0}, "experts = 2.0"),
        ({"weights": ("y2",)}, "'y2'; it may hold y1, y3, dy2, dx"),
        ({"weights": ("y1", "y1")}, "names a product twice"),
        ({"wgrad": "2:4"}, "wgrad = '2:4': use one of 'dense', '24', 'split95'"),
        ({"activations": 1}, "activations = 1"),
        ({"router": "oracle", "experts": 4}, "set hidden = 'full'"),
        ({"v": 32}, "v = 32"),
        ({"balance_rate": -1.0}, "balance_rate = -1.0"),
    ],
)
def test_bad_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_unknown_preset():
    with pytest.raises(ValueError, match="'vemon'; the presets are dense, act24, all24, venom"):
        Recipe.preset("vemon")


@pytest.mark.parametrize(
    ("recipe", "sizes", "message"),
    [
        (Recipe.venom(4, 1), (16, 40), "d_ffn = 40 does not split into experts = 4.*divisible by 16"),
        (Recipe.act24(), (16, 6), "d_ffn = 6 is no multiple of 4"),
        (Recipe.all24(), (10, 16), "d_model = 10 is no multiple of 4"),
    ],
)
def test_sizes_are_checked(recipe, sizes, message):
    with pytest.raises(ValueError, match=message):
        recipe.check(*sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 96}, "v = 96"),
        ({"v": 64.0}, "v = 64.0 is no integer"),
        ({"v": "64"}, "v = '64' is no integer"),
        ({"n": 1}, "n = 1"),
        ({"m": Fraction(2)}, "m = 2"),
        ({"m": math.inf}, "m = inf is no finite number"),
        ({"m": math.nan}, "m = nan is no finite number"),
        ({"m": "16"}, "m = '16' is no finite number"),
    ],
)
def test_bad_patterns_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Pattern(**change)
