"""Pruned inputs of a linear layer: every criterion, shift and pattern against numpy, identities, and hard inputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import activation_numpy as oracle
from tests.helpers import relative_error
from venom_jax.activation import (
    NM,
    Parameters,
    Sparsity,
    Unstructured,
    collect,
    join,
    linear,
    parameters,
    parse_pattern,
    prune,
    prune_weight,
    select,
    sparse_linear,
)
from venom_jax.activation.criteria import channel_weight, low_rank
from venom_jax.activation.selection import kth_largest, lower_median
from venom_jax.activation.settings import as_json, describe, from_json, parse_layers, parse_mitigation, parse_overrides

T, I, O = 12, 64, 24  # noqa: E741 (the layer's letters)
PATTERNS = {"2:4": NM(2, 4), "4:8": NM(4, 8), "8:16": NM(8, 16), "16:32": NM(16, 32), "3:64": NM(3, 64)}
CRITERIA = ["act", "clact", "clact_causal", "rms", "amber", "amber_trimmed", "wina", "pcs", "outstanding", "weight_var"]
SHIFTS = ["none", "token", "token_mean", "tensor", "channel", "channel_mean"]
VARIANCES = ["none", "variance", "energy"]


@pytest.fixture(scope="module")
def layer():
    """Inputs, weight, bias and calibration inputs; one channel is much larger than the others."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=I))
    scale[5] = 40
    x, calibration = ((rng.normal(0.3, 1, (n, I)) * scale).astype(np.float32) for n in (T, 51))
    w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((I, O), (O,)))
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(b), calibration


def apply(x, w, b, sparsity, found):
    return sparse_linear(x, w, b, sparsity, found), prune(x, sparsity, found).mask


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_numpy_computes(layer, criterion, dtype):
    x, w, b, calibration = layer
    x = jnp.asarray(x, dtype)
    statistics = collect(calibration)
    chosen = list(itertools.product(SHIFTS, VARIANCES))[CRITERIA.index(criterion) % 2 :: 2 if dtype == "float32" else 6]
    for i, (shift, variance) in enumerate(chosen):
        name, pattern = list(PATTERNS.items())[i % len(PATTERNS)]
        sparsity = Sparsity(pattern, criterion, shift, variance)  # pyrefly: ignore
        y, mask = apply(x, w, b, sparsity, parameters(sparsity, w, statistics))
        expected, masks = oracle.forward(x, w, b, name, criterion, shift, variance, calibration)
        np.testing.assert_array_equal(mask, masks, err_msg=f"{sparsity}")
        assert relative_error(y, expected) < (1e-5 if dtype == "float32" else 1e-2), sparsity


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
def test_unstructured_keeps_the_largest_of_a_token(layer, ratio):
    x, w, b, calibration = layer
    y, mask = apply(x, w, b, Sparsity(Unstructured(ratio)), Parameters())
    expected, masks = oracle.forward(x, w, b, ratio, "act", "none", "none", calibration)
    np.testing.assert_array_equal(mask, masks)
    assert relative_error(y, expected) < 1e-5
    assert (mask.sum(1) == int(I * (1 - ratio) + 1e-9)).all()


def test_a_share_of_the_batch_is_one_choice_among_all_tokens(layer):
    x = np.abs(layer[0])
    mask = np.asarray(select(jnp.asarray(x), Unstructured(0.5, scope="batch")))
    assert mask.sum() == x.size // 2
    assert x[mask].min() >= x[~mask].max()
    assert len(set(mask.sum(1))) > 1


@pytest.mark.parametrize("pattern", [NM(4, 4), NM(16, 16), Unstructured(0.0)])
def test_what_keeps_everything_is_the_dense_layer_to_the_bit(layer, pattern):
    x, w, b, calibration = layer
    for dtype, shift in itertools.product(("float32", "bfloat16"), ("none", "channel", "token")):
        sparsity = Sparsity(pattern, "wina", shift, "variance")  # pyrefly: ignore
        found = parameters(sparsity, w, collect(calibration))
        xs = jnp.asarray(x, dtype)
        np.testing.assert_array_equal(sparse_linear(xs, w, b, sparsity, found), linear(xs, w, b))


