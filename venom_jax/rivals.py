"""The dense FFN in eight bits as one writes it without this library: what its own has to beat.

    scale of a tensor: its largest magnitude now, over 448      y1 = x8 W1_8     y2 = relu(y1)^2     y3 = y2_8 W2_8
    and so backward; sums in 14 bits forward and for dx, dy2, in f32 for the weight gradients

XLA's own FP8 products (cublasLt), scales multiplied into them, casts and transpositions as XLA fuses them.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array
from venom_jax.fp8 import products

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def cast(a: Array, dtype=E4M3) -> tuple[Array, Array]:
    """A tensor over one scale, and the scale."""
    scale = jnp.maximum(jnp.max(jnp.abs(a)).astype(jnp.float32), 1e-12) / float(jnp.finfo(dtype).max)
    return (a.astype(jnp.float32) * (1 / scale)).astype(dtype), scale


def times(a: tuple[Array, Array], b: tuple[Array, Array], dtype=jnp.bfloat16, *, exact: bool = False) -> Array:
    """a [m, k], b [n, k] -> [m, n]."""
    scale = (a[1] * b[1]).astype(dtype)
    return products.dot(a[0], b[0], dtype, exact=exact, implementation="hopper") * scale


def transposed(a: tuple[Array, Array]) -> tuple[Array, Array]:
    """The same values, contracted over the other axis."""
    return a[0].T, a[1]


def step(gradients=E4M3, *, exact: bool = True):
    """(x, w1, w2, dy) -> y, dx, dW1, dW2.

    gradients: type of dy3 and dy1. exact: sum the weight gradients in f32.
    """

    def run(x, w1, w2, dy3):
        x8, w1_8, w2_8 = (cast(t) for t in (x, w1, w2))
        a = jax.nn.relu(times(x8, transposed(w1_8)))
        y2 = cast(a * a)
        y3 = times(y2, transposed(w2_8))
        # The two passes are one program here as for everybody else; a is kept in bf16, y2 in 8 bits.
        dy8 = cast(dy3, gradients)
        dy1 = cast(2 * times(dy8, w2_8) * a, gradients)
        dx = times(dy1, w1_8)
        dw1 = times(transposed(x8), transposed(dy1), w1.dtype, exact=exact)
        dw2 = times(transposed(y2), transposed(dy8), w2.dtype, exact=exact)
        return y3, dx, dw1, dw2

    return run
