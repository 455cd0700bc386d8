"""Starting a run from given weights: bit for bit, also into a sparse phase; refused where the shapes differ."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer import MODEL, gin_bindings, records, run_config, three_phases, token_folder
from train import loop
from train.config.settings import Data
from train.data.prepare import prepare
from train.evaluation import validation
from train.evaluation.export import export
from train.evaluation.init_from import foreign_tokenizer, load_params
from train.main import run
from train.model.decoder import assemble, structure
from venom_jax import Recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(str(three_phases()[1]), folder, "float32")
    return folder


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_checkpoint_and_its_export_give_the_same_weights(exported):
    workdir = three_phases()[1]
    expected = validation.restore(workdir).state.params
    same(load_params(str(workdir), MODEL), expected)
    same(load_params(str(exported), MODEL), expected)


def test_an_older_step_gives_its_own_weights():
    workdir = three_phases()[1]
    run = validation.restore(f"{workdir}@3")
    assert (run.step, int(run.state.step)) == (3, 3)
    same(load_params(f"{workdir}@3", MODEL), run.state.params)
    newest = validation.restore(workdir).state.params
    assert np.any(np.asarray(newest["embedding"]) != np.asarray(run.state.params["embedding"]))


def test_a_step_inside_a_sparse_phase_gives_the_baked_weights():
    run = validation.restore(f"{three_phases()[1]}@6")
    found = load_params(f"{three_phases()[1]}@6", MODEL)
    same(found, run.dense_params())
    assert np.any(np.asarray(found["blocks"]["ffn"]["w1"]) != np.asarray(run.state.params["blocks"]["ffn"]["w1"]))


def test_only_the_weights_are_taken(exported, tmp_path):
    config = run_config(seed=5)
    state, report = loop.first_state(config, loop.prepare(config, tmp_path, init_from=str(exported)).params)
    same(state.params, load_params(str(exported), MODEL))
    assert report == {}
    assert int(state.step) == 0
    fresh, _ = loop.first_state(config, None)
    same(state.opt_state, fresh.opt_state)
    same(state.method, fresh.method)


def test_a_sparse_start_clusters_and_scales_the_given_weights(exported):
    config = run_config(phases=((0, "venom"), (3, "dense")))
    params = load_params(str(exported), MODEL)
    state, report = loop.first_state(config, params)
    assert report["clustered_experts"] == 4
    assert 1 < report["beta_y1"] < 2
    w1, given = (np.asarray(p["blocks"]["ffn"]["w1"]) for p in (state.params, params))
    assert np.any(w1 != given)
    np.testing.assert_array_equal(np.sort(w1, axis=-1), np.sort(given, axis=-1))

    tokens = jnp.arange(16)[None]

    def logits(experts, params, method):
        decoder = assemble(structure(MODEL, experts), params, method)
        return decoder(tokens, recipe=Recipe.dense())[0]

    before, after = (
        jax.jit(logits, static_argnums=0)(experts, p, method)
        for experts, p, method in (
            (4, state.params, state.method),
            (1, params, validation.restore(three_phases()[1]).state.method),
        )
    )
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_a_run_goes_on_from_what_was_learned(exported, tmp_path):
    """Its first loss is the trained model's, far below that of random weights; run again, it continues itself."""
    bindings = gin_bindings(Train_steps=3, Phases_schedule=[(0, "venom")], Train_sample_tokens=0)
    assert run([], bindings, tmp_path, init_from=str(exported)) == 0
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert losses[0] < np.log(MODEL.vocab_size) - 1
    assert records(tmp_path, "phase")[0]["report"]["clustered_experts"] == 4
    again = loop.prepare(validation.read_config(tmp_path), tmp_path, init_from=str(tmp_path / "gone"))
    assert again.params is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"d_ffn": 128}, "Model.d_ffn is 64 there and 128 here"),
        ({"layers": 3, "vocab_size": 400}, "Model.vocab_size is 320 there and 400 here, Model.layers is 2 there and 3"),
        ({"kv_heads": 1}, "Model.kv_heads is 2 there and 1 here"),
        ({"rope_base": 500.0}, "Model.rope_base is 10000.0 there and 500.0 here"),
        ({"tied_head": True}, "Model.tied_head is False there and True here"),
    ],
)
def test_another_shape_is_refused(exported, shape, message):
    for source in (exported, three_phases()[1]):
        with pytest.raises(ValueError, match=message):
            load_params(str(source), replace(MODEL, **shape))


def test_a_source_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"neither a workdir of train.main \(no config.gin in it\) nor"):
        load_params(str(tmp_path), MODEL)
    with pytest.raises(ValueError, match="no checkpoint of step 40"):
        load_params(f"{three_phases()[1]}@40", MODEL)
    assert run([], gin_bindings(), tmp_path / "run", init_from=str(tmp_path / "nothing")) == 2
    assert f"error: --init_from={tmp_path / 'nothing'} is neither" in capsys.readouterr().err


def test_weights_of_another_tokenizer_are_told(exported, tmp_path, capsys):
    """The same ids are fine, from either kind of source; others are used, with a warning that says what to do."""
    config, workdir = run_config(), str(three_phases()[1])
    assert foreign_tokenizer(str(exported), config) is None
    assert foreign_tokenizer(workdir, config) is None
    (tmp_path / "text.txt").write_text("other words make other tokens " * 99)
    prepare([tmp_path / "text.txt"], tmp_path / "data", vocab_size=290, validation_fraction=0, progress=False)
    other = run_config(data=Data(str(tmp_path / "data")))
    for source, name in ((str(exported), exported), (workdir, token_folder())):
        assert f"Prepare the data with --tokenizer={name}/tokenizer.json" in str(foreign_tokenizer(source, other))
    assert foreign_tokenizer(str(exported), run_config(data=Data(synthetic=True))) is None
    copied = shutil.copytree(exported, tmp_path / "copied")
    shutil.copy(tmp_path / "data" / "tokenizer.json", copied / "tokenizer.json")
    loop.prepare(config, tmp_path / "run", init_from=str(copied))
    assert "warning: --init_from=" in capsys.readouterr().err