def test_the_bias_of_the_layer_stays(layer):
    x, w, b, _ = layer
    sparsity = Sparsity(NM(2, 4))
    difference = sparse_linear(x, w, b, sparsity) - sparse_linear(x, w, None, sparsity)
    np.testing.assert_allclose(difference, np.broadcast_to(b, difference.shape), atol=1e-3)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, np.inf, np.nan]), min_size=32, max_size=32), st.sampled_from([2, 5, 8]))
@settings(max_examples=60, deadline=None)
def test_ties_zeros_infinities_and_nan_have_an_order(values, n):
    score = np.array(values, np.float32)
    mask = np.asarray(select(jnp.asarray(score), NM(n, 16)))
    np.testing.assert_array_equal(mask, oracle.keep(score, f"{n}:16"))
    ratio = 1 - n / 32
    mask = np.asarray(select(jnp.asarray(score), Unstructured(ratio)))
    np.testing.assert_array_equal(mask, oracle.keep(score, ratio))


def test_zeros_of_both_signs_are_equal_and_the_lower_input_wins():
    x = jnp.array([[-0.0, 0.0, -0.0, 0.0, 1.0, -1.0, 1.0, -1.0]])
    assert prune(x, Sparsity(NM(2, 4))).mask.tolist() == [[True, True, False, False] * 2]


def test_nan_and_infinity_reach_the_output(layer):
    x, w, b, _ = layer
    bad = jnp.asarray(x).at[3, 7].set(jnp.nan).at[4, 8].set(jnp.inf)
    y = np.asarray(sparse_linear(bad, w, b, Sparsity(NM(2, 4), variance="variance")))
    assert np.isnan(y[3]).all()
    assert not np.isfinite(y[4]).any()
    assert np.isfinite(np.delete(y, [3, 4], axis=0)).all()


def test_order_statistics_match_a_sort():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 31)).astype(np.float32)
    x[0, :3] = [np.inf, -np.inf, -0.0]
    for size in (31, 30, 1):
        expected = np.sort(x[:, :size], axis=1)[:, (size - 1) // 2 : (size - 1) // 2 + 1]
        np.testing.assert_array_equal(lower_median(jnp.asarray(x[:, :size])), expected)
    key = rng.integers(0, 2**32, (4, 17), dtype=np.uint32)
    np.testing.assert_array_equal(kth_largest(jnp.asarray(key), 5), np.sort(key, axis=1)[:, -5:-4])


# Identities of the method.


def test_a_shift_puts_itself_where_inputs_are_pruned(layer):
    x, w, _, calibration = layer
    sparsity = Sparsity(NM(2, 4), shift="channel")
    found = parameters(sparsity, w, collect(calibration))
    mask = np.asarray(prune(x, sparsity, found).mask)
    imputed = np.where(mask, x, found.shift)
    assert relative_error(sparse_linear(x, w, None, sparsity, found), imputed.astype(np.float64) @ w) < 1e-5


def test_the_gradient_of_a_shift_is_what_its_pruned_inputs_get(layer):
    x, w, _, calibration = layer
    sparsity = Sparsity(NM(2, 4), shift="learned")
    eta = jnp.asarray(np.median(calibration, axis=0))
    target = np.random.default_rng(3).normal(size=(T, O)).astype(np.float32)

    def loss(eta):
        y = sparse_linear(jnp.asarray(x), w, None, sparsity, Parameters(shift=eta))
        return 0.5 * jnp.sum((y - target) ** 2)

    y = sparse_linear(jnp.asarray(x), w, None, sparsity, Parameters(shift=eta))
    mask = prune(x, sparsity, Parameters(shift=eta)).mask
    expected = np.sum(~mask * ((y - target) @ w.T), axis=0)
    found = jax.grad(loss)(eta)
    assert relative_error(found, expected) < 1e-4
    with jax.enable_x64(True):
        at = jnp.asarray(eta, jnp.float64)

        def loss64(eta):
            y = sparse_linear(jnp.asarray(x, jnp.float64), w.astype(float), None, sparsity, Parameters(shift=eta))
            return 0.5 * jnp.sum((y - target) ** 2)

        slope = np.asarray(jax.grad(loss64)(at))
        for j in (0, 5, 17):
            step = jnp.zeros(I).at[j].set(1e-6)
            assert (loss64(at + step) - loss64(at - step)) / 2e-6 == pytest.approx(slope[j], rel=1e-4, abs=1e-2)


def test_gradients_are_finite_where_a_token_is_all_zeros(layer):
    x, w, b, _ = layer
    sparsity = Sparsity(NM(2, 4), shift="learned", variance="variance", learn_bias=True, learn_scale=True)
    found = parameters(sparsity, w, None)
    zeroed = jnp.asarray(x).at[2].set(0)
    gradients = jax.grad(lambda p: jnp.sum(sparse_linear(zeroed, w, b, sparsity, p) ** 2))(found)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradients))


