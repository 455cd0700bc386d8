"""Operands in e4m3 and their scales: weights, prepared once per optimizer step, and neurons, scaled by a sample.

A stored value times its scale is the value. Where a scale lies along the contraction it is folded into the other
operand (`cast8.fold`):

    y1, dy2     weights per neuron       x, dy3 per token
    y3, dx      y2, dy1 per neuron (f)   W2' = s_f W2 / t, W1' = q_f W1 / t, t one number for the matrix
    dW2, dW1    y2, dy1 per neuron       dy3, x per feature

x, dy3 and weights are scaled by their largest magnitude. y2 and dy1 are cast where they are computed, before anybody
has seen all of them, so their scales are found beforehand, from at most 256 tokens evenly spaced over the batch:

    m_f = r max over the sample of |y1|             s_f = 4^ceil(log4(32 m_f^2 / 448))
    n_f = r' max over the sample of |dy2|           q_f = 2^ceil(log2(16 * 2 n_f m_f / 448))

r is how many times larger the largest token is than the largest of the sample, by their scales. Beyond 448 scales a
value saturates; it has 4 bits down to scale / 64 and vanishes below scale / 1024.

The two headrooms. Saturation costs far more than vanishing does, so they are as large as precision allows. Norm-wise
error of y2 over 16,384 tokens, with exact maxima 0.026 everywhere, by headroom (normal data; tokens, or neurons, of
Student's t with 4 degrees of freedom; neurons that fire for 0.01 to 1 % of the tokens, eight times as strongly; neurons
of mean -3 sigma; 0.2 % of the tokens 30 times as large; neurons of sizes log-normal with sigma 1):

    headroom   normal   tokens t(4)   neurons t(4)   rare    mean -3   large tokens   unlike neurons
    8          0.027    0.027         0.279          0.115   0.027     0.026          0.026
    32         0.027    0.030         0.069          0.027   0.027     0.027          0.026
    128        0.027    0.054         0.026          0.027   0.034     0.031          0.026

and of dy1:

    4          0.027    0.027         0.027          0.063   0.026     0.027          0.027
    16         0.027    0.028         0.027          0.026   0.026     0.030          0.027
    64         0.027    0.053         0.027          0.026   0.026     0.065          0.027

Where only 1 % of the tokens have a gradient the sample sees two or three of them, and dy1's error is 0.10 with 16, 0.19
with 4, 0.06 with 64.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float
from pallas_kernels.cast8 import api as cast8
from pallas_kernels.cast8.api import Cast
from pallas_kernels.dispatch import Implementation
from pallas_kernels.pack.api import pack_thresholded8
from venom_jax.formats import Sparse24
from venom_jax.pattern import WEIGHT_GEMMS, Recipe, WeightGemm

LARGEST = 448.0
"""The largest number of e4m3."""
SMALLEST = 2.0**-60
"""The scale of what is all zero."""
SAMPLE = 256
HEADROOM_Y2 = 32.0
"""A neuron's y2 may be so many times the square of the largest |y1| in the sample before it saturates."""
HEADROOM_DY1 = 16.0
"""... and its dy1 so many times 2 |dy2| |y1|, the largest of either."""


class SparseCast(NamedTuple):
    """A 2:4 weight in e4m3, one scale a neuron."""

    values: Sparse24
    scale: Array
    """f32 [F]."""


Weight = Cast | SparseCast
"""A weight as y1 or dy2 reads it; a dense one is [F, D]."""


class EightBitWeights(NamedTuple):
    """The weights of a layer in e4m3, one scale a neuron: data without gradient, made once per optimizer step."""

    w1: Cast
    """W1^T [F, D]: for y1, and, folded, for dx."""
    w2: Cast
    """W2 [F, D]: for dy2, and, folded, for y3."""
    sparse_w1: SparseCast | None
    """beta1 S(W1), 2:4 along D, where y1 reads that."""
    sparse_w2: SparseCast | None
    """beta2 S(W2), 2:4 along D, where dy2 reads that."""

    def y1(self, recipe: Recipe) -> Weight:
        """W1 as y1 reads it."""
        return self.sparse_w1 if self.sparse_w1 is not None and "y1" in recipe.weights else self.w1

    def dy2(self, recipe: Recipe) -> Weight:
        """W2 as dy2 reads it."""
        return self.sparse_w2 if self.sparse_w2 is not None and "dy2" in recipe.weights else self.w2


