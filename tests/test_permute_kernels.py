"""The permutation's kernels give the reference's bits: emulated thread by thread here, on a Hopper GPU there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import hopper
from pallas_kernels.permute import api, reference
from tests import word_machine
from tests.word_machine import NumpyPermuteMachine


@pytest.fixture
def emulated(monkeypatch):
    """implementation="hopper" runs the kernels' threads in numpy."""

    def launch(body, blocks, dtype, arrays, out, *, shared, machine):
        del machine
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        name = jnp.dtype(dtype).name
        found = word_machine.run_blocks(body, blocks, name, arrays, out, shared=shared, machine=NumpyPermuteMachine)
        return {name: jnp.asarray(array) for name, array in found.items()}

    monkeypatch.setattr(hopper, "launch", launch)
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)


@pytest.fixture
def lowering(monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)


def groups_of(tokens: int, top_k: int, groups: int, seed: int = 0) -> jax.Array:
    """Distinct groups for each token, some far fuller than others."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=groups) + 1e-3
    noise = rng.gumbel(size=(tokens, groups)) + np.log(weights)
    return jnp.asarray(np.sort(np.argsort(-noise, axis=1)[:, :top_k], axis=1), jnp.int32)


def assert_same(found, expected):
    for out, ref in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert out.dtype == ref.dtype
        assert out.shape == ref.shape
        bits = np.uint16 if out.dtype.itemsize == 2 else np.uint32
        np.testing.assert_array_equal(np.asarray(out).view(bits), np.asarray(ref).view(bits))


def check_sort(tokens, top_k, groups, align=64, interleaved=True):
    group = groups_of(tokens, top_k, groups)
    options = {"align": align, "interleaved": interleaved}
    found = api.sort_into_groups(group, groups, **options, implementation="hopper")
    sort = jax.jit(functools.partial(reference.sort_into_groups, groups=groups, **options))
    assert_same(found, sort(group))
    return found


def check_rows(tokens, top_k, groups, width, dtype):
    where = reference.sort_into_groups(groups_of(tokens, top_k, groups), groups, align=64, interleaved=True)
    x = jax.random.normal(jax.random.key(0), (tokens, width)).astype(dtype)
    x = x.at[tokens - 1, 0].set(jnp.nan)  # the token that padding rows read
    rows = jax.jit(reference.gather_rows)(x, where.token_of_row)
    assert_same(api.gather_rows(x, where.token_of_row, implementation="hopper"), rows)
    rows = jax.random.normal(jax.random.key(1), rows.shape).astype(dtype)
    total = jax.jit(reference.sum_copies)(rows, where.row_of_slot)
    assert_same(api.sum_copies(rows, where.row_of_slot, implementation="hopper"), total)
    check_weighted_rows(x.at[tokens - 1, 0].set(jnp.inf), rows, where)


def check_weighted_rows(x, rows, where):
    of_copy = jax.random.uniform(jax.random.key(2), where.row_of_slot.shape)
    of_row = jnp.full(len(where.token_of_row), 2.0).at[where.row_of_slot.reshape(-1)].set(of_copy.reshape(-1))
    found = api.gather_rows(x, where.token_of_row, of_row, implementation="hopper")
    assert_same(found, jax.jit(reference.gather_rows)(x, where.token_of_row, of_row))
    assert not np.asarray(found, np.float32)[np.asarray(where.token_of_row) == len(x)].any()
    found = api.sum_copies(rows, where.row_of_slot, of_copy, implementation="hopper")
    expected = (np.asarray(rows, np.float64)[where.row_of_slot] * np.asarray(of_copy)[:, :, None]).sum(1)
    # Rounded once to 16 bits; XLA may make one rounding of a product and a sum.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)


def check_choice(tokens, d_model, experts, top_k, *, cosine, with_bias):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, d_model)).astype(jnp.bfloat16)
    means = jax.random.normal(keys[1], (experts, d_model)) / d_model**0.5
    means = means.at[experts // 2].set(means[0])  # a tie for every token
    bias = 0.01 * jax.random.normal(keys[2], (experts,)) if with_bias else None
    found = api.choose_experts(x, means, bias, top_k, cosine=cosine, implementation="hopper")
    scores = np.asarray(reference.score_experts(x, means, cosine=cosine))
    scores = scores if bias is None else scores + np.asarray(bias)
    expected = np.asarray(reference.choose_top(jnp.asarray(scores), None, top_k))
    found = np.asarray(found)
    assert found.shape == expected.shape
    assert (np.diff(found, axis=1) > 0).all()
    differs = (found != expected).any(axis=1)
    # Where it differs from the reference, the scores do not: the order of a sum decides.
    np.testing.assert_allclose(
        np.take_along_axis(scores, found, 1)[differs].sum(1),
        np.take_along_axis(scores, expected, 1)[differs].sum(1),
        atol=1e-5 if cosine else 1e-3,
    )
    assert differs.mean() < 0.01
    if with_bias is False:
        assert not (found == experts // 2).any(axis=1)[~(found == 0).any(axis=1)].any(), "ties go to the lower expert"


SORTS = [(1, 1, 1), (5, 3, 4), (130, 2, 16), (700, 1, 8), (2100, 4, 5)]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("tokens", "top_k", "groups"), SORTS)
def test_emulated_sort(tokens, top_k, groups):
    check_sort(tokens, top_k, groups)


@pytest.mark.usefixtures("emulated")
def test_emulated_sort_of_many_steps_and_groups():
    check_sort(9000, 2, 128)
    check_sort(300, 2, 5, align=128, interleaved=False)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("empty", [0, 3])
def test_emulated_sort_into_one_of_many_groups(empty):
    group = jnp.full((200, 1), 2, jnp.int32) if empty else jnp.zeros((200, 1), jnp.int32)
    options = {"align": 64, "interleaved": True}
    found = api.sort_into_groups(group, 4, **options, implementation="hopper")
    assert_same(found, reference.sort_into_groups(group, 4, **options))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("interleaved", [True, False])
def test_emulated_kernels_stay_inside_whatever_the_indices(seed, interleaved):
    """Groups, rows and slots of any bits: numpy would refuse an index outside; honest tokens come back."""
    rng, tokens, groups = np.random.default_rng(seed), 130, 4
    group = np.sort(rng.permuted(np.tile(np.arange(groups), (tokens, 1)), axis=1)[:, :2]).astype(np.int32)
    extreme = rng.choice([-(2**31), -1, groups, groups + 1, 127, 128, 2**31 - 1], group.shape).astype(np.int32)
    lies = rng.random(group.shape) < (0.1, 0.5, 1.0)[seed]
    found = api.sort_into_groups(
        jnp.asarray(np.where(lies, extreme, group)), groups, align=64, interleaved=interleaved, implementation="hopper"
    )
    rows = found.token_of_row.shape[0]
    assert (np.asarray(found.row_of_slot).view(np.uint32) < rows).all()
    assert int(found.group_sizes.sum()) <= rows
    x = jax.random.normal(jax.random.key(seed), (tokens, 72)).astype(jnp.bfloat16)
    where = jnp.asarray(rng.choice([-(2**31), -1, 0, tokens - 1, tokens, 2**31 - 1], rows).astype(np.int32))
    gathered = np.asarray(api.gather_rows(x, where, implementation="hopper"))
    inside = (where >= 0) & (where < tokens)
    np.testing.assert_array_equal(gathered, np.where(inside[:, None], np.asarray(x)[np.clip(where, 0, tokens - 1)], 0))
    slots = jnp.asarray(rng.choice([-(2**31), -1, 0, rows - 1, rows, 2**31 - 1], (tokens, 2)).astype(np.int32))
    assert np.isfinite(
        np.asarray(api.sum_copies(jnp.asarray(gathered), slots, implementation="hopper"), np.float32)
    ).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (65, 3)])
def test_emulated_rows(tokens, top_k, dtype):
    check_rows(tokens, top_k, 4, 72, dtype)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("tokens", "d_model", "experts", "top_k", "cosine"),
    [(1, 128, 2, 1, True), (70, 256, 4, 2, False), (45, 384, 16, 4, True), (33, 512, 32, 8, False)],
)
def test_emulated_choice(tokens, d_model, experts, top_k, cosine):
    check_choice(tokens, d_model, experts, top_k, cosine=cosine, with_bias=cosine)


@pytest.mark.usefixtures("emulated")
def test_emulated_choice_without_a_number():
    x = jnp.ones((40, 128), jnp.bfloat16).at[3].set(jnp.nan).at[5].set(0)
    means = jax.random.normal(jax.random.key(0), (6, 128))
    found = api.choose_experts(x, means, None, 2, cosine=True, implementation="hopper")
    expected = api.choose_experts(x, means, None, 2, cosine=True, implementation="reference")
    assert_same(found, expected)
    np.testing.assert_array_equal(found[3], [0, 1])
    np.testing.assert_array_equal(found[5], [0, 1])


@pytest.mark.parametrize(("tokens", "top_k", "groups"), [(1, 1, 1), (16384, 4, 16), (200000, 1, 128)])
def test_sort_lowers(tokens, top_k, groups, lowering):
    group = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    sort = functools.partial(api.sort_into_groups, groups=groups, align=64, interleaved=True)
    assert lowered(sort, group).count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_row_kernels_lower(dtype, lowering):
    x, rows = (jax.ShapeDtypeStruct((n, 2048), dtype) for n in (1000, 2240))
    where, slots = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2240,), (1000, 2)))
    assert "mosaic_gpu" in lowered(api.gather_rows, x, where)
    assert "mosaic_gpu" in lowered(api.sum_copies, rows, slots)
    weights = [jax.ShapeDtypeStruct(of.shape, jnp.float32) for of in (where, slots)]
    assert "mosaic_gpu" in lowered(api.gather_rows, x, where, weights[0])
    assert "mosaic_gpu" in lowered(api.sum_copies, rows, slots, weights[1])


@pytest.mark.parametrize(("d_model", "experts", "top_k"), [(128, 2, 1), (2048, 16, 4), (4096, 32, 8)])
def test_choice_lowers(d_model, experts, top_k, lowering):
    def choose(x, means, bias):
        return api.choose_experts(x, means, bias, top_k, cosine=True, implementation="hopper")

    x = jax.ShapeDtypeStruct((1000, d_model), jnp.bfloat16)
    means, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((experts, d_model), (experts,)))
    assert "mosaic_gpu" in lowered(choose, x, means, bias)


def test_kernels_lower_under_vmap(lowering):
    """One more grid axis, whether or not an operand has the axis."""
    x, where = jax.ShapeDtypeStruct((3, 100, 128), jnp.bfloat16), jax.ShapeDtypeStruct((192,), jnp.int32)
    text = lowered(jax.vmap(api.gather_rows, (0, None)), x, where)
    assert text.count("@mosaic_gpu_v2") == 1
    assert "-> tensor<3x192x128xbf16>" in text


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "top_k", "groups"), [*SORTS, (16384, 1, 4), (16384, 4, 16), (70000, 2, 128)])
def test_hopper_sort(tokens, top_k, groups):
    check_sort(tokens, top_k, groups)
    check_sort(tokens, top_k, groups, align=128, interleaved=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 64), (65, 3, 72), (16384, 1, 2048), (5000, 4, 4096)])
def test_hopper_rows(tokens, top_k, width, dtype):
    check_rows(tokens, top_k, 4, width, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize(
    ("tokens", "d_model", "experts", "top_k"),
    [(1, 128, 2, 1), (45, 384, 16, 4), (33, 512, 32, 8), (16384, 2048, 16, 4), (16384, 4096, 4, 1)],
)
def test_hopper_choice(tokens, d_model, experts, top_k, cosine):
    check_choice(tokens, d_model, experts, top_k, cosine=cosine, with_bias=cosine)


@pytest.mark.gpu
def test_hopper_kernels_under_vmap():
    x = jax.random.normal(jax.random.key(0), (3, 200, 128)).astype(jnp.bfloat16)
    group = jnp.stack([groups_of(200, 2, 4, seed) for seed in range(3)])

    def there_and_back(x, group):
        where = api.sort_into_groups(group, 4, align=64, interleaved=True)
        return where, api.sum_copies(api.gather_rows(x, where.token_of_row), where.row_of_slot)

    each = [jax.jit(there_and_back)(*pair) for pair in zip(x, group, strict=True)]
    assert_same(jax.jit(jax.vmap(there_and_back))(x, group), jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


def test_sizes_and_types_that_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    with pytest.raises(ValueError, match="align=6"):
        api.sort_into_groups(jnp.zeros((10, 1), jnp.int32), 1, align=6, interleaved=True)
    with pytest.raises(NotImplementedError, match=r"16 bytes, got bfloat16\[4, 12\]"):
        api.gather_rows(jnp.zeros((4, 12), jnp.bfloat16), jnp.zeros(64, jnp.int32))
    means = jnp.zeros((33, 128))
    for x, reason in ((jnp.zeros((4, 128), jnp.bfloat16), "at most 32 experts"), (jnp.zeros((4, 128)), "got float32")):
        with pytest.raises(NotImplementedError, match=reason):
            api.choose_experts(x, means, None, 1, cosine=True, implementation="hopper")
        assert api.choose_experts(x, means, None, 1, cosine=True).shape == (4, 1), "None takes what runs"