def test_low_rank_carries_what_was_pruned(layer):
    x, w, b, _ = layer
    full = Sparsity(NM(2, 4), low_rank=min(I, O))
    assert relative_error(sparse_linear(x, w, b, full, parameters(full, w, None)), linear(x, w, b)) < 1e-5
    part = Sparsity(NM(2, 4), low_rank=4)
    found = parameters(part, w, None)
    mask = np.asarray(prune(x, part).mask)
    a, low = (np.asarray(m, np.float64) for m in (found.low_rank_a, found.low_rank_b))
    # The same without the pruned rest: the sparse product on w minus the low rank, and the thin path on all of x.
    expected = (x * mask) @ (w - (a @ low).T) + x @ (a @ low).T + b
    assert relative_error(sparse_linear(x, w, b, part, found), expected) < 1e-5
    assert relative_error((a @ low).T, w) < 1


def test_pcs_is_smoothing_by_another_name(layer):
    x, w, b, calibration = layer
    sparsity = Sparsity(NM(2, 4), "pcs")
    found = parameters(sparsity, w, collect(calibration))
    s = np.sqrt(np.abs(calibration).max(0) / np.abs(w).max(1))
    mask = np.asarray(prune(jnp.asarray(x / s), Sparsity(NM(2, 4))).mask)
    expected = np.asarray(x / s * mask, np.float64) @ (w * s[:, None]) + b
    assert relative_error(sparse_linear(x, w, b, sparsity, found), expected) < 1e-5


def test_clact_sees_no_scale_of_a_token_and_is_act_for_one_token(layer):
    x, _, _, _ = layer
    alone = jnp.asarray(x[:1])
    for name in ("clact", "clact_causal"):
        np.testing.assert_array_equal(
            prune(alone, Sparsity(NM(2, 4), name)).mask, prune(alone, Sparsity(NM(2, 4))).mask
        )
    norm = np.sqrt((x**2).sum(0))
    row = np.linalg.norm(x, axis=1, keepdims=True)
    with_row_norm = select(jnp.asarray(np.abs(x) / row * norm), NM(8, 16))
    np.testing.assert_array_equal(prune(x, Sparsity(NM(8, 16), "clact")).mask, with_row_norm)


def test_clact_reads_later_tokens_but_no_padding_and_the_causal_form_reads_neither(layer):
    x = jnp.asarray(layer[0])
    short, sparsity = x[:6], {name: Sparsity(NM(2, 4), name) for name in ("clact", "clact_causal")}
    whole, part = (prune(a, sparsity["clact"]).mask for a in (x, short))
    assert not np.array_equal(whole[:6], part)
    valid = jnp.arange(T) < 6
    np.testing.assert_array_equal(prune(x, sparsity["clact"], valid=valid).mask[:6], part)
    causal = prune(x, sparsity["clact_causal"]).mask
    np.testing.assert_array_equal(causal[:6], prune(short, sparsity["clact_causal"]).mask)
    sums = jnp.sum(jnp.square(x[:6]), axis=0)
    np.testing.assert_array_equal(causal[6:], prune(x[6:], sparsity["clact_causal"], earlier=sums).mask)


