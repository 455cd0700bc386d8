"""What the packed form keeps between its passes, and that a copy which is rebuilt is the one that was not kept."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_packed_ffn import RECIPES, inputs, run
from venom_jax import Recipe, memory

ROOT = Path(__file__).resolve().parent.parent


def rebuilt(name: str) -> Recipe:
    return dataclasses.replace(RECIPES[name], token_copy="rebuilt")


def check_bits(name, kernels, arrays):
    expected = run(*arrays, RECIPES[name], kernels)
    for out, ref in zip(run(*arrays, rebuilt(name), kernels), expected, strict=True):
        np.testing.assert_array_equal(out, ref)


@pytest.mark.parametrize("name", ["act24", "tokens only"])
def test_a_rebuilt_copy_gives_the_same_bits(name):
    check_bits(name, "reference", inputs(130))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["act24", "tokens only", "venom, two of four"])
def test_hopper_with_a_rebuilt_copy(name):
    check_bits(name, "hopper", inputs(512, jnp.bfloat16, d_model=256, d_ffn=1024))


def test_bytes():
    dense = 4096 * 512 * 2
    assert memory.kept(Recipe.act24(), 4096, 128, 512) == memory.Kept(9 * dense // 8, 0, dense, 4096 * 128 * 2)
    assert memory.kept(rebuilt("act24"), 4096, 128, 512).ratio == 9 / 16
    assert memory.kept(RECIPES["tokens only"], 4096, 128, 512).ratio == 1 + 9 / 16
    assert memory.kept(rebuilt("tokens only"), 4096, 128, 512).ratio == 1
    routed, rows = memory.kept(Recipe.venom(4, 2), 4096, 128, 512), (2 * 4096 + 4 * 63) // 64 * 64
    assert routed.activations == 9 * rows // 8 * (512 // 4) * 2
    assert routed.order == 4 * (rows + 2 * 4096 + 4)
    with pytest.raises(NotImplementedError, match="split95"):
        memory.kept(Recipe.act24(wgrad="split95"), 64, 64, 256)


def test_bytes_in_eight_bits():
    tokens, width, hidden = 16384, 2048, 8192
    entries, scales = tokens * hidden, 2 * 4 * hidden
    sixteen, eight = (memory.kept(Recipe.act24(**o), tokens, width, hidden) for o in ({}, {"precision": "fp8"}))
    assert eight.activations == 2 * entries * 5 // 8 + scales
    assert eight.input == tokens * width + 4 * width
    assert eight.total / sixteen.total < 0.55
    one = memory.kept(Recipe.act24(precision="fp8", token_copy="rebuilt"), tokens, width, hidden)
    assert one.activations == entries * 5 // 8 + scales
    assert memory.kept(Recipe.dense(precision="fp8"), tokens, width, hidden).activations == entries + scales
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        memory.kept(Recipe.act24(precision="fp8"), 64, 64, 256)


def test_the_documents_table_is_the_programs():
    assert memory.table(16384, 2048, 8192) in (ROOT / "docs/packing.md").read_text()
