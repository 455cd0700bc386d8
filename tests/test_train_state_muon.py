"""Muon: against optax's, its iteration against a singular value decomposition, and runs that carry its state."""

import shutil
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tests.helpers import assert_close, relative_error
from tests.trainer import assert_same_bits, final_state, records, run_config, run_to_end
from train import loop
from train.config.settings import Optimizer
from train.state.muon import newton_schulz, orthogonalized, scale_by_muon
from train.state.optimizer import decay_mask, for_run, kinds, optimizer
from train.state.state import initial_state

SHAPES = {"qkv": (2, 6, 18), "out": (2, 6, 6), "w1": (2, 6, 12), "w2": (2, 12, 6)}


def normal(seed, shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_are_those_of_optax(dtype):
    """In float32 to rounding; in bfloat16 as far as an iteration goes that does not converge but to a range."""
    dimensions: Any = dict.fromkeys(SHAPES, contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2))
    theirs = optax.chain(
        contrib.scale_by_muon(beta=0.9, weight_dimension_numbers=dimensions),
        contrib._muon.scale_by_shape(dimensions, consistent_rms=0.2),
    )
    ours = scale_by_muon(0.9, dtype, multiple=4)
    params = normal(0, SHAPES)
    states = [ours.init(params), theirs.init(params)]
    for seed in range(3):
        gradients = normal(seed + 1, SHAPES)
        (found, states[0]), (wanted, states[1]) = ours.update(gradients, states[0]), theirs.update(gradients, states[1])
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert relative_error(one, other) < (1e-4 if dtype == jnp.float32 else 0.15)


def test_the_iteration_flattens_the_singular_values():
    stack = jax.random.normal(jax.random.key(0), (3, 16, 40))
    found = np.asarray(newton_schulz(stack, jnp.float32))
    for one, matrix in zip(found, np.asarray(stack), strict=True):
        values = np.linalg.svd(one, compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.3
        u, _, vt = np.linalg.svd(matrix, full_matrices=False)
        assert np.abs(np.diag(u.T @ one @ vt.T) - values.mean()).max() < 0.5
    assert not np.asarray(newton_schulz(jnp.zeros((1, 4, 8)), jnp.float32)).any()


def test_one_stack_a_shape():
    """w1 and w2 are iterated together; what fills the stack up is left out again."""
    stacks = list(normal(3, SHAPES).values())
    together = orthogonalized(stacks, jnp.float32, multiple=5)
    alone = [orthogonalized([stack], jnp.float32)[0] for stack in stacks]
    for one, other in zip(together, alone, strict=True):
        assert_close(one, other)
    text = jax.jit(lambda *s: orthogonalized(s, jnp.float32)).lower(*stacks).as_text()
    assert text.count("stablehlo.dot_general") == 3 * 5 * 3, "three shapes"


def test_matrices_of_layers_alone():
    params = initial_state(run_config()).params
    found = kinds(params)
    assert found["embedding"] == found["head"] == found["final_scale"] == found["blocks"]["ffn_scale"] == "adamw"
    assert set(jax.tree.leaves([found["blocks"]["ffn"], found["blocks"]["attention"]])) == {"muon"}


def test_decay_rate_and_clipping_by_hand():
    """One step: W - lr (update + decay W) for a matrix, AdamW's for the rest, all clipped together."""
    config = Optimizer(kind="muon", clip=0.5, weight_decay=0.3, no_decay=("*w1",), momentum=0.8)
    params = {"head": jnp.ones((3, 4)), "blocks": {"w1": jnp.ones((1, 3, 4)), "w2": jnp.ones((1, 4, 3))}}
    gradients = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) - 2, params)
    ours = optimizer(config, optax.constant_schedule(0.1))
    updates: Any = ours.update(gradients, ours.init(params), params)[0]
    for name, decay in (("w1", 0.0), ("w2", 0.3)):
        (direction,) = orthogonalized([gradients["blocks"][name]], jnp.float32)
        wanted = -0.1 * (0.2 * 2 * direction + decay * params["blocks"][name])
        assert relative_error(updates["blocks"][name], wanted) < 1e-4
    assert relative_error(updates["head"], -0.1 * (jnp.sign(gradients["head"]) + 0.3)) < 1e-4
    with pytest.raises(ValueError, match="matches none of the parameters"):
        decay_mask(Optimizer(no_decay=("w3",)), params)
    with pytest.raises(ValueError, match=r"Optimizer.momentum=1 must be below 1"):
        Optimizer(momentum=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = run_config(
        phases=((0, "dense"), (2, "venom")), steps=4, eval_every=4, checkpoint_every=2, keep_checkpoints=9,
        sample_tokens=0, optimizer={"kind": "muon", "first_moment_dtype": "bfloat16"},
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("muon")
    assert run_to_end(config, workdir) == 0
    return config, workdir


def test_a_run_goes_on_with_its_momentum(finished, tmp_path):
    """Stopped in the middle and resumed before neurons move, to the bit; it learns."""
    config, whole = finished
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(whole, half, dirs_exist_ok=True)
    shutil.rmtree(half / "checkpoints" / "4")
    assert run_to_end(config, half) == 0
    assert_same_bits(final_state(config, half), final_state(config, whole))
    losses = [record["loss"] for record in records(whole, "train")]
    assert losses[-1] < losses[0] - 0.2
    with pytest.raises(ValueError, match=r"Optimizer.kind is 'muon' there and 'adamw' here"):
        loop.prepare(replace(config, optimizer=replace(config.optimizer, kind="adamw")), half)


def test_neurons_move_in_the_momentum_as_in_the_weights():
    config = run_config(phases=((0, "dense"), (2, "venom")), optimizer={"kind": "muon"})
    state = initial_state(config)
    _, moved = for_run(config)[0].update(state.params, state.opt_state, state.params)  # momentum like the weights
    before = replace(state, opt_state=moved)
    after, report = loop.switch_phase(before, config, 1)
    assert report["clustered_experts"] == 4

    def momentum(opt_state, name):
        leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)]
        (found,) = [leaf for path, leaf in leaves if ".mu" in path and path.endswith(f"['{name}']")]
        return found

    for name in ("w1", "w2"):
        weights = after.params["blocks"]["ffn"][name]
        assert not np.array_equal(weights, state.params["blocks"]["ffn"][name])
        found = momentum(after.opt_state, name)
        ratio = np.asarray(found / weights)
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-3)
