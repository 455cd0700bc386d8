"""The packing kernels of gated layers on Hopper: gated_blocks.py through the machine of the packing kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.pack import gated_blocks, hopper
from pallas_kernels.pack.blocks import Directions, Matrix
from pallas_kernels.pack.words import Machine


def pack_gated(y, squared: bool, *, features: bool, tokens: bool, interleaved: bool) -> dict[str, jax.Array]:
    """y [R, 2 C] -> what `gated_blocks.pack` writes, by name; positives int32 [..] is to be summed."""
    rows, columns = y.shape[0], y.shape[1] // 2
    matrix = Matrix(rows, columns, interleaved)
    out: dict[str, Any] = {"positives": jax.ShapeDtypeStruct((matrix.blocks * 4,), jnp.int32)}
    if features:
        values, out["feature_metadata"] = hopper.packed_types((rows, columns), y.dtype)
        out |= {"features": values, "feature_gate": values, "feature_up": values}
    if tokens:
        values, out["token_metadata"] = hopper.packed_types((columns, rows), y.dtype)
        out |= {"token_gate": values, "token_up": values}

    def body(m: Machine) -> None:
        along = Directions(features, tokens)
        gated_blocks.pack(m, matrix, along, squared=squared, infinity=hopper.INFINITY[y.dtype.name])

    return hopper._launch(body, matrix, y.dtype, {"y": y}, out, shared=2 * tokens)


def take_gated(dh, packed, squared: bool, *, interleaved: bool) -> dict[str, jax.Array]:
    """dh [R, C] and a `PackedGates` -> what `gated_blocks.take` writes, by name."""
    (rows, columns), arrays, out = dh.shape, {"y": dh}, {}
    matrix = Matrix(rows, columns, interleaved)
    for name, gate, up in (
        ("feature", packed.feature_gate, packed.feature_up),
        ("token", packed.token_gate, packed.token_up),
    ):
        if gate is not None:
            arrays |= {f"{name}_metadata": gate.metadata, f"{name}_gate": gate.values, f"{name}_up": up.values}
    along = Directions(packed.feature_gate is not None, packed.token_gate is not None)
    if along.features:
        out["feature_gradients"] = hopper.packed_types((rows, 2 * columns), dh.dtype)[0]
    if along.tokens:
        values = hopper.packed_types((columns, rows), dh.dtype)[0]
        out |= {"token_dg": values, "token_du": values, "token_hidden": values}

    def body(m: Machine) -> None:
        gated_blocks.take(m, matrix, along, squared=squared)

    return hopper._launch(body, matrix, dh.dtype, arrays, out, shared=int(along.tokens))
