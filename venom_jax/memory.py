"""What a layer keeps between its two passes: python -m venom_jax.memory [--tokens T --d_model D --d_ffn F --dtype NAME]

Beside its inputs, which the model keeps anyway, the dense layer keeps y1 (y2 = relu(y1)^2 is made again, if the
compiler or `jax.checkpoint` says so) or y1 and y2; the packed form keeps what `packed_ffn.Residuals` holds, in eight
bits `fp8.packed.Residuals`: y2 in place of a, and x cast, a byte an entry. Bytes are those of the arrays that JAX hands
from the forward to the backward, found by tracing, without running anything. Arrays of a routed layer have the size of
the fullest case, all groups padded.
"""

import argparse
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array
from venom_jax import packed_ffn
from venom_jax.ffn import pack_weights
from venom_jax.fp8 import packed as packed_fp8
from venom_jax.masked import rows_of_kernels
from venom_jax.pattern import Recipe

RECIPES = {
    "act24": Recipe.act24(),
    "act24, one copy": Recipe.act24(token_copy="rebuilt"),
    "all24": Recipe.all24(),
    "venom E=4 k=2": Recipe.venom(4, 2),
    "venom E=4 k=2, one copy": Recipe.venom(4, 2, token_copy="rebuilt"),
    "venom E=4 k=1": Recipe.venom(4, 1),
    "venom E=4 k=1, one copy": Recipe.venom(4, 1, token_copy="rebuilt"),
    "dense fp8": Recipe.dense(precision="fp8"),
    "act24 fp8": Recipe.act24(precision="fp8"),
    "act24 fp8, one copy": Recipe.act24(precision="fp8", token_copy="rebuilt"),
    "venom E=4 k=1 fp8": Recipe.venom(4, 1, precision="fp8"),
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes of what one layer keeps.

    Attributes:
      activations: a (in eight bits y2), dense or packed, its positions and scales included.
      order: where each token's rows lie.
      dense: one dense activation, T x F, to compare with.
      input: x as the backward reads it, which a model may keep anyway where it is not cast.
    """

    activations: int
    order: int
    dense: int
    input: int

    @property
    def ratio(self) -> float:
        """All that is kept but the input, in dense activations."""
        return (self.activations + self.order) / self.dense

    @property
    def total(self) -> int:
        """All that is kept."""
        return self.activations + self.order + self.input


def kept(recipe: Recipe, tokens: int, d_model: int, d_ffn: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Kept:
    """What the packed form of a recipe keeps for T tokens.

    Raises:
      ValueError: sizes that the recipe cannot split.
      NotImplementedError: the packed form does not run the recipe.
    """
    recipe.check(d_model, d_ffn)
    reason = packed_ffn.unsupported(recipe, d_model, d_ffn)
    if reason is not None:
        raise NotImplementedError(reason)
    dense, plain_input = (tokens * size * jnp.dtype(dtype).itemsize for size in (d_ffn, d_model))
    if recipe.is_dense and not recipe.in_fp8:
        return Kept(dense, 0, dense, plain_input)
    saved = jax.eval_shape(
        functools.partial(_saved, recipe),
        jax.ShapeDtypeStruct((tokens, d_model), dtype),
        jax.ShapeDtypeStruct((d_model, d_ffn), jnp.float32),
        jax.ShapeDtypeStruct((d_ffn, d_model), jnp.float32),
    )
    activations, scales = (saved.dense, saved.features, saved.tokens), ()
    if isinstance(saved, packed_fp8.Residuals):
        scales, plain_input = (saved.scale, saved.peak), _bytes(saved.x)
    return Kept(_bytes((activations, scales)), _bytes(saved.grouping), dense, plain_input)


def _saved(recipe: Recipe, x: Array, w1: Array, w2: Array) -> packed_ffn.Residuals | packed_fp8.Residuals:
    route = jnp.zeros((x.shape[0], recipe.top_k), jnp.int32) if recipe.routed else None
    if recipe.in_fp8:
        packed: Any = pack_weights(w1, w2, jnp.ones(4), recipe=recipe, implementation="reference")
        grouping = rows_of_kernels(recipe, route, x.shape[0], "reference")
        first = packed.y1(recipe)
        return packed_fp8.forward(recipe, "reference", x, first, packed.w2, grouping)[2]
    weights: Any = None
    if recipe.weights:
        weights = pack_weights(w1, w2, jnp.ones(4), dtype=x.dtype, implementation="reference")
    sparse_w1 = weights.w1 if weights is not None and "y1" in recipe.weights else None
    grouping = rows_of_kernels(recipe, route, x.shape[0], "reference")
    return packed_ffn.forward(recipe, "reference", x, w1, w2, sparse_w1, grouping)[2]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def table(tokens: int, d_model: int, d_ffn: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> str:
    """Every recipe of `RECIPES` beside the dense layer, as a Markdown table."""
    dense = kept(Recipe.dense(), tokens, d_model, d_ffn, dtype)
    both = dataclasses.replace(dense, activations=2 * dense.activations)
    rows = [("dense, y1 alone", dense), ("dense, y1 and y2", both)]
    rows += [(name, kept(recipe, tokens, d_model, d_ffn, dtype)) for name, recipe in RECIPES.items()]
    lines = [
        "| recipe | activations, MB | order of rows, MB | in dense activations | input, MB |",
        "|---|---|---|---|---|",
    ]
    for name, found in rows:
        megabytes = [f"{size / 1e6:.1f}" for size in (found.activations, found.order, found.input)]
        lines.append(f"| {name} | {megabytes[0]} | {megabytes[1]} | {found.ratio:.3f} | {megabytes[2]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--d_model", type=int, default=2048)
    parser.add_argument("--d_ffn", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", help="of the activations")
    arguments = parser.parse_args()
    print(table(arguments.tokens, arguments.d_model, arguments.d_ffn, arguments.dtype), end="")


if __name__ == "__main__":
    main()
