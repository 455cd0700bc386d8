"""A whole run over a mesh, through every phase, and its checkpoint on another number of devices."""

import shutil
from dataclasses import replace

import jax
import pytest

from tests.trainer import records, run_config, run_to_end
from train.config.settings import Mesh
from train.model.mesh import layout_of
from train.state.state import initial_state
from venom_jax import Recipe

CONFIG = replace(
    run_config(
        shape={"qk_norm": True, "document_start": 0},
        optimizer={"ema": 0.9},
        z_loss=1e-3,
        phases=((0, "dense"), (4, Recipe.venom(4, 2, wgrad="dense", balance_rate=0.01)), (8, "dense")),
        batch_size=16,
        accumulation=2,
        eval_every=6,
        checkpoint_every=3,
        keep_checkpoints=10,
        diagnosis_every=6,
    ),
    mesh=Mesh(data=2, fsdp=4),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    assert run_to_end(CONFIG, workdir) == 0
    return workdir


def test_weights_moments_and_gradients_are_cut():
    layout = layout_of(CONFIG)
    state = initial_state(CONFIG, layout)
    for tree in (state.params, state.opt_state, state.ema):
        large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 1000]
        assert large
        for leaf in large:
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size


@pytest.mark.slow  # test_two_processes goes on alone too
def test_a_checkpoint_goes_on_alone_as_it_would_have_on_eight(whole, tmp_path):
    """From step 3 it goes through the clustering and the baking on one device."""
    workdir = tmp_path / "alone"
    shutil.copytree(whole, workdir)
    for saved in (workdir / "checkpoints").iterdir():
        if int(saved.name) > 3:
            shutil.rmtree(saved)
    train = replace(CONFIG.train, sample_tokens=0, diagnosis_every=0, eval_every=1000)
    assert run_to_end(replace(CONFIG, mesh=Mesh(1, 1), train=train), workdir) == 0
    steps = {(record["kind"], record["step"]): record for record in records(whole)}
    for found in records(workdir):
        expected = steps[found["kind"], found["step"]]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (name, found)
