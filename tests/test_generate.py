"""Sampling: a known distribution, the window, the stop, and the same seed."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from train.generate import sample, top_p_logits

VOCAB = 8


def count_up(params, tokens, position):
    """A model that is sure of the last token + 1 (modulo the vocabulary)."""
    return params * jnp.eye(VOCAB)[(tokens[position] + 1) % VOCAB]


def length_of_context(params, tokens, position):
    """A model that is sure of the number of tokens it may look at."""
    return params * jnp.eye(VOCAB)[position]


def draw(model=count_up, prompt=(1, 2), params=1.0, **options):
    defaults: dict[str, Any] = {"seq_len": 6, "new_tokens": 10, "vocab_size": VOCAB, "temperature": 0.0}
    return sample(model, params, list(prompt), **(defaults | options))


def test_each_token_follows_from_the_one_before_also_beyond_the_window():
    assert draw() == [3, 4, 5, 6, 7, 0, 1, 2, 3, 4]


def test_the_window_grows_to_its_length_and_then_slides():
    assert draw(length_of_context, prompt=[0], new_tokens=8) == [0, 1, 2, 3, 4, 5, 5, 5]


def test_a_long_prompt_counts_with_its_end():
    assert draw(prompt=[7] * 20 + [4], new_tokens=2) == [5, 6]
    assert draw(length_of_context, prompt=[0] * 20, new_tokens=2) == [5, 5]


def test_the_stop_token_ends_the_text_and_is_left_out():
    assert draw(stop_id=6) == [3, 4, 5]
    assert draw(stop_id=3) == []


def test_what_stands_beyond_the_position_is_not_read():
    def sum_of_past(params, tokens, position):
        past = jnp.where(jnp.arange(tokens.shape[0]) <= position, tokens, 0).sum()
        return params * jnp.eye(VOCAB)[past % VOCAB]

    assert draw(sum_of_past, prompt=[1, 2], new_tokens=3, seq_len=5) == [3, 6, 4]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    def prefers_the_last(params, tokens, position):
        return jnp.arange(VOCAB) * params

    assert set(draw(prefers_the_last, vocab_size=5)) == {4}
    options = {"vocab_size": 5, "new_tokens": 50, "temperature": 1.0, "top_p": 1.0}
    assert set(draw(prefers_the_last, params=0.0, **options)) == set(range(5))


def flat(params, tokens, position):
    """The same distribution for every token: probabilities 0.5, 0.3, 0.15, 0.05."""
    return jnp.log(jnp.array([0.3, 0.5, 0.05, 0.15])) * params


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.3, 0.5, 0.05, 0.15]),
        (1.0, 0.8, [0.375, 0.625, 0, 0]),
        (1.0, 0.81, [0.3 / 0.95, 0.5 / 0.95, 0, 0.15 / 0.95]),
        (1.0, 1e-6, [0, 1, 0, 0]),
        (0.5, 1.0, np.square([0.3, 0.5, 0.05, 0.15]) / np.square([0.3, 0.5, 0.05, 0.15]).sum()),
        (0.0, 1.0, [0, 1, 0, 0]),
    ],
)
def test_frequencies_are_those_of_the_cut_distribution(temperature, top_p, expected):
    count = 4000
    drawn = draw(flat, vocab_size=4, new_tokens=count, temperature=temperature, top_p=top_p)
    frequency = np.bincount(drawn, minlength=4) / count
    np.testing.assert_array_equal(frequency[np.asarray(expected) == 0], 0)
    np.testing.assert_allclose(frequency, expected, atol=4 * 0.5 / np.sqrt(count))


def test_same_seed_same_text_other_seed_other_text():
    options = {"vocab_size": 4, "new_tokens": 30, "temperature": 1.0}
    assert draw(flat, **options, seed=1) == draw(flat, **options, seed=1)
    assert draw(flat, **options, seed=1) != draw(flat, **options, seed=2)


def test_top_p_keeps_the_token_that_reaches_the_sum():
    logits = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))
    kept = np.isfinite(top_p_logits(logits, 0.6))
    np.testing.assert_array_equal(kept, [False, True, False, True])
    np.testing.assert_array_equal(top_p_logits(logits, 1.0), logits)


def test_bad_options_are_named():
    for options, message in (
        ({"prompt": []}, "the prompt holds no token"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"top_p": 0.0}, r"top_p=0\.0 must lie in \(0, 1\]"),
        ({"new_tokens": 0}, "new_tokens=0"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**options)