def test_wina_is_the_scale_of_r_sparse(layer):
    w = layer[1]
    left, singular, _ = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(
        np.asarray(channel_weight("wina", w, None)), np.linalg.norm(left * singular, axis=1), rtol=1e-5
    )


def test_patterns_are_nested_in_energy_for_every_token():
    rng = np.random.default_rng(2)
    for x in (rng.normal(size=(40, 1536)), rng.laplace(size=(40, 1536)), rng.normal(size=(40, 1536)) ** 5):
        x = jnp.asarray(x, jnp.float32)
        kept = [
            np.sum(np.where(select(jnp.abs(x), pattern), np.asarray(x, np.float64) ** 2, 0), axis=1)
            for pattern in (NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32), Unstructured(0.5))
        ]
        assert all((less <= more).all() for less, more in itertools.pairwise(kept))


@pytest.mark.parametrize(
    ("pattern", "gauss", "laplace"),
    [("2:4", 0.868, 0.920), ("8:16", 0.912, 0.956), ("50%", 0.929, 0.967), ("70%", 0.783, 0.879)],
)
def test_shares_of_energy_are_those_of_the_distributions(pattern, gauss, laplace):
    rng = np.random.default_rng(4)
    for x, expected in ((rng.normal(size=(400, 1024)), gauss), (rng.laplace(size=(400, 1024)), laplace)):
        mask = select(jnp.asarray(np.abs(x), jnp.float32), parse_pattern(pattern))
        assert np.sum(np.where(mask, x**2, 0)) / np.sum(x**2) == pytest.approx(expected, abs=0.002)


def test_batch_mates_change_nothing_and_it_maps(layer):
    x, w, b, calibration = layer
    sparsity = Sparsity(NM(8, 16), "rms", "channel", "variance")
    found = parameters(sparsity, w, collect(calibration))
    batch = jnp.stack([x, x[::-1], 2 * x])
    together = prune(batch, sparsity, found).mask
    for one, mask in zip(batch, together, strict=True):
        np.testing.assert_array_equal(mask, prune(one, sparsity, found).mask)
    mapped = jax.vmap(lambda x: sparse_linear(x, w, b, sparsity, found))(batch)
    assert relative_error(mapped, sparse_linear(batch, w, b, sparsity, found)) < 1e-6


def test_dense_tokens_are_dense(layer):
    x, w, b, calibration = layer
    sparsity = Sparsity(NM(2, 4), shift="channel", variance="variance")
    found = parameters(sparsity, w, collect(calibration))
    y = sparse_linear(x, w, b, sparsity, found, dense=jnp.arange(T) < 2)
    assert relative_error(y[:2], linear(x, w, b)[:2]) < 1e-5
    np.testing.assert_array_equal(y[2:], sparse_linear(x, w, b, sparsity, found)[2:])


