"""Log-likelihoods in batches agree with a direct computation, one sequence at a time."""

import json
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer import run_config, three_phases, token_folder
from train.data.token_files import open_dataset
from train.evaluation import validation
from train.evaluation.likelihood import Scorer, score_text, windows
from train.model.decoder import assemble
from venom_jax import Recipe

LENGTH = 16  # Train.seq_len of the small run


@cache
def restored(step=12):
    return validation.restore(f"{three_phases()[1]}@{step}")


@cache
def scorers(step=12):
    return dict(restored(step).scorers(sparse=True))


@cache
def forward(step, name):
    """tokens [S] -> log p [S, V], without batches or padding."""
    run = restored(step)
    params, recipe = (run.dense_params(), Recipe.dense()) if name == "dense" else (run.state.params, run.phase.recipe)

    @jax.jit
    def log_p(params, tokens):
        decoder = assemble(run.graphdef, params, run.state.method)
        return jax.nn.log_softmax(decoder(tokens[None], recipe=recipe, key=jax.random.key(0))[0][0])

    return lambda tokens: np.asarray(log_p(params, jnp.asarray(tokens)), np.float64)


def direct(step, name, context, continuation):
    """(log-likelihood, whether greedy), one sequence at a time."""
    tokens = [*context, *continuation][-(LENGTH + 1) :]
    logp = forward(step, name)(tokens[:-1])[-len(continuation) :]
    return logp[range(len(continuation)), continuation].sum(), bool((logp.argmax(-1) == continuation).all())


def pairs():
    """Short, middling and overlong ones; the continuation of every third is what the model finds most probable."""
    rng = np.random.default_rng(1)
    ids = open_dataset(token_folder(), "val").windows(np.arange(8), 40).reshape(-1)
    made = []
    for i in range(24):
        start, total = rng.integers(0, 200), (4, 9, 30)[i // 8]
        cut = int(total - rng.integers(1, 4))
        context, continuation = ids[start : start + cut].tolist(), ids[start + cut : start + total].tolist()
        if i % 3 == 0:
            context = [*context, *continuation[:-1]]
            continuation = [int(forward(12, "dense")(context[-LENGTH:])[-1].argmax())]
        made.append((context, continuation))
    return made


@pytest.mark.parametrize(("step", "name"), [(12, "dense"), (6, "dense"), (6, "sparse")])
def test_batched_log_likelihoods_agree_with_a_direct_computation(step, name):
    asked = pairs()[8:] if name == "sparse" else pairs()  # a sparse forward takes long to compile for each length
    found = scorers(step)[name](asked)
    expected = [direct(step, name, *pair) for pair in asked]
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-5, atol=1e-5)
    assert [f[1] for f in found] == [e[1] for e in expected]
    if step == 12:
        assert {f[1] for f in found} == {True, False}
    assert all(type(f[0]) is float and type(f[1]) is bool for f in found)


def test_the_sparse_forward_is_another():
    assert "sparse" not in scorers(12)
    dense, sparse = (scorers(6)[name](pairs()[8:]) for name in ("dense", "sparse"))
    assert not np.allclose([d[0] for d in dense], [s[0] for s in sparse], rtol=1e-3)


def test_batches_have_a_few_fixed_shapes(monkeypatch):
    run, shapes = restored(), []
    scorer = Scorer(run.graphdef, run.config, run.state.params, run.state.method, run.phase.recipe)

    def score(tokens):
        shapes.append(tokens.shape)
        return np.zeros(tokens[:, 1:].shape), np.ones(tokens[:, 1:].shape, bool)

    monkeypatch.setattr(scorer, "_score", score)
    scorer([([1] * (1 + i % 20), [2] * (1 + i % 3)) for i in range(300)])
    tokens = run.config.train.batch_size * LENGTH
    assert set(shapes) == {(tokens // length, length + 1) for length in (2, 4, 8, 16)}
    assert len(shapes) < 300 / 4, "sequences are scored together"


def test_an_empty_continuation_is_certain():
    assert scorers()["dense"]([([1], []), ([1], [2])])[0] == (0.0, True)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a continuation of 17 tokens is longer than the model's 16"):
        scorers()["dense"]([([1], [2] * 17)])
    with pytest.raises(ValueError, match=r"a context needs at least one token"):
        scorers()["dense"]([([], [2])])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 29])
def test_windows_hold_each_token_once_after_what_stands_before_it(count):
    ids = list(range(100, 100 + count))
    made = list(windows(ids, [5], 8))
    assert [token for _, continuation in made for token in continuation] == ids
    for context, continuation in made:
        before = [5, *ids[: ids.index(continuation[0])]]
        assert before[-len(context) :] == list(context)
        assert 1 <= len(context) <= 9 - len(continuation)
    assert all(len(context) + len(continuation) == 9 for context, continuation in made[1:])


def test_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm-eval (extra eval)")
    for count in (1, 8, 9, 29):
        ids = list(range(100, 100 + count))
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 5, 8, 1))
        assert [(list(c), list(t)) for c, t in windows(ids, [5], 8)] == [(list(c), list(t)) for c, t in theirs]


def test_bits_per_byte_of_a_text(tmp_path):
    tokenizer = open_dataset(token_folder(), "train").tokenizer
    texts = ["the cat sees a dog. my house was the state.", "a dog likes \u00e9t\u00e9."]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, 3]))
    score = score_text(scorers()["dense"], tokenizer, tmp_path / "two.jsonl")
    ids = [tokenizer.encode(text) for text in texts]
    expected = -sum(
        direct(12, "dense", context, continuation)[0]
        for text in ids
        for context, continuation in windows(text, [tokenizer.eos_id], LENGTH)
    )
    assert (score.documents, score.tokens, score.bytes) == (2, sum(map(len, ids)), len("".join(texts).encode()))
    assert "line 3: field 'text' should be a string" in score.skipped.examples[0]
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.bytes, rel=1e-5)
    assert score.loss == pytest.approx(expected / score.tokens, rel=1e-5)
    (tmp_path / "one.md").write_text(texts[0])
    assert score_text(scorers()["dense"], tokenizer, tmp_path / "one.md").nats < score.nats


def test_texts_that_cannot_be_scored_are_refused(tmp_path):
    tokenizer = open_dataset(token_folder(), "train").tokenizer
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "broken.jsonl").write_text("{}\n")
    for name, message in {
        "empty.txt": "holds no text",
        "picture.png": "not UTF-8 text",
        "broken.jsonl": "line 1: no field 'text'",
        "missing.txt": "no file",
    }.items():
        with pytest.raises(ValueError, match=message):
            score_text(scorers()["dense"], tokenizer, tmp_path / name)


def test_lengths_divide_the_training_sequence():
    run = restored()
    odd = Scorer(run.graphdef, run_config(seq_len=12), run.state.params, run.state.method, run.phase.recipe)
    assert odd._lengths == [3, 6, 12]


def test_the_report_names_checkpoint_model_and_file(tmp_path, capsys):
    (tmp_path / "some.txt").write_text("the cat was my house.")
    validation.report_text(restored(6), tmp_path / "some.txt", text_field="text", sparse=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 6, dense", "step 6, sparse"]
    assert all("bits per byte" in line and "1 documents" in line and "21 bytes" in line for line in lines)
