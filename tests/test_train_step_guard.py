"""Steps that must not count: injected faults are noticed, named, and cost the step alone or the run."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.faults.ledger import tried
from tests.trainer import (
    assert_same_bits,
    build,
    final_state,
    gin_bindings,
    records,
    run_config,
    run_to_end,
    three_phases,
)
from train import loop
from train.config.settings import Guard, load_config
from train.data.token_files import TokenDataset
from train.loop import prepare
from train.records.metrics import read_metrics
from train.state.state import initial_state
from train.step import explain
from train.step.explain import first_bad
from train.step.guard import BadStepError, Watch
from train.step.step import make_train_step

UNUSED = 319  # a token of the model's vocabulary that the text never holds


def change(state, name, where, value):
    """The state with some values of a parameter changed; ``name`` is its path."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.at[where].set(value) if jax.tree_util.keystr(path, simple=True, separator=".") == name else leaf
        ),
        state.params,
    )
    return replace(state, params=params)


@pytest.fixture
def before_step(monkeypatch):
    """before_step(number, fault): state -> fault(state) before the step of that number (from 0)."""
    three_phases()  # which looks at the unchanged program
    faults = {}
    original = loop.make_train_step

    def make(*args):
        step = original(*args)

        def run(state, tokens, limit, number):
            return step(faults.get(int(number), lambda state: state)(state), tokens, limit, number)

        return run

    monkeypatch.setattr(loop, "make_train_step", make)
    return faults.__setitem__


BAD_W1 = ("blocks.ffn.w1", (1, 3, slice(None)), 1e25)  # its square overflows


def phase_of(config, step):
    """What the ledger calls the phase that a step belongs to."""
    recipe = config.schedule.phases[config.schedule.index_at(step - 1)].recipe
    return f"{'dense' if recipe.is_dense else 'sparse'} phase"


# what is changed, and what is named first
FAULTS = {
    "parameter": ([("blocks.ffn.w2", (1, 3, 5), jnp.nan)], "the parameter ffn.w2 in layer 1 (1 NaN and 0 inf of"),
    "activation": ([BAD_W1], "the output of layer 1 (behind the FFN)"),
    "gradient": (
        [
            ("blocks.ffn.w1", 1, 1e-12),
            ("blocks.ffn.w2", (1, ..., slice(None, None, 4)), 3e38),
            ("final_scale", (), 1e22),
        ],
        "the gradient of ffn.w1 in layer 1",
    ),
}


@pytest.mark.parametrize(
    ("step", "fault"), [(3, "activation"), (7, "parameter"), (7, "activation"), (7, "gradient"), (11, "gradient")]
)
def test_a_bad_step_stops_the_run_and_is_traced_to_its_tensor(tmp_path, before_step, step, fault):
    """The state is still the one before the step, though the next step was on its way when the host learnt of it."""
    config, uninterrupted, _ = three_phases()
    changes, named = FAULTS[fault]

    def break_it(state):
        for one in changes:
            state = change(state, *one)
        return state

    before_step(step - 1, break_it)
    with pytest.raises(BadStepError, match=rf"^step {step}: .*{re.escape(named)}.*Guard.action = 'skip'"):
        run_to_end(config, tmp_path)
    (bad,) = records(tmp_path, "bad_step")
    assert bad["step"] == step
    assert not bad["skipped"]
    assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, step))
    before_step(step - 1, lambda state: state)  # whatever broke it is repaired
    assert prepare(config, tmp_path).checkpoints.latest == step - 1
    if step == 3:
        assert run_to_end(config, tmp_path) == 0
        assert_same_bits(final_state(config, tmp_path), final_state(config, uninterrupted))
    what = f"{'NaN' if fault == 'parameter' else 'inf'} in {fault} of a {phase_of(config, step)}"
    tried(what, 1, "stopped with the state before the step, the tensor named", step=step)


def skipping(**guard):
    config = three_phases()[0]
    return replace(config, guard=Guard("skip", **guard))


def test_bad_steps_are_skipped_in_dense_and_sparse_phases(tmp_path, before_step, monkeypatch):
    """A row of the embedding is NaN, and the token that reads it stands in two batches."""
    original, count = TokenDataset.windows, iter(range(1000))

    def windows(self, *args):
        out = original(self, *args)
        if self.split == "train" and next(count) in (2, 6):
            out[4, 5] = UNUSED
        return out

    monkeypatch.setattr(TokenDataset, "windows", windows)
    before_step(0, lambda state: change(state, "embedding", UNUSED, jnp.nan))
    config = skipping()
    assert run_to_end(config, tmp_path) == 0
    bad = records(tmp_path, "bad_step")
    assert [(record["step"], record["skipped"], record["loss"]) for record in bad] == [
        (3, True, "nan"),
        (7, True, "nan"),
    ]
    assert all("the parameter embedding (32 NaN" in record["first"] for record in bad)
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 4, 5, 6, 8, 9, 10, 11, 12]
    for name, array in final_state(config, tmp_path).items():
        healthy = np.delete(array, UNUSED, 0) if "embedding" in name else array
        assert np.isfinite(healthy.astype(np.float64)).all(), name
    for step in (3, 7):
        tried(
            f"NaN in loss of a {phase_of(config, step)}", 1, "step skipped, the tensor named, weights finite", step=step
        )


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path, before_step):
    config = skipping(max_skips=2)
    before_step(1, lambda state: change(state, *BAD_W1))
    message = r"^step 4: loss nan.*after 2 skipped ones \(Guard.max_skips\); not finite is the output of layer 1"
    with pytest.raises(BadStepError, match=message):
        run_to_end(config, tmp_path)
    assert [record["skipped"] for record in records(tmp_path, "bad_step")] == [True, True, False]


