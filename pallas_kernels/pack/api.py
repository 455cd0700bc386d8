"""Packing for the sparse FFN: activations both ways, their gradients, thresholded weights; kernels or plain jnp.

With scales, what is stored is e4m3 (eight_bits.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch
from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.pack import activations, eight_bits, hopper, reference
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.blocks import Directions
from pallas_kernels.tiles import GRANULE


class PackedActivations(NamedTuple):
    """a = relu(y) as the products over features and over tokens read it; None where not asked for."""

    features: Packed | None
    """a packed along features: a matrix [R, C]. None in eight bits, where its square is all that is kept."""
    squared: Packed | None
    """Its square, the operand of y3; in eight bits over the neurons' scales."""
    tokens: Packed | None
    """a, or what is left of it along features, packed along tokens: a matrix [C, R]. In eight bits its square."""
    positives: Float[Array, ""]
    """How many entries of a are above zero, as f32: an int32 would overflow at 2^31 of them."""


class TakenActivations(NamedTuple):
    """dy1 = 2 dy2 a where a is stored, in `Packed`s that share a's metadata; None where a was not given."""

    features: Packed | None
    tokens: Packed | None
    squared: Packed | None
    """a^2 along tokens, the operand of dW2."""


def pack_activations(
    y: Float[Array, "R C"],
    *,
    features: bool,
    tokens: bool,
    interleaved: bool,
    scale: Float[Array, "_"] | None = None,
    group_sizes: Int[Array, "G"] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> PackedActivations:
    """Pack a = relu(y), two of each four by magnitude, along features, along tokens, or both, reading y once.

    Args:
      y: R and C multiples of 64, with `scale` of 128 where they are packed along.
      features, tokens: along what to pack; with both, along tokens what is left along features.
      interleaved: which tokens make a four, see activations.py.
      scale: f32 powers of four [C], one for each neuron: a^2 / scale is stored, in e4m3, instead of a.
      group_sizes: with scales of the neurons of each group, [G C]: rows of each group (grouped24/api.py).

    Raises:
      ValueError: R or C is no multiple of 64 (128), scales of another shape.
      NotImplementedError: the named implementation does not take this device or dtype.
    """
    chosen, along = _choose(implementation, y, scaled=scale is not None), Directions(features, tokens)
    if scale is not None:
        eight_bits.check(y, features, tokens, group_sizes, scale=scale)
        first = eight_bits.first_neurons(group_sizes, y)
        if chosen == "hopper" and (features or tokens):
            return packed_of(hopper.pack_scaled(y, along, scale, first, interleaved=interleaved))
        a, options = jax.nn.relu(y), {"interleaved": interleaved, "group_sizes": group_sizes}
        squared, over_tokens = eight_bits.pack(a, scale, features=features, tokens=tokens, **options)
        return PackedActivations(None, squared, over_tokens, jnp.sum(a > 0, dtype=jnp.float32))
    if chosen == "hopper" and (features or tokens):
        return packed_of(hopper.pack_activations(y, along, interleaved=interleaved, relu=True))
    a = jax.nn.relu(y)
    along_features = activations.pack_features(a) if features else None
    along_tokens = None
    if tokens:
        kept = a if along_features is None else activations.unpack(along_features)
        along_tokens = activations.pack_tokens(kept, interleaved=interleaved)
    return PackedActivations(along_features, _square(along_features), along_tokens, jnp.sum(a > 0, dtype=jnp.float32))


def take_activations(
    dy2: Float[Array, "R C"],
    features: Packed | None,
    tokens: Packed | None,
    *,
    interleaved: bool,
    squared_scale: Float[Array, "_"] | None = None,
    scale: Float[Array, "_"] | None = None,
    group_sizes: Int[Array, "G"] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> TakenActivations:
    """2 dy2 a at the positions of a packed along features and along tokens, and a^2 along tokens, reading dy2 once.

    Args:
      dy2: R and C multiples of 64.
      features, tokens, interleaved: from `pack_activations`; in eight bits its `squared` and `tokens`.
      squared_scale: the scale that was given there; a is the root of the stored square, rounded to bf16, times its.
      scale: f32 powers of two, of each neuron: dy1 / scale is stored, in e4m3.
      group_sizes: as there.

    Raises:
      ValueError, NotImplementedError: as `pack_activations`.
    """
    chosen = _choose(implementation, dy2, scaled=scale is not None)
    if features is None and tokens is None:
        return TakenActivations(None, None, None)
    if scale is not None or squared_scale is not None:
        there = (features is not None, tokens is not None)
        eight_bits.check(dy2, *there, group_sizes, squared_scale=squared_scale, scale=scale)
        assert squared_scale is not None  # checked
        assert scale is not None
        first = eight_bits.first_neurons(group_sizes, dy2)
        given, options = (features, tokens, squared_scale, scale), {"interleaved": interleaved}
        if chosen == "hopper":
            return taken_of(hopper.take_scaled(dy2, *given, first, **options), features, tokens)
        return TakenActivations(*eight_bits.take(dy2, *given, group_sizes=group_sizes, **options), tokens)
    if chosen == "hopper":
        found = hopper.take_activations(dy2, features, tokens, interleaved=interleaved)
        return taken_of(found, features, tokens)
    along_features, along_tokens = None, None
    if features is not None:
        kept = activations.take_features(dy2, features.metadata)
        along_features = Packed(2 * kept * features.values, features.metadata)
    if tokens is not None:
        kept = activations.take_tokens(dy2, tokens.metadata, interleaved=interleaved)
        along_tokens = Packed(2 * kept * tokens.values, tokens.metadata)
    return TakenActivations(along_features, along_tokens, _square(tokens))


def packed_of(found: dict[str, Array]) -> PackedActivations:
    """What a kernel wrote, by name (`blocks.pack`)."""

    def matrix(values: str, metadata: str) -> Packed | None:
        return Packed(found[values], found[metadata]) if values in found else None

    return PackedActivations(
        matrix("features", "feature_metadata"),
        matrix("squared", "feature_metadata"),
        matrix("tokens", "token_metadata"),
        jnp.sum(found["positives"], dtype=jnp.float32),
    )


def taken_of(found: dict[str, Array], features: Packed | None, tokens: Packed | None) -> TakenActivations:
    """What a kernel wrote, by name (`blocks.take`), with the positions that it was given."""

    def matrix(values: str, given: Packed | None) -> Packed | None:
        return None if given is None else Packed(found[values], given.metadata)

    squared = matrix("token_squared", tokens) if "token_squared" in found else tokens
    return TakenActivations(matrix("feature_dy1", features), matrix("token_dy1", tokens), squared)


def pack_thresholded(
    w: Float[Array, "R C"],
    beta: Float[Array, ""],
    *,
    axis: int,
    dtype: jax.typing.DTypeLike,
    implementation: dispatch.Implementation | None = None,
) -> Packed:
    """round(beta S(w)), 2:4 along `axis`, as a matrix [R, C] or, along axis 0, [C, R], padded to multiples of 64.

    S is `reference.soft_threshold`, in f32.

    Args:
      w: masters, f32 or bf16 for the kernel.
      dtype: of the stored values, bfloat16 or float16 for the kernel.
      implementation: None takes the kernel where device, sizes and dtypes allow it, with several devices only inside
        `jax.shard_map`: XLA cannot split a kernel.

    Raises:
      ValueError: the length along `axis` is no multiple of 4; for the kernel also a size that is none of 64.
      NotImplementedError: the named implementation does not take this device or these dtypes.
    """
    takes = jnp.dtype(dtype).name in dispatch.KERNEL_DTYPES and w.dtype in (jnp.float32, jnp.bfloat16)
    fits = takes and not any(n % GRANULE for n in w.shape)
    if implementation is None and not (fits and device.arrays_lie_on_one_device()):
        implementation = "reference"
    if dispatch.resolve(implementation) == "hopper":
        if not takes:
            raise NotImplementedError(
                f"the kernel packs float32 or bfloat16 into {dispatch.KERNEL_DTYPES}; got {w.dtype} into "
                f"{jnp.dtype(dtype).name}. Cast, or use implementation='reference'."
            )
        dispatch.check_multiple(GRANULE, rows=w.shape[0], columns=w.shape[1])
        found = hopper.pack_thresholded(w, beta, dtype, along_rows=axis == 0)
        return Packed(found["values"], found["metadata"])
    s = reference.soft_threshold(w.astype(jnp.float32), axis)
    dense = (beta * s).astype(dtype)
    dense = dense if axis == 1 else dense.T
    return activations.pack_features(jnp.pad(dense, [(0, -size % GRANULE) for size in dense.shape]))


def pack_thresholded8(
    w: Float[Array, "R C"],
    beta: Float[Array, ""],
    *,
    axis: int,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Packed, Float[Array, "_"]]:
    """`pack_thresholded` in bf16, then in e4m3 over a scale for each row of the result (`eight_bits.row_scales`).

    Args:
      w, axis, implementation: as there; the result is padded to multiples of 64 rows and 128 columns.

    Returns:
      values / scale, packed, and the scale, f32 powers of two [R], or [C] along axis 0, padded too.

    Raises:
      ValueError, NotImplementedError: as there.
    """
    takes = w.dtype in (jnp.float32, jnp.bfloat16)
    fits = takes and not w.shape[axis] % eight_bits.COLUMNS and not w.shape[1 - axis] % GRANULE
    if implementation is None and not (fits and device.arrays_lie_on_one_device()):
        implementation = "reference"
    if dispatch.resolve(implementation) == "hopper":
        if not takes:
            raise NotImplementedError(
                f"the kernel packs float32 or bfloat16 into e4m3; got {w.dtype}. Cast, or use "
                "implementation='reference'."
            )
        dispatch.check_multiple(GRANULE, rows=w.shape[0], columns=w.shape[1])
        dispatch.check_multiple(eight_bits.COLUMNS, **{("rows", "columns")[axis]: w.shape[axis]})
        scale = eight_bits.row_scales(w, beta, axis)
        found = hopper.pack_thresholded(w, beta, eight_bits.DTYPE, along_rows=axis == 0, scale=scale)
        return Packed(found["values"], found["metadata"]), scale
    return eight_bits.pack_thresholded(w, beta, axis)


def _choose(implementation: dispatch.Implementation | None, y: Array, *, scaled: bool) -> dispatch.Implementation:
    dispatch.check_multiple(GRANULE, rows=y.shape[0], columns=y.shape[1])
    chosen = dispatch.resolve(implementation)
    if chosen == "hopper":
        dispatch.check_kernel_dtypes(y.dtype, y.dtype)
        if scaled and y.dtype != jnp.bfloat16:
            raise NotImplementedError(
                f"the kernel packs bfloat16 into e4m3; got {y.dtype}. Cast, or use implementation='reference'."
            )
    return chosen


def _square(packed: Packed | None) -> Packed | None:
    return None if packed is None else Packed(packed.values * packed.values, packed.metadata)
