"""What a layer keeps between its two passes: python -m venom_jax.memory [--tokens T --d_model D --d_ffn F --dtype NAME]

Beside its inputs, which the model keeps anyway, the dense layer keeps y1 (y2 = relu(y1)^2 is made again, if the
compiler or `jax.checkpoint` says so) or y1 and y2; the packed form keeps what `packed_ffn.Residuals` holds. Bytes are
those of the arrays that JAX hands from the forward to the backward, found by tracing, without running anything. Arrays
of a routed layer have the size of the fullest case, all groups padded.
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
from venom_jax.ffn import pack_weights, rows_of_kernels
from venom_jax.pattern import Recipe

RECIPES = {
    "act24": Recipe.act24(),
    "act24, one copy": Recipe.act24(token_copy="rebuilt"),
    "all24": Recipe.all24(),
    "venom E=4 k=2": Recipe.venom(4, 2),
    "venom E=4 k=2, one copy": Recipe.venom(4, 2, token_copy="rebuilt"),
    "venom E=4 k=1": Recipe.venom(4, 1),
    "venom E=4 k=1, one copy": Recipe.venom(4, 1, token_copy="rebuilt"),
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes of what one layer keeps.

    Attributes:
      activations: a, dense or packed, its positions included.
      order: where each token's rows lie.
      dense: one dense activation, T x F, to compare with.
    """

    activations: int
    order: int
    dense: int

    @property
    def ratio(self) -> float:
        """All that is kept, in dense activations."""
        return (self.activations + self.order) / self.dense


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
    dense = tokens * d_ffn * jnp.dtype(dtype).itemsize
    if recipe.is_dense:
        return Kept(dense, 0, dense)
    saved = jax.eval_shape(
        functools.partial(_saved, recipe),
        jax.ShapeDtypeStruct((tokens, d_model), dtype),
        jax.ShapeDtypeStruct((d_model, d_ffn), jnp.float32),
        jax.ShapeDtypeStruct((d_ffn, d_model), jnp.float32),
    )
    return Kept(_bytes((saved.dense, saved.features, saved.tokens)), _bytes(saved.grouping), dense)


def _saved(recipe: Recipe, x: Array, w1: Array, w2: Array) -> packed_ffn.Residuals:
    route = jnp.zeros((x.shape[0], recipe.top_k), jnp.int32) if recipe.routed else None
    weights = pack_weights(w1, w2, jnp.ones(4), dtype=x.dtype, implementation="reference") if recipe.weights else None
    sparse_w1 = weights.w1 if weights is not None and "y1" in recipe.weights else None
    grouping = rows_of_kernels(recipe, route, x.shape[0], "reference")
    return packed_ffn.forward(recipe, "reference", x, w1, w2, sparse_w1, grouping)[2]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def table(tokens: int, d_model: int, d_ffn: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> str:
    """Every recipe of `RECIPES` beside the dense layer, as a Markdown table."""
    dense = kept(Recipe.dense(), tokens, d_model, d_ffn, dtype).activations
    rows = [("dense, y1 alone", Kept(dense, 0, dense)), ("dense, y1 and y2", Kept(2 * dense, 0, dense))]
    rows += [(name, kept(recipe, tokens, d_model, d_ffn, dtype)) for name, recipe in RECIPES.items()]
    lines = ["| recipe | activations, MB | order of rows, MB | in dense activations |", "|---|---|---|---|"]
    for name, found in rows:
        lines.append(f"| {name} | {found.activations / 1e6:.1f} | {found.order / 1e6:.1f} | {found.ratio:.3f} |")
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