@pytest.mark.parametrize("step", [7, 11])  # in the sparse phase, in the dense one after it
def test_a_spike_stops_the_run_and_names_the_largest_gradient(tmp_path, before_step, step):
    config = replace(three_phases()[0], guard=Guard(spike=2.0, window=3))
    before_step(step - 1, lambda state: change(state, "final_scale", (), 300.0))
    message = rf"^step {step}: .*Guard.spike=2.0 above the usual [345]\.\d+ is exceeded.*of norm"
    with pytest.raises(BadStepError, match=message):
        run_to_end(config, tmp_path)
    assert prepare(config, tmp_path).checkpoints.latest == step - 1
    tried(f"spike of the loss in a {phase_of(config, step)}", 1, "stopped with the state before the step", step=step)


def test_a_guard_that_finds_nothing_changes_no_bit(tmp_path):
    config, uninterrupted, _ = three_phases()
    assert run_to_end(skipping(spike=5.0, window=2), tmp_path) == 0
    assert records(tmp_path) == records(uninterrupted)
    assert_same_bits(final_state(config, tmp_path), final_state(config, uninterrupted))


def test_a_skipped_step_moves_the_number_and_the_learning_rate_alone():
    config = skipping()
    graphdef, _, _ = build(config.model, config.max_experts, 0)
    state = initial_state(config)
    before = jax.tree.map(np.asarray, state)
    tokens = np.zeros((8, 17), np.int32)
    after, _ = make_train_step(graphdef, config)(state, tokens, np.float32(-1.0), np.int32(0))
    expected = jax.tree_util.tree_map(
        lambda node: node._replace(count=node.count + 1) if isinstance(node, optax.ScaleByScheduleState) else node,
        replace(before, step=before.step + 1),
        is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState),
    )
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), expected)


def test_every_microbatch_is_looked_at():
    config = run_config(accumulation=2, dtype="bfloat16")
    graphdef, _, _ = build(config.model, config.max_experts, 0)
    state = initial_state(config)
    tokens = jnp.zeros((8, 17), jnp.int32)
    assert first_bad(graphdef, config, state, tokens, 0).startswith("all is finite when it is computed again; the grad")
    tokens = tokens.at[5, 2].set(UNUSED)
    beyond_bfloat16 = change(state, "embedding", UNUSED, 3.402e38)
    assert "the embedded tokens in microbatch 1 (0 NaN and 32 inf" in first_bad(
        graphdef, config, beyond_bfloat16, tokens, 0
    )


def test_the_loss_that_is_looked_at_is_the_steps():
    config = run_config(z_loss=0.1)
    graphdef, _, _ = build(config.model, config.max_experts, 0)
    state, tokens = initial_state(config), jnp.arange(8 * 17, dtype=jnp.int32).reshape(8, 17)
    tensors = dict(explain._tensors(graphdef, config, config.schedule.recipes[0], state, tokens, 0))
    _, metrics = make_train_step(graphdef, config)(state, tokens)
    np.testing.assert_allclose(tensors["the loss"], metrics["loss"], rtol=1e-6)


def watch_of(losses, **guard):
    config = replace(run_config(), guard=Guard(**guard))
    return Watch(config, build(config.model, 1, 0)[0], losses)


def test_limits_do_not_depend_on_when_the_host_learns_or_resumes():
    """The limit of step n + 1 is made of the losses up to step n - 1, whatever is known of step n."""
    losses = [(step, 10.0 - step) for step in range(1, 9)]
    late, fresh = watch_of([], spike=1.5, window=3), watch_of(losses[:6], spike=1.5, window=3)
    limits = {}
    for number in range(8):
        limits[number] = late.begin(number, None)[0]
        if number:
            assert late.accepts(number, losses[number - 1][1], 1.0)
            late.learn(*losses[number - 1])
    assert limits[3] == np.inf
    assert limits[6] == 6 + 1.5
    assert fresh.begin(6, None) == (limits[6], 6)


def test_only_logged_losses_make_limits():
    watch = watch_of([], spike=1.0, window=1)
    for number in range(3):
        watch.begin(number, None)
        assert watch.accepts(number + 1, 100.0, 1.0)
    assert watch.begin(3, None)[0] == np.inf


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("action", "ignore", "Guard.action='ignore' must be one of 'stop', 'skip'"),
        ("spike", 0.0, "Guard.spike=0.0 must be positive"),
        ("window", 0, "Guard.window=0 must be at least 1"),
        ("max_skips", True, "Guard.max_skips=True must be int"),
    ],
)
def test_settings_that_make_no_sense_are_refused(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config([], [*gin_bindings(), f"Guard.{field} = {value!r}"])


def test_bad_steps_are_no_training_records(tmp_path, before_step):
    """metrics.jsonl stays JSON that any program reads: a loss that is no number is written as text."""
    config = skipping(max_skips=1)
    before_step(1, lambda state: change(state, *BAD_W1))
    with pytest.raises(BadStepError):
        run_to_end(config, tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert ": NaN" not in text
    assert {record["kind"] for record in read_metrics(tmp_path)} == {"phase", "train", "bad_step"}
