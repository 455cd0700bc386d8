"""The decoder behaves as a causal transformer, whatever its options."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import assert_close
from tests.trainer import MODEL, build
from train.model import decoder
from venom_jax import LayerRecipes, Recipe

DENSE = Recipe.dense()


@pytest.fixture(scope="module")
def small():
    return build(MODEL, 4, seed=0)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 16), 0, MODEL.vocab_size)


def logits(built, tokens, *, recipe=DENSE, **options):
    graphdef, *arrays = built
    forward = jax.jit(lambda arrays: decoder.assemble(graphdef, *arrays)(tokens, recipe=recipe, **options)[0])
    return forward(arrays)


def test_causality_by_gradient(small, tokens):
    """The logits at position s depend on the embeddings up to s, and on each of them."""
    graphdef, params, method = small
    position = 6

    def score(rows):
        # Every position gets its own embedding row, so that a gradient tells positions apart.
        own = params | {"embedding": rows}
        found = logits((graphdef, own, method), jnp.arange(16)[None])
        return jnp.square(found[0, position]).sum()

    influence = np.abs(jax.grad(score)(params["embedding"][tokens[0]])).sum(-1)
    assert (influence[: position + 1] > 0).all()
    assert (influence[position + 1 :] == 0).all()


def test_rotary_turns_pairs_by_position_times_frequency():
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, 4))
    found = decoder.rotary(x, 100.0 ** -(jnp.arange(2) / 2))[0, :, 0]
    for position in range(5):
        for pair, frequency in enumerate((1.0, 0.1)):
            turned = complex(*x[0, position, 0, [pair, pair + 2]]) * np.exp(1j * position * frequency)
            np.testing.assert_allclose(found[position, [pair, pair + 2]], [turned.real, turned.imag], rtol=1e-5)


def test_rotary_inner_products_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    turned_q, turned_k = (
        decoder.rotary(jnp.tile(v, (1, 12, 1, 1)), 1e4 ** -(jnp.arange(4) / 4))[0, :, 0] for v in (q, k)
    )
    products = np.asarray(turned_q @ turned_k.T)
    for offset in (0, 3, -4):
        diagonal = np.diagonal(products, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert abs(products[0, 0] - products[0, 5]) > 1e-2


def test_rms_norm_has_unit_mean_square():
    x = jax.random.normal(jax.random.key(0), (3, 32)) * 7
    found = decoder.rms_norm(x, jnp.full(32, 2.0), 1e-6)
    np.testing.assert_allclose(jnp.mean(found**2, -1), 4.0, rtol=1e-5)


def test_grouped_queries_equal_multi_head_with_tied_weights(small, tokens):
    """K < H key-value heads give what H heads give when those of a group are copies."""
    config = replace(MODEL, heads=4, kv_heads=2)
    graphdef, params, method = build(config, 1, seed=3)
    grouped = logits((graphdef, params, method), tokens)

    L, D, h = MODEL.layers, MODEL.d_model, config.head_dim
    qkv = params["blocks"]["attention"]["qkv"].reshape(L, D, 4 + 2 + 2, h)
    query, key, value = jnp.split(qkv, (4, 6), axis=2)
    tied = jnp.concatenate([query, jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2)], axis=2).reshape(L, D, -1)
    blocks = params["blocks"]
    full = params | {"blocks": blocks | {"attention": blocks["attention"] | {"qkv": tied}}}
    full_structure = decoder.structure(replace(config, kv_heads=None), 1)
    assert_close(logits((full_structure, full, method), tokens), grouped, "float32")


@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, {"heads": 4, "kv_heads": 1}, {"qk_norm": True}])
def test_parameter_count(changes):
    config = replace(MODEL, **changes)
    _, params, _ = jax.eval_shape(lambda: (0, *build(config, 1, 0)[1:]))
    assert decoder.parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_tied_head_reads_the_embedding(tokens):
    graphdef, params, method = build(replace(MODEL, tied_head=True), 1, seed=0)
    assert "head" not in params
    hidden, *_ = decoder.assemble(graphdef, params, method).hidden(tokens, recipe=DENSE)
    assert_close(logits((graphdef, params, method), tokens), hidden @ params["embedding"].T, "float32")


def test_documents_in_one_sequence_are_as_if_alone():
    """Positions and attention begin anew at each start token, also where two follow each other."""
    row = [3, 4, 7, 10, 11, 12, 7, 7, 13, 14]
    packed = logits(build(replace(MODEL, document_start=7), 1, seed=0), jnp.asarray([row]))[0]
    spans = [(0, 2), (2, 6), (6, 7), (7, 10)]
    padded = [row[first:last] + [0] * (10 - last + first) for first, last in spans]
    alone = logits(build(MODEL, 1, seed=0), jnp.asarray([*padded, row]))
    for (first, last), expected in zip(spans, alone, strict=False):
        assert_close(packed[first:last], expected[: last - first], "float32")
    assert np.abs(packed[8:] - alone[-1, 8:]).max() > 1e-3


def test_the_norm_takes_the_size_of_queries_and_keys_away(tokens):
    graphdef, params, method = build(replace(MODEL, qk_norm=True, norm_epsilon=1e-9), 1, seed=0)
    forward = jax.jit(lambda params: decoder.assemble(graphdef, params, method)(tokens, recipe=DENSE)[0])
    attention = params["blocks"]["attention"]
    for name, changes in (("qkv", False), ("query_scale", True)):
        larger = attention[name].at[..., : 2 * MODEL.d_model].multiply(30.0)
        changed = params | {"blocks": params["blocks"] | {"attention": attention | {name: larger}}}
        assert (np.abs(forward(changed) - forward(params)).max() > 1e-4) == changes


def test_rematerialisation_and_unrolling_change_no_gradient(small, tokens):
    graphdef, params, method = small

    def gradient(**options):
        def loss(params):
            return jnp.square(logits((graphdef, params, method), tokens, recipe=Recipe.all24(), **options)).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    kept = gradient()
    for options in ({"remat": "dots"}, {"remat": "full"}, {"unroll": MODEL.layers}):
        for expected, found in zip(kept, gradient(**options), strict=True):
            assert_close(found, expected, "float32")


def test_statistics_have_one_structure_for_every_recipe(small, tokens):
    graphdef, params, method = small
    for recipe in (DENSE, Recipe.act24(), Recipe.venom()):
        _, stats = jax.eval_shape(lambda r=recipe: decoder.assemble(graphdef, params, method)(tokens, recipe=r))
        assert stats.density.shape == (MODEL.layers,)
        assert stats.load.shape == (MODEL.layers, 4)


def test_each_layer_runs_its_own_recipe(small, tokens):
    """As the blocks one after the other; statistics in the order of the layers, operations the layers' mean."""
    graphdef, params, method = small
    lower, upper = Recipe.act24(), Recipe.venom(4, 1)
    mixed = LayerRecipes(((0, lower), (1, upper)))

    def by_hand(params, method):
        built = decoder.assemble(graphdef, params, method)
        graph, blocks = nnx.split(built.blocks)
        x, stats = built.embedding[...][tokens], []
        for layer, recipe in enumerate((lower, upper)):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=layer: leaf[i], blocks))
            x, (found, _) = block(x, recipe, None, None, None)
            stats.append(found)
        x = decoder.rms_norm(x, built.final_scale[...], MODEL.norm_epsilon)
        return built.logits(x), jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)

    def found(params, method):
        return decoder.assemble(graphdef, params, method)(tokens, recipe=mixed)

    for one, other in zip(*(jax.tree.leaves(jax.jit(f)(params, method)) for f in (found, by_hand)), strict=True):
        assert_close(one, other)
    flops = [decoder.flops_per_token(MODEL, 16, recipe) for recipe in (lower, upper, mixed)]
    assert flops[2] == pytest.approx((flops[0] + flops[1]) / 2)


