"""Token embedding, and its gradient in a fixed order of additions.

One dimension key: B batch, S sequence, D d_model, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B S"], dtype: Any, deterministic: bool = False
) -> Float[Array, "B S D"]:
    """table[tokens] in `dtype`; the gradient is summed in the table's dtype.

    A frequent token's row is a sum over thousands of tokens: in bfloat16 it would stop at some 256 times one of them.

    deterministic: its gradient is a product in float32 and not a scatter, whose atomics add on a GPU as they come.
      The product has as many multiplications as the head's, 2 B S V D.
    """
    if deterministic:
        return _look_up(table.shape[0], table.dtype, jnp.dtype(dtype), table, tokens)
    return table[tokens].astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _look_up(rows: int, master: Any, dtype: Any, table: Float[Array, "V D"], tokens: Int[Array, "B S"]):
    return table[tokens].astype(dtype)


def _forward(rows, master, dtype, table, tokens):
    return table[tokens].astype(dtype), tokens


def _backward(rows, master, dtype, tokens, gradient):
    """sum over b, s of indicator(tokens[b, s] = v) gradient[b, s], one row of the batch at a time: S V indicators."""

    def add(total, row):
        token, part = row
        indicator = jax.nn.one_hot(token, rows, dtype=part.dtype)
        # With the default precision a GPU would round float32 gradients to TF32.
        product = jnp.einsum("sv,sd->vd", indicator, part, precision="highest", preferred_element_type=jnp.float32)
        return total + product, None

    zeros = jnp.zeros((rows, gradient.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, (tokens, gradient))
    return total.astype(master), None


_look_up.defvjp(_forward, _backward)