def test_statistics_of_parts_are_those_of_the_whole(layer):
    _, _, _, calibration = layer
    whole, joined = collect(calibration), join([collect(calibration[:20]), collect(calibration[20:])])
    for a, b in zip(whole, joined, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_pruned_weights_keep_the_largest_of_each_output(layer):
    _, w, _, calibration = layer
    plain, wanda = prune_weight(w, NM(2, 4)), prune_weight(w, NM(2, 4), collect(calibration))
    for pruned, score in ((plain, np.abs(w)), (wanda, np.abs(w) * np.sqrt((calibration**2).mean(0))[:, None])):
        expected = np.stack([oracle.keep(score[:, o], "2:4") for o in range(O)], axis=1)
        np.testing.assert_array_equal(pruned, np.where(expected, w, 0))
    assert (plain != wanda).any()


# Settings and their errors.


def test_settings_survive_json():
    for sparsity in (
        Sparsity(),
        Sparsity(
            Unstructured(0.7, "batch"), "amber", "learned", "energy", True, True, 8, ("k", "v"), "prefill", 2, True
        ),
        Sparsity(overrides=(("3.up", None), ("4.q", NM(2, 4)))),
    ):
        assert from_json(as_json(sparsity)) == sparsity
    with pytest.raises(ValueError, match="no settings of activation sparsity"):
        from_json({"pattern": {"n": 2, "m": 4}})
    with pytest.raises(ValueError, match="no settings of activation sparsity"):
        from_json(as_json(Sparsity()) | {"colour": "red"})


def test_names_are_read():
    assert parse_pattern("8:16") == NM(8, 16)
    assert parse_pattern("70%") == Unstructured(0.7)
    assert Unstructured(0.7).kept(10) == 3
    assert parse_mitigation("channel+var") == {"shift": "channel", "variance": "variance"}
    assert parse_mitigation("rank64+bias") == {"low_rank": 64, "learn_bias": True}
    assert parse_overrides(["3.up=dense", "4.q=2:4"]) == (("3.up", None), ("4.q", NM(2, 4)))
    assert parse_layers("safe") == ("k", "v", "gate", "down")
    sparsity = Sparsity(NM(2, 4), shift="channel", variance="variance", layers=("o",), dense_prefix=1)
    assert describe(sparsity) == "2:4 act channel+var o first 1 tokens dense"


def test_blocks_that_are_pruned_alike_run_together():
    found = list(Sparsity(layers=("q", "up"), overrides=(("1.up", None), ("2.up", None), ("2.o", NM(2, 4)))).runs(5))
    assert [(first, end, sorted(patterns)) for first, end, patterns in found] == [
        (0, 1, ["q", "up"]),
        (1, 2, ["q"]),
        (2, 3, ["o", "q"]),
        (3, 5, ["q", "up"]),
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NM(0, 4), "0:4: N:M needs 0 < N <= M <= 64"),
        (lambda: NM(5, 4), "5:4"),
        (lambda: NM(2, 65), "2:65"),
        (lambda: Unstructured(1.0), r"\[0, 1\)"),
        (lambda: Unstructured(0.5, "all"), "'token', 'batch'"),  # pyrefly: ignore
        (lambda: parse_pattern("2/4"), "write N:M"),
        (lambda: parse_mitigation("token+tensor"), "set shift"),
        (lambda: parse_overrides(["3.up"]), "write N:M"),
        (lambda: parse_mitigation("magic"), "use names out of"),
        (lambda: parse_layers("q,w"), "no layer 'w'"),
        (lambda: Sparsity(criterion="best"), "use one of act"),  # pyrefly: ignore
        (lambda: Sparsity(layers=("head",)), "layers head"),
        (lambda: Sparsity(low_rank=-1), "must not be negative"),
        (lambda: Sparsity(overrides=(("up", None),)), "BLOCK.LAYER"),
        (lambda: select(jnp.ones((2, 10)), NM(2, 4)), "10 inputs is no multiple of 4"),
        (lambda: select(jnp.ones((2, 10)), Unstructured(0.95)), "keeps none"),
        (lambda: prune(jnp.ones((2, 8)), Sparsity(NM(2, 4), shift="channel")), "calibrate first"),
        (lambda: prune(jnp.ones((2, 8)), Sparsity(NM(2, 4), "wina")), "needs the parameter channel_weight"),
        (lambda: parameters(Sparsity(shift="channel"), np.ones((16, 2)), None), "calibrate on some text"),
        (lambda: low_rank(np.ones((16, 2)), 3), "more than the 2"),
        (lambda: collect(np.ones((0, 4))), "too short"),
        (lambda: join([]), "too short"),
    ],
)
def test_what_cannot_be_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
