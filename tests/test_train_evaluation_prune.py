"""train.prune: what it keeps, that masks are held, that recovery helps, its output and its errors."""

import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer import MODEL, run_config, three_phases
from train.config.settings import Data
from train.evaluation import prune as program
from train.evaluation.init_from import load_params
from venom_jax import Pattern, prune

P = Pattern(v=64, m=Fraction(8))


@pytest.fixture(scope="module")
def session():
    return program.Session(str(three_phases()[1]), recovery_steps=6, recovery_rate=3e-3, calibration_batches=1)


def test_weights_become_vnm_along_their_contraction(session):
    ffn = program.feed_forward(session.params)
    pruned = program.prune_weights(ffn, None, pattern=P, columns="l1")
    alone = jax.jit(lambda w: prune.vnm(w.T, P).to_dense().T)
    for name in ("w1", "w2"):
        for layer in range(MODEL.layers):
            np.testing.assert_array_equal(pruned.weights[name][layer], alone(ffn[name][layer]))
    assert 0.25 < float(pruned.energy) < 1
    mask_share = float(jnp.mean(jnp.concatenate([m.ravel() for m in pruned.masks.values()])))
    assert mask_share == pytest.approx(0.25)


def test_the_loss_rises_and_falls_again_under_held_masks(session):
    before = jax.tree.map(np.asarray, session.params)
    params, row = session.prune(P, "l1")
    assert row["val_loss_before"] < row["val_loss_pruned"]
    assert row["val_loss_recovered"] < row["val_loss_pruned"]
    assert row["val_loss_recovered"] == pytest.approx(session.loss(params), abs=1e-4)
    assert (row["pattern"], row["density"], row["scores"]) == ("64:2:8", 0.25, "activations")
    pruned = program.prune_weights(program.feed_forward(session.params), session.norms, pattern=P, columns="l1")
    for name, w in program.feed_forward(params).items():
        assert not np.asarray(w)[~np.asarray(pruned.masks[name])].any()
        assert (np.asarray(w) != np.asarray(pruned.weights[name])).any()
    jax.tree.map(np.testing.assert_array_equal, session.params, before)
    assert "validation loss" in program.describe(row)


def test_norms_are_those_of_the_inputs(session):
    assert {name: n.shape for name, n in session.norms.items()} == {"w1": (2, 32), "w2": (2, 64)}
    # RMSNorm's outputs have a mean square of one in each token.
    tokens = session.config.train.batch_size * session.config.train.seq_len
    scale = np.asarray(session.params["blocks"]["ffn_scale"])
    squares = np.asarray(session.norms["w1"]) ** 2 / scale**2
    np.testing.assert_allclose(squares.sum(axis=1), tokens * MODEL.d_model, rtol=1e-2)


def test_the_command_writes_figures_and_a_model(tmp_path, capsys):
    program.run(str(three_phases()[1]), ["2:4"], json_file=tmp_path / "rows.json", output=tmp_path / "model")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["pattern"] == "64:2:4"
    assert "val_loss_recovered" not in row
    assert "64:2:4 (l1, magnitude): " in capsys.readouterr().out
    found = load_params(str(tmp_path / "model"), MODEL)
    w = np.asarray(found["blocks"]["ffn"]["w1"][0]).T.reshape(64, 8, 4)
    assert ((w != 0).sum(axis=-1) == 2).all()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["1:4"], r"pattern.n = 1"),
        (["64:2"], r"--patterns has '64:2'; it must be V:N:M"),
        (["2:4", "64:2:64"], r"64 x 32 does not split into blocks of pattern.m = 64"),
        (["64:2:8", "2:4"], r"--output takes one pattern, --patterns has 2"),
        (["192:2:8"], r"pattern.v = 192"),
        ([], r"--patterns is empty"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, patterns, message):
    monkeypatch.setattr(program, "Session", None)  # nothing may be opened
    output = tmp_path / "model" if "output" in message else None
    with pytest.raises(ValueError, match=message):
        program.run(str(three_phases()[1]), patterns, output=output)
    with pytest.raises(ValueError, match=r"is no workdir of train.main"):
        program.run(str(tmp_path), ["2:4"])


def test_what_would_fail_at_the_end_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "Session", None)  # nothing may be opened
    workdir = str(three_phases()[1])
    with pytest.raises(ValueError, match=r"--json=.*there is no folder .*nowhere"):
        program.run(workdir, ["2:4"], json_file=tmp_path / "nowhere" / "rows.json")
    monkeypatch.setattr(prune, "MAX_COMBINATIONS", 69)
    with pytest.raises(ValueError, match=r"would try 70 choices for each block; at most 69"):
        program.run(workdir, ["64:2:8"], columns="best")
    random_data = run_config(data=Data(synthetic=True))
    monkeypatch.setattr(program.validation, "read_config", lambda _: random_data)
    with pytest.raises(ValueError, match=r"Data.synthetic=True has no tokenizer"):
        program.run(workdir, ["2:4"], output=tmp_path / "model")