def test_flops_of_one_forward_agree_with_xla(tokens):
    """A third of the formula is the forward; XLA counts a scanned layer once, so the model has one layer."""
    config = replace(MODEL, layers=1, d_model=64, d_ffn=256)
    graphdef, params, method = build(config, 1, seed=0)
    forward = jax.jit(lambda params: logits((graphdef, params, method), tokens))
    analysis = forward.lower(params).cost_analysis()
    assert analysis is not None
    counted = analysis["flops"] / tokens.size
    # XLA does not skip the masked half of the attention and counts elementwise work.
    attention_half = 2 * config.d_model * tokens.shape[1]
    expected = decoder.flops_per_token(config, tokens.shape[1], DENSE) / 3 + attention_half
    assert expected == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    ("recipe", "share"),
    [
        (DENSE, 1.0),
        (Recipe.act24(), (1 + 0.5 + 1 + 0.5 + 0.5 + 0.5) / 6),
        (Recipe.all24(), 0.5),
        (Recipe.venom(), 0.125),
        (Recipe.venom(experts=16, top_k=4), 0.125),
        (Recipe.venom(wgrad="dense"), (4 * 0.125 + 2 * 0.25) / 6),
        (Recipe.venom(hidden="full"), (2 * 0.5 + 4 * 0.125) / 6),
    ],
)
def test_executed_share_of_the_ffn(recipe, share):
    config, dense_ffn = MODEL, 12 * MODEL.layers * MODEL.d_model * MODEL.d_ffn
    rest = decoder.flops_per_token(config, 16, DENSE) - dense_ffn
    assert decoder.flops_per_token(config, 16, recipe) - rest == pytest.approx(share * dense_ffn)
