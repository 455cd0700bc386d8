"""Casts to eight bits for the FFN: tokens, weights, dense activations; kernels or plain jnp.

Nothing here has a derivative: it runs inside the `custom_vjp` of the layer.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels import device, dispatch
from pallas_kernels.array_types import Array, Float
from pallas_kernels.cast8 import hopper, reference
from pallas_kernels.cast8.blocks import MAX_COLUMNS
from pallas_kernels.cast8.reference import E4M3, MAX_EXPONENT, Both, Cast, cast, largest, scale_of, widen

__all__ = [
    "E4M3",
    "MAX_EXPONENT",
    "Both",
    "Cast",
    "activate",
    "both_ways",
    "by_column",
    "by_row",
    "cast",
    "differentiate",
    "fold",
    "largest",
    "scale_of",
    "weights",
    "widen",
]


def by_row(x: Float[Array, "R C"], *, implementation: dispatch.Implementation | None = None) -> Cast:
    """e4m3 with one scale for each row, its current amax: values [R, C], scale [R].

    Args:
      implementation: None takes the kernel where device, sizes and dtype allow it and XLA has nothing to split
        (`device.arrays_lie_on_one_device`); so in every function here.

    Raises:
      NotImplementedError: the named implementation does not take this device, dtype or size.
    """
    if _choose(implementation, x, hopper.takes_rows(x)) == "hopper":
        return hopper.by_row(x)
    return reference.by_row(x)


def by_column(
    x: Float[Array, "R C"], *, interleaved: bool, implementation: dispatch.Implementation | None = None
) -> Cast:
    """e4m3 with one scale for each column, transposed: values [C, R], scale [C].

    The dense operand, K-major, of a product over rows (tokens): R comes in the order of the contraction.

    Args:
      interleaved: which rows make a four (`pack.activations`).

    Raises:
      ValueError: interleaved, and R is no multiple of 4.
      NotImplementedError: the named implementation does not take this device, dtype or size.
    """
    if interleaved and x.shape[0] % 4:
        raise ValueError(f"{x.shape[0]} rows are no four quarters: interleaved rows come in multiples of 4. Pad them.")
    if _choose(implementation, x, hopper.takes_blocks(x, jnp.bfloat16, jnp.float32)) == "hopper":
        return hopper.by_column(x, interleaved=interleaved)
    return reference.by_column(x, interleaved=interleaved)


def both_ways(
    x: Float[Array, "R C"], *, interleaved: bool, implementation: dispatch.Implementation | None = None
) -> tuple[Cast, Cast]:
    """`by_row` and `by_column` of the same tokens, which need one read less together.

    Raises:
      ValueError, NotImplementedError: as `by_column`.
    """
    takes = hopper.takes_rows(x) and hopper.takes_blocks(x, jnp.bfloat16)
    if implementation != "reference" and takes and _choose(implementation, x, takes) == "hopper":
        return hopper.both_ways(x, interleaved=interleaved)
    options: dict[str, Any] = {"implementation": implementation}
    return by_row(x, **options), by_column(x, interleaved=interleaved, **options)


def weights(w: Float[Array, "R C"], *, axis: int, implementation: dispatch.Implementation | None = None) -> Cast:
    """Weights with one scale for each neuron, neurons first: values [F, D], scale [F].

    Args:
      w: masters, [F, D] with axis 0, [D, F] with axis 1.
      axis: of the neurons.
    """
    if axis == 0:
        return by_row(w, implementation=implementation)
    return by_column(w, interleaved=False, implementation=implementation)


def fold(a: Cast, factor: Float[Array, "R"], *, implementation: dispatch.Implementation | None = None) -> Cast:
    """factor[r] a[r, c], transposed, under one scale: values [C, R], scale [] = max over r of factor[r] scale[r].

    Neuron scales of an operand A [tokens, neurons] lie along the contraction; so they go into B = `fold(weights)`.

    Args:
      a: weights [F, D] with row scales (`weights`).
      factor: f32 powers of two [F].
    """
    if _choose(implementation, a.values, hopper.takes_blocks(a.values, E4M3)) == "hopper":
        return hopper.fold(a, factor)
    return reference.fold(a, factor)


def activate(
    y: Float[Array, "T F"], scale: Float[Array, "F"], *, implementation: dispatch.Implementation | None = None
) -> Both:
    """y2 = relu(y)^2 in e4m3 over `scale`, as [T, F] and as [F, T], reading y once.

    Args:
      scale: f32 powers of four, of each neuron.
    """
    if _choose(implementation, y, hopper.takes_blocks(y, jnp.bfloat16)) == "hopper":
        return hopper.activate(y, scale)
    return reference.activate(y, scale)


def differentiate(
    dy2: Float[Array, "T F"],
    squared: Float[Array, "F T"],
    squared_scale: Float[Array, "F"],
    scale: Float[Array, "F"],
    *,
    implementation: dispatch.Implementation | None = None,
) -> Both:
    """dy1 = 2 dy2 a in e4m3 over `scale`, as [T, F] and as [F, T]; a is the root of y2, rounded to bf16.

    Args:
      squared, squared_scale: `columns` of `activate`, and its scale: all that the backward pass keeps of y.
      scale: f32 powers of two, of each neuron.
    """
    if _choose(implementation, dy2, hopper.takes_blocks(dy2, jnp.bfloat16)) == "hopper":
        return hopper.differentiate(dy2, squared, squared_scale, scale)
    return reference.differentiate(dy2, squared, squared_scale, scale)


def _choose(implementation: dispatch.Implementation | None, x: Array, takes: bool) -> dispatch.Implementation:
    if implementation is None and not (takes and device.arrays_lie_on_one_device()):
        implementation = "reference"
    chosen = dispatch.resolve(implementation)
    if chosen == "hopper" and not takes:
        raise NotImplementedError(
            f"the kernel does not take {x.dtype}{list(x.shape)}: rows and columns are multiples of 64, of bfloat16 or, "
            f"to be cast by row or by column, float32; a row has at most {MAX_COLUMNS} entries. Use "
            "implementation='reference'."
        )
    return chosen
