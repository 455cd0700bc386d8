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
    options = {"implementation": products.casting(choose(implementation, *w.shape))}
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
    chosen = choose(implementation, *w.shape)
    packed = pack_linear(w, implementation=chosen) if packed is None else packed
    return as_before(_linear(chosen, in_rows(x), w, packed), x)


def in_rows(x: Float[Array, "*B D"]) -> Float[Array, "T D"]:
    """Tokens in rows, filled up with zeros: XLA refuses 8-bit products of one row, or over fewer than 16 tokens."""
    tokens = math.prod(x.shape[:-1])
    return jnp.pad(x.reshape(tokens, x.shape[-1]), ((0, -tokens % products.GRANULE), (0, 0)))


def as_before(y: Float[Array, "T N"], x: Float[Array, "*B D"]) -> Float[Array, "*B N"]:
    """The product of `in_rows(x)` with x's axes."""
    return y[: math.prod(x.shape[:-1])].reshape(*x.shape[:-1], y.shape[1])


def choose(implementation: Implementation | None, d_in: int, d_out: int) -> Implementation:
    """What multiplies: see `linear`."""
    fits = d_in % products.GRANULE == 0 and d_out % products.GRANULE == 0
    if implementation is None:
        return "hopper" if fits and device.hopper_available() else "reference"
    if dispatch.resolve(implementation) == "hopper":
        dispatch.check_multiple(products.GRANULE, D=d_in, N=d_out)
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(implementation: Implementation, x, w, packed: LinearWeight):
    return _product(implementation, x, packed.forward)


def _product(implementation, x, weight: Cast):
    tokens = cast8.by_row(x, implementation=products.casting(implementation))
    return products.scaled(tokens, weight, x.dtype, implementation=implementation)


def product_forward(implementation, x, w, weight: Cast, for_dx: Cast | None):
    """y and what the backward needs: x per feature, w for its dtype, the weight of dx."""
    kept = cast8.by_column(x, interleaved=False, implementation=products.casting(implementation))
    return _product(implementation, x, weight), (kept, w, for_dx)


def product_backward(implementation, saved, dy):
    """dx, dw, and nothing for the packed weight."""
    x, w, weight = saved
    how = {"implementation": products.casting(implementation)}
    dx = products.scaled(cast8.by_row(dy, **how), weight, dy.dtype, implementation=implementation)
    by_feature = cast8.by_column(dy, interleaved=False, **how)
    return dx, products.scaled(x, by_feature, w.dtype, exact=True, implementation=implementation), None


_linear.defvjp(lambda how, x, w, packed: product_forward(how, x, w, *packed), product_backward)
