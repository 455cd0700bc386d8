"""Weights times tokens, packed at once: y1 and dy2 of the FFN without y1 and dy2.

The same results, to the bit, as the product (`sparse24`, `grouped24.columns`) followed by `pack.api`: on Hopper in the
product's epilogue (hopper/packing.py), elsewhere one after the other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch, tuned
from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.cast8.reference import gradient_factor, inverse
from pallas_kernels.dense8 import dense8
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.hopper import kernel
from pallas_kernels.pack import api, eight_bits, hopper
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.api import PackedActivations, TakenActivations
from pallas_kernels.sparse24.api import sparse24
from pallas_kernels.tiles import GRANULE, AForm, Packing, Problem, TileConfig


def pack_product(
    weights: Packed | Float[Array, "_ _"],
    rows: Float[Array, "R K"],
    group_sizes: Int[Array, "G"] | None = None,
    *,
    transposed: bool = False,
    features: bool,
    tokens: bool,
    interleaved: bool,
    row_scale: Float[Array, "_"] | None = None,
    column_scale: Float[Array, "_"] | None = None,
    scale: Float[Array, "_"] | None = None,
    apart: bool | None = None,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> PackedActivations:
    """`pack.api.pack_activations` of y[r, c] = sum_k A[g C + c, k] rows[r, k], g the group of row r.

    Of 8 bits y is that times row_scale[g C + c] column_scale[r], rounded to bfloat16.

    Args:
      weights: A [G C, K], packed 2:4 along K or dense.
      transposed: dense weights of 16 bits are given as A^T [K, G C].
      rows: tokens; R, C and K multiples of 64, of 8 bits those that are packed along and K of 128.
      group_sizes: rows of each group (grouped24/api.py), or None for one group of all rows.
      features, tokens, interleaved: as `pack_activations`.
      row_scale, column_scale: with operands of 8 bits, f32 powers of two of each neuron [G C] and token [R].
      scale: with operands of 8 bits, of what is packed (`pack_activations`): f32 [G C].
      apart: of 8 bits, write y to memory, and pack it in a pass of its own. The result is the same; None takes what is
        faster (`Operands.is_faster_apart`).
      config: a tile for packing in the epilogue.

    Raises:
      ValueError: shapes or dtypes that do not belong together, sizes that are no such multiples, nothing to pack.
      NotImplementedError: the named implementation does not take this device or these dtypes.
    """
    along = {"features": features, "tokens": tokens, "interleaved": interleaved}
    if not (features or tokens):
        raise ValueError("features=False and tokens=False: nothing is to be packed; use the product alone")
    operands = Operands(weights, rows, group_sizes, transposed, row_scale, column_scale)
    operands.check(features, tokens, scale=scale)
    chosen = dispatch.resolve(implementation, rows.dtype)
    apart = operands.goes_apart(apart, config)
    if chosen != "hopper" or apart:
        scaled = {"scale": scale, "group_sizes": group_sizes} if operands.is_fp8 else {}
        return api.pack_activations(operands.product(chosen), **along, **scaled, implementation=chosen)
    kept = {} if scale is None else {"factor": hopper.bf16(inverse(scale))}
    return api.packed_of(operands.launch(Packing(False, **along), kept, config))


def take_product(
    weights: Packed | Float[Array, "_ _"],
    rows: Float[Array, "R K"],
    features: Packed | None,
    tokens: Packed | None,
    group_sizes: Int[Array, "G"] | None = None,
    *,
    transposed: bool = False,
    interleaved: bool,
    row_scale: Float[Array, "_"] | None = None,
    column_scale: Float[Array, "_"] | None = None,
    squared_scale: Float[Array, "_"] | None = None,
    scale: Float[Array, "_"] | None = None,
    apart: bool | None = None,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> TakenActivations:
    """`pack.api.take_activations` of dy2[r, c] = sum_k A[g C + c, k] rows[r, k].

    Arguments as there and in `pack_product`.

    features, tokens: of 8 bits `squared` and `tokens` of `pack_product`.
    """
    if features is None and tokens is None:
        raise ValueError("features=None and tokens=None: nothing is to be taken; use the product alone")
    operands = Operands(weights, rows, group_sizes, transposed, row_scale, column_scale)
    operands.check(features is not None, tokens is not None, squared_scale=squared_scale, scale=scale)
    chosen = dispatch.resolve(implementation, rows.dtype)
    apart = operands.goes_apart(apart, config)
    if chosen != "hopper" or apart:
        scales = {"squared_scale": squared_scale, "scale": scale, "group_sizes": group_sizes}
        scales = scales if operands.is_fp8 else {}
        dy2 = operands.product(chosen)
        return api.take_activations(dy2, features, tokens, interleaved=interleaved, **scales, implementation=chosen)
    kept = {}
    if squared_scale is not None and scale is not None:
        kept["factor"] = hopper.bf16(gradient_factor(squared_scale, scale))
    if features is not None:
        kept |= {"squared" if operands.is_fp8 else "features": features.values, "feature_metadata": features.metadata}
    if tokens is not None:
        kept |= {"tokens": tokens.values, "token_metadata": tokens.metadata}
    packing = Packing(True, features is not None, tokens is not None, interleaved)
    return api.taken_of(operands.launch(packing, kept, config), features, tokens)


class Operands(NamedTuple):
    """Of y or dy2."""

    weights: Packed | Array
    rows: Array
    group_sizes: Array | None
    transposed: bool
    row_scale: Array | None
    column_scale: Array | None

    @property
    def is_fp8(self) -> bool:
        return dispatch.is_fp8(self.rows.dtype)

    @property
    def groups(self) -> int:
        return 1 if self.group_sizes is None else self.group_sizes.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The rows of A, and those of its columns and of the tokens."""
        if isinstance(self.weights, Packed):
            return *dispatch.check_packed(*self.weights, self.rows), self.rows.shape[0]
        m, k = self.weights.shape[::-1] if self.transposed else self.weights.shape
        return m, k, self.rows.shape[0]

    @property
    def epilogue(self) -> Epilogue:
        given = (self.row_scale is not None, self.column_scale is not None)
        return Epilogue(row_scale=given[0], column_scale=given[1], powers_of_two=any(given))

    def check(self, features: bool, tokens: bool, **scales: Array | None) -> None:
        """Raise ValueError for what does not belong together."""
        m, k, n = self.sizes
        if k != self.rows.shape[1]:
            raise ValueError(f"weights [{m}, {k}] and rows {list(self.rows.shape)} differ in k")
        dispatch.check_multiple(GRANULE, rows=n, k=k)
        if m % (self.groups * GRANULE):
            groups = self.groups
            raise ValueError(f"{m} rows of weights do not split into {groups=} parts of multiples of {GRANULE}")
        given = {"row_scale": self.row_scale, "column_scale": self.column_scale} | scales
        if not self.is_fp8:
            for name, scale in given.items():
                if scale is not None:
                    raise ValueError(f"{name} is given with operands in {self.rows.dtype}; scales are for 8 bits")
            return
        if self.transposed:
            raise ValueError("transposed=True: of 8 bits the tensor core reads weights [neurons, k] along k only")
        dispatch.check_multiple(eight_bits.COLUMNS, k=k)
        self.epilogue.check(
            None, self.row_scale, self.column_scale, out_shape=(n, m), rows=m, columns=n, out_dtype=jnp.bfloat16
        )
        y = jax.ShapeDtypeStruct((n, m // self.groups), jnp.bfloat16)
        eight_bits.check(y, features, tokens, self.group_sizes, **scales)

    @property
    def is_faster_apart(self) -> bool:
        """Whether 8 bits are packed faster in a pass of its own.

        With 2:4 weights a tile's products take less time than one warpgroup needs to pack it (docs/packing.md).
        """
        return self.is_fp8 and isinstance(self.weights, Packed)

    def goes_apart(self, apart: bool | None, config: TileConfig | None) -> bool:
        """Raise ValueError where there is no product to write y with."""
        if apart and not (self.is_fp8 and (self.group_sizes is None or isinstance(self.weights, Packed))):
            raise ValueError(f"{apart=} is for operands of 8 bits, and of dense ones for those without groups")
        return (self.is_faster_apart and config is None) if apart is None else apart

    def product(self, implementation: dispatch.Implementation) -> Array:
        """[R, C]; by the kernel only what goes apart."""
        weights, rows, group_sizes = self[:3]
        if isinstance(weights, Packed):
            options: dict[str, Any] = {"b_k_major": True, "transpose_out": True, "implementation": implementation}
            options |= self._scales
            if group_sizes is None:
                return sparse24(*weights, rows, **options)
            return grouped.columns(*weights, rows, group_sizes, **options)
        if self.is_fp8 and implementation == "hopper":
            return dense8(weights, rows, transpose_out=True, implementation=implementation, **self._scales)
        if self.is_fp8:
            return self._dense8(weights)
        by_row = weights if self.transposed else weights.T
        if group_sizes is None:
            return jnp.dot(rows, by_row)
        return grouped.dense_rows(rows, self._by_expert(by_row), group_sizes).astype(rows.dtype)

    @property
    def _scales(self) -> dict[str, Any]:
        return {"epilogue": self.epilogue, "row_scale": self.row_scale, "column_scale": self.column_scale}

    def _by_expert(self, by_row: Array) -> Array:
        return jnp.moveaxis(by_row.reshape(by_row.shape[0], self.groups, -1), 1, 0)

    def _dense8(self, weights: Array) -> Array:
        rows, by_row = dispatch.widened(self.rows, weights.T)
        if self.group_sizes is None:
            acc = jnp.dot(rows, by_row, precision="highest")
        else:
            acc = grouped.dense_rows(rows, self._by_expert(by_row), self.group_sizes, eight_bits.COLUMNS)
        if self.row_scale is not None:
            acc = acc * eight_bits.of_each(self.row_scale, acc, self.group_sizes)
        if self.column_scale is not None:
            acc = acc * self.column_scale[:, None]
        return acc.astype(jnp.bfloat16)

    def launch(self, packing: Packing, kept: dict[str, Array], config: TileConfig | None) -> dict[str, Array]:
        """What the kernel writes, by name."""
        form: AForm = "sparse" if isinstance(self.weights, Packed) else "m_major" if self.transposed else "k_major"
        a = tuple(self.weights) if isinstance(self.weights, Packed) else (self.weights,)
        dtype, b_dtype = a[0].dtype.name, self.rows.dtype.name
        dispatch.check_kernel_dtypes(b_dtype, "bfloat16" if self.is_fp8 else b_dtype)
        m, k, n = self.sizes
        problem = Problem(
            m=m,
            n=n,
            k=k,
            mode="dense" if self.group_sizes is None else "columns",
            groups=self.groups,
            b_k_major=True,
            transpose_out=True,
            dtype=dtype,
            b_type=b_dtype if b_dtype != dtype else "",
            out_dtype="bfloat16" if self.is_fp8 else b_dtype,
            epilogue=self.epilogue,
            packing=packing,
            a=form,
        )
        return kernel.matmul_packed(
            a,
            self.rows,
            problem=problem,
            config=config or tuned.choose(problem),
            num_sms=device.sm_count(),
            groups=None if self.group_sizes is None else self.group_sizes.astype(jnp.int32),
            kept=kept,
            row_scale=self.row_scale,
            column_scale=self.column_scale,
        )
