"""Packing for gated layers: h = c^2 u (or c u) both ways, with c and u where it is kept; kernels or plain jnp.

c is the gate after its activation's first part, relu(g) or what bounds it; g and u lie side by side in one array, as
one product with both weights leaves them. Products of three are formed in f32 and rounded once, here and there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.array_types import Array, Float, accumulator
from pallas_kernels.pack import activations, gated_hopper
from pallas_kernels.pack.activations import Packed
from pallas_kernels.tiles import GRANULE

KERNEL_DTYPE = "bfloat16"


class PackedGates(NamedTuple):
    """What the products and the backward read; None where not asked for. All of one direction share its metadata."""

    features: Packed | None
    """h packed along features: a matrix [R, C], the operand of the product with W2."""
    feature_gate: Packed | None
    """c there, and u."""
    feature_up: Packed | None
    token_gate: Packed | None
    """c where h, or what is left of it along features, is kept along tokens: a matrix [C, R]; and u."""
    token_up: Packed | None
    positives: Float[Array, ""]
    """How many entries of c are above zero, as f32."""


class TakenGates(NamedTuple):
    """Gradients where h is kept."""

    features: Packed | None
    """dg and du along features side by side, a matrix [R, 2 C]: the operand of dx."""
    token_gate: Packed | None
    """dg along tokens, du, and h: the operands of dW1, dWu and dW2."""
    token_up: Packed | None
    token_hidden: Packed | None


def gated_product(c: Float[Array, "..."], u: Float[Array, "..."], *, squared: bool) -> Float[Array, "..."]:
    """h = c^2 u, or c u, rounded once."""
    wide, up = c.astype(accumulator(c.dtype)), u.astype(accumulator(c.dtype))
    return ((wide * wide if squared else wide) * up).astype(c.dtype)


def gated_gradients(
    dh: Float[Array, "..."], c: Float[Array, "..."], u: Float[Array, "..."], *, squared: bool
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """dc = 2 dh c u and du = dh c^2, or dc = dh u where c > 0 and du = dh c, each rounded once."""
    wide, gate, up = (t.astype(accumulator(c.dtype)) for t in (dh, c, u))
    if squared:
        of_gate, of_up = 2 * wide * gate * up, wide * (gate * gate)
    else:
        of_gate, of_up = jnp.where(gate == 0, 0, wide * up), wide * gate
    return of_gate.astype(c.dtype), of_up.astype(c.dtype)


def pack_gated(
    y: Float[Array, "R _"],
    *,
    squared: bool,
    features: bool,
    tokens: bool,
    interleaved: bool,
    implementation: dispatch.Implementation | None = None,
) -> PackedGates:
    """Pack h = relu(g)^2 u (or relu(g) u), two of each four by magnitude, reading y once.

    Args:
      y: g and then u, [R, 2 C]; R and C multiples of 64.
      squared: h = c^2 u.
      features, tokens, interleaved: as `pack.api.pack_activations`.

    Raises:
      ValueError: R or C is no multiple of 64.
      NotImplementedError: the named implementation does not take this device, or a dtype but bfloat16.
    """
    if _choose(implementation, y) == "hopper" and (features or tokens):
        found = gated_hopper.pack_gated(y, squared, features=features, tokens=tokens, interleaved=interleaved)
        return _packed_of(found)
    g, u = jnp.split(y, 2, axis=1)
    c = jax.nn.relu(g)
    h = gated_product(c, u, squared=squared)
    of_features = gate = up = token_gate = token_up = None
    kept_h, kept_c, kept_u = h, c, u
    if features:
        of_features = activations.pack_features(h)
        words = of_features.metadata
        gate, up = (Packed(activations.take_features(t, words), words) for t in (c, u))
        kept_h, kept_c, kept_u = (activations.unpack(t) for t in (of_features, gate, up))
    if tokens:
        words = activations.pack_tokens(kept_h, interleaved=interleaved).metadata
        token_gate, token_up = (
            Packed(activations.take_tokens(t, words, interleaved=interleaved), words) for t in (kept_c, kept_u)
        )
    return PackedGates(of_features, gate, up, token_gate, token_up, jnp.sum(c > 0, dtype=jnp.float32))


def take_gated(
    dh: Float[Array, "R C"],
    packed: PackedGates,
    *,
    squared: bool,
    interleaved: bool,
    implementation: dispatch.Implementation | None = None,
) -> TakenGates:
    """The gradients by c and u where h is kept, both ways, and h along tokens, reading dh once.

    Args:
      dh: R and C multiples of 64.
      packed: what `pack_gated` gave for the same squared and interleaved.

    Raises:
      ValueError, NotImplementedError: as `pack_gated`.
    """
    chosen = _choose(implementation, dh)
    if packed.feature_gate is None and packed.token_gate is None:
        return TakenGates(None, None, None, None)
    if chosen == "hopper":
        return _taken_of(gated_hopper.take_gated(dh, packed, squared, interleaved=interleaved), packed)
    along_features = token_gate = token_up = hidden = None
    if packed.feature_gate is not None and packed.feature_up is not None:
        words = packed.feature_gate.metadata
        taken = activations.take_features(dh, words)
        both = gated_gradients(taken, packed.feature_gate.values, packed.feature_up.values, squared=squared)
        along_features = Packed(jnp.concatenate(both, axis=1), _twice(words))
    if packed.token_gate is not None and packed.token_up is not None:
        c, u, words = packed.token_gate.values, packed.token_up.values, packed.token_gate.metadata
        taken = activations.take_tokens(dh, words, interleaved=interleaved)
        token_gate, token_up = (Packed(t, words) for t in gated_gradients(taken, c, u, squared=squared))
        hidden = Packed(gated_product(c, u, squared=squared), words)
    return TakenGates(along_features, token_gate, token_up, hidden)


def _packed_of(found: dict[str, Array]) -> PackedGates:
    def matrix(values: str, metadata: str) -> Packed | None:
        return Packed(found[values], found[metadata]) if values in found else None

    return PackedGates(
        matrix("features", "feature_metadata"),
        matrix("feature_gate", "feature_metadata"),
        matrix("feature_up", "feature_metadata"),
        matrix("token_gate", "token_metadata"),
        matrix("token_up", "token_metadata"),
        jnp.sum(found["positives"], dtype=jnp.float32),
    )


def _taken_of(found: dict[str, Array], packed: PackedGates) -> TakenGates:
    def matrix(values: str, given: Packed | None) -> Packed | None:
        return None if given is None else Packed(found[values], given.metadata)

    along_features = None
    if packed.feature_gate is not None:
        along_features = Packed(found["feature_gradients"], _twice(packed.feature_gate.metadata))
    return TakenGates(
        along_features,
        matrix("token_dg", packed.token_gate),
        matrix("token_du", packed.token_gate),
        matrix("token_hidden", packed.token_gate),
    )


def _twice(words: Array) -> Array:
    """The metadata of two matrices side by side with the same positions."""
    return jnp.concatenate([words, words], axis=1)


def _choose(implementation: dispatch.Implementation | None, y: Array) -> dispatch.Implementation:
    dispatch.check_multiple(GRANULE, rows=y.shape[0], columns=y.shape[1])
    chosen = dispatch.resolve(implementation)
    if chosen == "hopper" and y.dtype != KERNEL_DTYPE:
        raise NotImplementedError(
            f"the kernel packs gates in {KERNEL_DTYPE}; got {y.dtype}. Cast, or use implementation='reference'."
        )
    return chosen
