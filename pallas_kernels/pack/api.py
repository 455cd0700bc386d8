"""Packing for the sparse FFN: activations both ways, their gradients, thresholded weights; kernels or plain jnp."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch
from pallas_kernels.array_types import Array, Float
from pallas_kernels.pack import activations, hopper, reference
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.blocks import Directions
from pallas_kernels.tiles import GRANULE


class PackedActivations(NamedTuple):
    """a = relu(y) as the products over features and over tokens read it; None where not asked for."""

    features: Packed | None
    """a packed along features: a matrix [R, C]."""
    squared: Packed | None
    """Its square, the operand of y3."""
    tokens: Packed | None
    """a, or what is left of it along features, packed along tokens: a matrix [C, R]."""
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
    implementation: dispatch.Implementation | None = None,
) -> PackedActivations:
    """Pack a = relu(y), two of each four by magnitude, along features, along tokens, or both, reading y once.

    Args:
      y: R and C multiples of 64.
      features, tokens: along what to pack; with both, along tokens what is left along features.
      interleaved: which tokens make a four, see activations.py.

    Raises:
      ValueError: R or C is no multiple of 64.
      NotImplementedError: the named implementation does not take this device or dtype.
    """
    chosen = _choose(implementation, y)
    if chosen != "reference" and (features or tokens):
        return packed_of(hopper.pack_activations(y, Directions(features, tokens), interleaved=interleaved, relu=True))
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
    implementation: dispatch.Implementation | None = None,
) -> TakenActivations:
    """2 dy2 a at the positions of a packed along features and along tokens, and a^2 along tokens, reading dy2 once.

    Args:
      dy2: R and C multiples of 64.
      features, tokens, interleaved: from `pack_activations`.

    Raises:
      ValueError, NotImplementedError: as `pack_activations`.
    """
    chosen = _choose(implementation, dy2)
    if features is None and tokens is None:
        return TakenActivations(None, None, None)
    if chosen != "reference":
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

    return TakenActivations(
        matrix("feature_dy1", features), matrix("token_dy1", tokens), matrix("token_squared", tokens)
    )


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
    if dispatch.resolve(implementation) != "reference":
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


def _choose(implementation: dispatch.Implementation | None, y: Array) -> dispatch.Implementation:
    dispatch.check_multiple(GRANULE, rows=y.shape[0], columns=y.shape[1])
    chosen = dispatch.resolve(implementation)
    if chosen != "reference":
        dispatch.check_kernel_dtypes(y.dtype, y.dtype)
    return chosen


def _square(packed: Packed | None) -> Packed | None:
    return None if packed is None else Packed(packed.values * packed.values, packed.metadata)
