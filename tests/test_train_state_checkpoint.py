"""Checkpoints hold everything, say whose they are, and survive a kill while they are written."""

import gc
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.trainer import run_config, token_folder
from train.config.settings import Phases
from train.data.token_files import open_dataset, train_iterator
from train.state.checkpoint import CheckpointError, Checkpoints, DamagedCheckpointError, describe, fingerprint
from train.state.state import abstract_state, initial_state
from train.state.workdir import claim_workdir
from venom_jax import LayerRecipes, Recipe
from venom_jax.stats import WeightMasks

CONFIG = run_config(phases=((0, "dense"), (4, "venom"), (8, "dense")))
PRINT = fingerprint(CONFIG, {"tokens": 5})


@pytest.fixture(scope="module")
def state():
    return initial_state(CONFIG)


def batches():
    return train_iterator(open_dataset(token_folder(), "train"), batch_size=4, seq_len=16, seed=3)


def numbered(state, number):
    """A state that can be told from others."""
    return replace(state, step=jnp.asarray(number, jnp.int32))


def save(checkpoints, state, step, masks=None, iterator=None):
    iterator = iterator or batches()
    checkpoints.save(numbered(state, step), masks, iterator, step=step, fingerprint=PRINT, seconds=1.5 * step)


def test_everything_comes_back(tmp_path, state):
    shape = (CONFIG.model.layers, CONFIG.model.d_model * CONFIG.model.d_ffn // 8)
    masks = WeightMasks(*(jax.random.randint(jax.random.key(i), shape, 0, 255).astype(jnp.uint8) for i in (0, 1)))
    iterator = batches()
    for _ in range(3):
        next(iterator)
    with Checkpoints(tmp_path, 2) as checkpoints:
        save(checkpoints, state, 7, masks, iterator)
    upcoming = next(iterator)["tokens"]

    fresh = batches()
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest == 7
        loaded, loaded_masks, seconds = checkpoints.restore(abstract_state(CONFIG), fresh)
    assert seconds == 10.5
    np.testing.assert_array_equal(next(fresh)["tokens"], upcoming)
    for found, expected in zip(
        jax.tree.leaves((loaded, loaded_masks)), jax.tree.leaves((numbered(state, 7), masks)), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_saving_is_asynchronous_and_safe_from_donation(tmp_path, state):
    """The buffers of a saved state may be overwritten at once, as the next step does."""

    @jax.jit
    def negate(tree):
        return jax.tree.map(lambda leaf: -leaf if leaf.dtype == jnp.float32 else leaf, tree)

    overwrite = jax.jit(negate, donate_argnums=0)
    current = jax.tree.map(jnp.copy, numbered(state, 1))
    expected = jax.tree.map(np.array, current)
    with Checkpoints(tmp_path, 2) as checkpoints:
        save(checkpoints, current, 1)
        for _ in range(3):
            current = overwrite(current)
    with Checkpoints(tmp_path, 2) as checkpoints:
        found = checkpoints.restore_state(abstract_state(CONFIG))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_the_newest_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, state, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize("written", ["nothing", "part", "all but the rename"])
def test_a_checkpoint_cut_off_by_a_kill_is_passed_over(tmp_path, state, written):
    """Whatever part of the newest had been written, the one before it is used, and the newest can be written again."""
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2):
            save(checkpoints, state, step)
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (tmp_path / "checkpoints" / "2").rename(unfinished)
    if written != "all but the rename":
        shutil.rmtree(unfinished / "state")
    if written == "nothing":
        for path in unfinished.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest == 1
        assert int(checkpoints.restore_state(abstract_state(CONFIG)).step) == 1
        save(checkpoints, state, 2)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert int(checkpoints.restore_state(abstract_state(CONFIG)).step) == 2


def largest_file(workdir, step):
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_a_damaged_checkpoint_is_not_read(tmp_path, state):
    """train.evaluate, train.export, train.prune and --init_from read this way; training sets it aside before."""
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2):
            save(checkpoints, state, step)
    path = largest_file(tmp_path, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with Checkpoints(tmp_path, 2, writer=False) as checkpoints:
        message = rf"the checkpoint of step 2 .*{path.name} has another checksum .*move .*2 away .*\(steps: 1\)"
        with pytest.raises(DamagedCheckpointError, match=message):
            checkpoints.restore_state(abstract_state(CONFIG))
        checkpoints.restore_state(abstract_state(CONFIG), 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 100), os.unlink], ids=["truncated", "deleted"])
def test_without_checksums_what_cannot_be_read_is_named(tmp_path, state, damage):
    """As after a kill between a checkpoint's last byte and its checksums."""
    with Checkpoints(tmp_path, 2) as checkpoints:
        save(checkpoints, state, 1)
    shutil.rmtree(tmp_path / "checksums")
    damage(largest_file(tmp_path, 1))
    message = r"the checkpoint of step 1 .*it cannot be read: .*\(steps: none\)"
    with Checkpoints(tmp_path, 2) as checkpoints:
        with pytest.raises(CheckpointError, match=message):  # what train.main tells, with exit code 1
            checkpoints.restore(abstract_state(CONFIG), batches())
        with pytest.raises(ValueError, match=message):
            checkpoints.restore_state(abstract_state(CONFIG))
    gc.collect()  # here and not in another test: orbax leaves reads behind that complain when they are collected


