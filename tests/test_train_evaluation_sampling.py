"""Sampling: a known distribution, the window, the stop, and the same seed."""

import functools
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close
from tests.trainer import MODEL, build
from train.evaluation import sampling
from train.evaluation.sampling import LanguageModel, cached_model, sample, top_p_logits
from train.model import cache
from train.model.decoder import assemble
from venom_jax import Recipe

VOCAB = 8


def count_up(params, tokens, position):
    """A model that is sure of the last token + 1 (modulo the vocabulary)."""
    return params * jnp.eye(VOCAB)[(tokens[position] + 1) % VOCAB]


def length_of_context(params, tokens, position):
    """A model that is sure of the number of tokens it may look at."""
    return params * jnp.eye(VOCAB)[position]


@functools.cache  # one model is compiled once
def without_cache(next_logits):
    """A language model from (params, tokens [S], position) -> logits; its cache is the tokens."""

    def extend(params, tokens, token, position):
        tokens = tokens.at[position].set(token)
        return next_logits(params, tokens, position), tokens

    return LanguageModel(lambda params, tokens, position: (next_logits(params, tokens, position), tokens), extend)


def draw(model=count_up, prompt=(1, 2), params=1.0, **options):
    defaults: dict[str, Any] = {"seq_len": 6, "new_tokens": 10, "vocab_size": VOCAB, "temperature": 0.0}
    return sample(without_cache(model), params, list(prompt), **(defaults | options))


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


@pytest.fixture(scope="module", params=[{}, {"heads": 4, "kv_heads": 2, "tied_head": True}], ids=["plain", "grouped"])
def decoder(request):
    """A random model whose text is no repetition of one token."""
    graphdef, params, method = build(replace(MODEL, **request.param), 1, seed=0)
    return graphdef, (jax.tree.map(lambda x: 4 * x, params), method)


def uncached(graphdef):
    def next_logits(arrays, tokens, position):
        return assemble(graphdef, *arrays)(tokens[None], recipe=Recipe.dense())[0][0, position]

    return without_cache(next_logits)


def test_greedy_with_a_cache_is_greedy_without_token_for_token(decoder):
    """While the window fills and beyond it."""
    graphdef, arrays = decoder
    options = {"seq_len": 24, "new_tokens": 40, "vocab_size": 300, "temperature": 0.0}
    texts = [
        sample(m, arrays, [5, 7, 11], **options) for m in (cached_model(graphdef, jnp.float32), uncached(graphdef))
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 10


def test_the_next_sample_compiles_nothing_anew():
    graphdef, *arrays = build(MODEL, 1, 0)
    options = {"seq_len": 8, "new_tokens": 3, "vocab_size": 300}
    programs, jitted = [], cast(Any, (sampling._start, sampling._draw))
    for seed in (0, 1):
        sample(cached_model(graphdef, jnp.dtype("float32")), tuple(arrays), [5], seed=seed, **options)
        programs.append([function._cache_size() for function in jitted])
    assert programs[0] == programs[1]


def test_the_cache_gives_the_logits_of_the_whole_forward(decoder):
    graphdef, arrays = decoder
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, MODEL.vocab_size)

    @jax.jit
    def both(arrays):
        module = assemble(graphdef, *arrays)
        cached, found = cache.empty(module, 2, 12, jnp.float32), []
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            hidden, cached = cache.extend(module, tokens[:, start:stop], cached, start)
            found.append(hidden)
        at_once, _ = cache.extend(module, tokens, cache.empty(module, 2, 12, jnp.float32), 0)
        return jnp.concatenate(found, 1), at_once, module.hidden(tokens, recipe=Recipe.dense())[0]

    in_parts, at_once, whole = both(arrays)
    assert_close(in_parts, whole)
    assert_close(at_once, whole)


def test_progress_counts_every_token():
    counts = []
    assert len(draw(new_tokens=40, on_tokens=counts.append)) == sum(counts) == 40
    assert len(counts) > 1
    counts.clear()
    assert len(draw(stop_id=6, on_tokens=counts.append)) == sum(counts) == 3


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
