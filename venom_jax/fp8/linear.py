"""A dense linear layer whose three products have e4m3 operands, for the projections around the FFN."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch
from pallas_kernels.array_types import Array, Float
from pallas_kernels.cast8 import api as cast8
from pallas_kernels.cast8.api import Cast
from pallas_kernels.dispatch import Implementation
from venom_jax.fp8 import products


class LinearWeight(NamedTuple):
    """A weight in e4m3 as `linear` reads it, forward and backward: data without gradient."""

    forward: Cast
    """w^T [N, D], one scale an output."""
    backward: Cast
    """w [D, N], one scale an input."""


def pack_linear(w: Float[Array, "D N"], *, implementation: Implementation | None = None) -> LinearWeight:
    """Cast a weight once per optimizer step instead of once per call of `linear`."""
    options = {"implementation": products.casting(_choose(implementation, *w.shape))}
    w = jax.lax.stop_gradient(w)
    return LinearWeight(cast8.by_column(w, interleaved=False, **options), cast8.by_row(w, **options))


def linear(
    x: Float[Array, "*B D"],
    w: Float[Array, "D N"],
    packed: LinearWeight | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*B N"]:
    """y = x w in eight bits, forward and backward.

        y = x8 w8         x per token, w per output
        dx = dy8 w8^T     dy per token, w per input
        dw = x8^T dy8     x and dy per feature, summed in f32 (`products.dot`, exact)

    Scales are those of the largest magnitudes in this very call, powers of two. The gradient goes straight through the
    casts. Of x its cast per feature is kept, a byte an entry.

    Args:
      x: any number of leading axes, one token among them; y and dx come in its dtype, summed in f32.
      w: the master; its gradient comes in its dtype.
      packed: `pack_linear(w)`; the caller keeps it in step with w.
      implementation: "hopper" multiplies on the FP8 tensor cores, "reference" by bf16 products of the same numbers.
        None takes the former on a Hopper GPU where D and N are multiples of 16.

    Raises:
      ValueError: x and w do not fit; sizes that are no multiples of 16 with implementation "hopper".
      NotImplementedError: the named implementation does not run on this device.
    """
    if x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x {x.shape} and w {w.shape} do not fit: x ends in {x.shape[-1]}, w begins with {w.shape[0]}."
        )
    chosen = _choose(implementation, *w.shape)
    packed = pack_linear(w, implementation=chosen) if packed is None else packed
    tokens = math.prod(x.shape[:-1])
    # Also one token: XLA refuses an 8-bit product of one row, and of a contraction over fewer than 16.
    rows = jnp.pad(x.reshape(tokens, x.shape[-1]), ((0, -tokens % products.GRANULE), (0, 0)))
    return _linear(chosen, rows, w, packed)[:tokens].reshape(*x.shape[:-1], w.shape[1])


def _choose(implementation: Implementation | None, d_in: int, d_out: int) -> Implementation:
    fits = d_in % products.GRANULE == 0 and d_out % products.GRANULE == 0
    if implementation is None:
        return "hopper" if fits and device.hopper_available() else "reference"
    if dispatch.resolve(implementation) == "hopper":
        dispatch.check_multiple(products.GRANULE, D=d_in, N=d_out)
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(implementation: Implementation, x, w, packed: LinearWeight):
    tokens = cast8.by_row(x, implementation=products.casting(implementation))
    return products.scaled(tokens, packed.forward, x.dtype, implementation=implementation)


def _forward(implementation, x, w, packed):
    kept = cast8.by_column(x, interleaved=False, implementation=products.casting(implementation))
    return _linear(implementation, x, w, packed), (kept, w, packed.backward)


def _backward(implementation, saved, dy):
    x, w, weight = saved
    how = {"implementation": products.casting(implementation)}
    dx = products.scaled(cast8.by_row(dy, **how), weight, dy.dtype, implementation=implementation)
    by_feature = cast8.by_column(dy, interleaved=False, **how)
    return dx, products.scaled(x, by_feature, w.dtype, exact=True, implementation=implementation), None


_linear.defvjp(_forward, _backward)