def pack_weights(
    w1: Float[Array, "D F"],
    w2: Float[Array, "F D"],
    beta: Float[Array, "4"],
    recipe: Recipe,
    implementation: Implementation | None = None,
) -> EightBitWeights:
    """`EightBitWeights` of f32 or bf16 masters; beta: the frozen scales of y1, y3, dy2, dx."""

    w1, w2, beta = (jax.lax.stop_gradient(t) for t in (w1, w2, beta))

    def thresholded(gemm: WeightGemm, w: Array, axis: int) -> SparseCast | None:
        if gemm not in recipe.weights:
            return None
        scale = beta[WEIGHT_GEMMS.index(gemm)]
        found, scales = pack_thresholded8(w, scale, axis=axis, implementation=implementation)
        packed = Sparse24(found.values, found.metadata, (w.shape[0], w.shape[1]), axis)
        return SparseCast(packed, scales[: w.shape[1 - axis]])

    casting = None if implementation == "hopper" else implementation  # kernels where they take the array
    dense1, dense2 = (cast8.weights(w, axis=axis, implementation=casting) for w, axis in ((w1, 1), (w2, 0)))
    sparse1, sparse2 = thresholded("y1", w1, 0), thresholded("dy2", w2, 1)
    # The roundings stay: XLA drops a cast that the next one, to fold the weight, takes back (on GPUs, by default).
    return jax.lax.optimization_barrier(EightBitWeights(dense1, dense2, sparse1, sparse2))


def check_packed(recipe: Recipe, packed: Any) -> None:
    """Raise ValueError where packed weights are not what a recipe's products read."""
    if packed is None:
        return
    in_fp8 = isinstance(packed, EightBitWeights)
    if in_fp8 != recipe.in_fp8:
        raise ValueError(
            f"packed weights of {'8' if in_fp8 else '16 or 32'} bits for a recipe with precision = "
            f"{recipe.precision!r}; make them with pack_weights(..., recipe=recipe)."
        )
    if not in_fp8:
        return
    for gemm, weight in (("y1", packed.sparse_w1), ("dy2", packed.sparse_w2)):
        if weight is None and gemm in recipe.weights:
            raise ValueError(
                f"packed weights have no 2:4 weight for {gemm}, the recipe's weights = {recipe.weights}; make them "
                "with pack_weights(..., recipe=recipe)."
            )


def sample(tokens: int) -> slice:
    """At most 256 of so many tokens, evenly spaced."""
    return slice(None, None, max(1, -(-tokens // SAMPLE)))


def peaks(
    products: Float[Array, "S F"],
    sampled: Float[Array, "S"],
    tokens: Float[Array, "_"],
    weight: Float[Array, "F"],
    width: int,
) -> Float[Array, "F"]:
    """How large a neuron's products are to be expected: m_f or n_f of the module's docstring.

    NaN is left out, so that it stays with its token. A neuron whose sample is all zero, as where no sampled token has a
    gradient, is guessed from the scales as if both factors were normal.

    Args:
      products: of the sampled tokens.
      sampled: the scales of these tokens.
      tokens: the scales of all tokens.
      weight: the scales of the weight's neurons.
      width: D.
    """
    largest, seen = (jnp.nanmax(t, initial=SMALLEST) for t in (tokens, sampled))
    found = jnp.max(jnp.where(jnp.isnan(products), 0, jnp.abs(products)), axis=0, initial=0).astype(jnp.float32)
    grown = found * (largest / seen)
    # The largest of many normal numbers is about 4 sigma: of x, of w, and of their product, sigma sigma sqrt(D).
    guess = largest * weight * (LARGEST**2 / 4 * math.sqrt(width))
    return jnp.where(found > 0, grown, guess)


def y2_scale(peak: Float[Array, "F"]) -> Float[Array, "F"]:
    """s_f; a power of 4, so that a = sqrt(y2) has a scale that is a power of 2."""
    return cast8.scale_of(HEADROOM_Y2 * peak * peak, power=2)


def dy1_scale(peak: Float[Array, "F"], gradient_peak: Float[Array, "F"]) -> Float[Array, "F"]:
    """q_f."""
    return cast8.scale_of(HEADROOM_DY1 * 2 * gradient_peak * peak)