def test_the_workdir_of_the_same_run_is_accepted(tmp_path, state):
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.check(PRINT)
        save(checkpoints, state, 6)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.check(PRINT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {"d_ffn": 128}}, "Model.d_ffn is 64 there and 128 here"),
        ({"shape": {"tied_head": True}}, "Model.tied_head is False there and True here"),
        ({"seq_len": 8}, "Train.seq_len is 16 there and 8 here"),
        ({"seed": 1}, "Train.seed is 0 there and 1 here"),
        ({"seed": 1}, r"with \(config.gin there\), or for a new run another --workdir"),
        (
            {"phases": ((0, "dense"), (3, "venom"), (8, "dense"))},
            "phase 2 of Phases.schedule begins at step 4 there and 3 here .*give it as a step",
        ),
        ({"phases": ((0, "dense"), (8, "venom"))}, "has a phase that begins at step 4 only there"),
        ({"phases": ((0, "dense"), (2, "act24"), (4, "venom"))}, "phase 2 of .* begins at step 4 there and 2 here"),
        (
            {"phases": ((0, "dense"), (4, "all24"), (8, "venom"))},
            "phase 2 of Phases.schedule, which begins at step 4, has experts=4 there and 1 here;",
        ),
        (
            {"phases": ((0, "dense"), (4, ((0, "venom"), (1, "act24"))), (8, "dense"))},
            r"phase 2 of Phases.schedule is Recipe\(.* there and LayerRecipes\(0: Recipe\(",
        ),
        ({"phases": ((0, "dense"), (4, "act24"), (8, "dense"))}, "largest number of experts is 4 there and 1 here"),
        (
            {"phases": ((0, "dense"), (4, "venom"), (8, Recipe.venom(4, 1, router="learned")))},
            "room for a learned router is False there and True here",
        ),
    ],
)
def test_a_workdir_of_another_run_is_refused(tmp_path, state, changes, message):
    with Checkpoints(tmp_path, 2) as checkpoints:
        save(checkpoints, state, 6)
    other = fingerprint(run_config(**{"phases": CONFIG.phases.schedule} | changes), {"tokens": 5})
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.check(other)


def test_what_is_still_to_come_may_change(tmp_path, state):
    """More steps, a later end of the sparse phase, another data type: the past stays what it was."""
    with Checkpoints(tmp_path, 2) as checkpoints:
        save(checkpoints, state, 6)
    phases = ((0, "dense"), (4, "venom"), (10, "dense"))
    later = fingerprint(run_config(phases=phases, steps=20, dtype="bfloat16"), {"tokens": 5})
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.check(later)


def test_other_data_is_refused(tmp_path, state):
    with Checkpoints(tmp_path, 2) as checkpoints:
        save(checkpoints, state, 6)
    other = fingerprint(CONFIG, {"tokens": 6})
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(ValueError, match=r"data.tokens is 5 there and 6 here"):
        checkpoints.check(other)


def test_checkpoints_of_another_program_are_refused(tmp_path, state):
    with ocp.training.Checkpointer(str(tmp_path / "checkpoints")) as foreign:
        foreign.save(3, {"x": jnp.zeros(2)}, force=True)
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(ValueError, match=r"train.main did not write"):
        checkpoints.check(PRINT)


def test_claiming_a_workdir_leaves_nothing(tmp_path):
    claim_workdir(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_file_in_place_of_the_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"cannot be written to .*--workdir"):
            claim_workdir(workdir)


def test_a_recipe_is_described_as_earlier_checkpoints_have_it():
    earlier = (
        "Recipe(weights=('y1', 'dy2'), threshold_grad='ste', activations=True, wgrad='24', token_order='interleaved', "
        "token_blocks=1, experts=4, top_k={}, {}router='cosine', hidden='routed', balance_rate=0.0, v=64)"
    )
    assert describe(Recipe.venom(4, 1)) == earlier.format(1, "")
    later = earlier.format(2, "shared=1, clustering='coactivation', ")
    shared = Recipe.venom(4, 2, shared=1, clustering="coactivation")
    assert describe(shared) == later
    mixed = LayerRecipes(((0, Recipe.venom(4, 1)), (3, shared)))
    assert describe(mixed) == f"LayerRecipes(0: {earlier.format(1, '')}, 3: {later})"
    plain, rescaled = (
        fingerprint(replace(run_config(), phases=Phases([(0, "dense"), (5, "venom")], rescale=on)), {})
        for on in (False, True)
    )
    assert plain["phases"][1][1] == earlier.format(1, "")
    assert rescaled["phases"] == [plain["phases"][0], [5, earlier.format(1, "") + ", rescaled"]]
