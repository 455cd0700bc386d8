"""Muon: momentum, and of it the nearest semi-orthogonal matrix, for stacks of matrices.

    m <- b m + (1 - b) g        u = b m' + (1 - b) g' (Nesterov; ' divides by what b has left out so far)
    x <- u / |u|                five times: a = x x^T,  x <- c0 x + (c1 a + c2 a a) x
    update = 0.2 sqrt(max(rows, columns)) x

The factor makes an entry's update about as large as AdamW's, so that both take one learning rate and one weight decay
(arXiv 2502.16982). Iteration and coefficients are those of `optax.contrib.muon`, in the compute dtype; optax takes that
of the gradients, which the tensor core multiplies at half the rate or less.

An update costs 5 (4 r^2 c + 2 r^3) operations for a matrix of r x c, r <= c: for 1B 53 T, a third of a step of 16,384
tokens, and the same for a step of a million.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update's entries, where it is orthogonal: what AdamW's usually have."""
_EPSILON = 1e-8

type Place = Callable[[Array], Array]
"""Puts a stack somewhere: its matrices over devices."""


class MuonState(NamedTuple):
    """Updates so far, and the momentum of each stack of matrices."""

    count: Int[Array, ""]
    mu: Any


def scale_by_muon(
    momentum: float, dtype: Any, *, mu_dtype: Any = None, multiple: int = 1, place: Place = lambda stack: stack
) -> optax.GradientTransformation:
    """Updates of stacks of matrices [..., rows, columns], without the learning rate.

    Args:
      momentum: b.
      dtype: of the iteration's products.
      mu_dtype: of the momentum; None: the parameters'.
      multiple: to which a stack's number of matrices is filled up with zeros, and
      place: where it is then put: one matrix lies on one device, so that products need no exchange.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, momentum, 1)
        count: Any = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, momentum, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, momentum, count)
        wanted = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        leaves, structure = jax.tree.flatten(wanted)
        found = orthogonalized(leaves, dtype, multiple=multiple, place=place)
        scaled = [RMS * max(leaf.shape[-2:]) ** 0.5 * x for leaf, x in zip(leaves, found, strict=True)]
        return jax.tree.unflatten(structure, scaled), MuonState(count, optax.tree.cast(mu, mu_dtype))

    return optax.GradientTransformation(init, update)


def orthogonalized(
    stacks: Sequence[Float[Array, "..."]], dtype: Any, *, multiple: int = 1, place: Place = lambda stack: stack
) -> list[Float[Array, "..."]]:
    """About U V^T for each matrix U S V^T; those of one shape, or its transpose, are iterated as one stack."""
    wide = [_wide(stack) for stack in stacks]
    found: list[Any] = [None] * len(stacks)
    for shape in dict.fromkeys(stack.shape[1:] for stack in wide):
        members = [i for i, stack in enumerate(wide) if stack.shape[1:] == shape]
        counts = [wide[i].shape[0] for i in members]
        whole = jnp.concatenate([wide[i] for i in members])
        filled = jnp.pad(whole, ((0, -whole.shape[0] % multiple), (0, 0), (0, 0)))
        result = place(newton_schulz(place(filled), dtype))
        start = 0
        for i, count in zip(members, counts, strict=True):
            part, start = result[start : start + count], start + count
            tall = stacks[i].shape[-2] > stacks[i].shape[-1]
            found[i] = (part.mT if tall else part).reshape(stacks[i].shape)
    return found


def _wide(stack: Float[Array, "..."]) -> Float[Array, "n r c"]:
    """One leading axis, and no more rows than columns."""
    matrices = stack.reshape(-1, *stack.shape[-2:])
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def newton_schulz(stack: Float[Array, "n r c"], dtype: Any) -> Float[Array, "n r c"]:
    """The iteration of the module's docstring; singular values end between 0.7 and 1.2, those of zero at zero."""
    norms = jnp.linalg.norm(stack, axis=(1, 2), keepdims=True)
    x = (stack / (norms + _EPSILON)).astype(dtype)
    c0, c1, c2 = COEFFICIENTS
    for _ in range(ITERATIONS):
        a = x @ x.mT
        x = c0 * x + (c1 * a + c2 * (a @ a)) @ x
    return x.astype(stack.dtype)
