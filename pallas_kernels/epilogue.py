"""What happens to an accumulator before it is written: one description, read by the kernels and by the reference."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.array_types import Array


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """out = activation(alpha * row_scale[m] * column_scale[n] * acc) [* or +] operand, in f32, rounded once.

    activation: None, "relu" or "relu2" (the square of relu); both pass NaN on.
    operand: None, or what to do with an array of the output's shape and dtype: "multiply" or "add" (accumulation).
    row_scale: whether an f32 vector scales the rows of A's side: one entry for each row of A, over all groups; for the
      contraction one for each group and row.
    column_scale: whether an f32 vector [n] scales the columns of B's side.
    powers_of_two: the scales are powers of two (or 0 or NaN), whose products are exact in bfloat16 too: the kernel may
      round to it first and scale afterwards, which costs no time. Others would be rounded themselves.
    """

    activation: Literal["relu", "relu2"] | None = None
    operand: Literal["multiply", "add"] | None = None
    row_scale: bool = False
    alpha: float = 1.0
    column_scale: bool = False
    powers_of_two: bool = False

    def check(
        self,
        operand: Array | None,
        row_scale: Array | None,
        column_scale: Array | None,
        *,
        out_shape: tuple[int, int],
        rows: int,
        columns: int,
        out_dtype,
    ) -> None:
        """Raise ValueError unless exactly the announced arrays are there, with the right shapes.

        rows, columns: entries that the scales must have.
        """
        if self.activation not in (None, "relu", "relu2"):
            raise ValueError(f"activation={self.activation!r}; use None, 'relu' or 'relu2'")
        if self.operand not in (None, "multiply", "add"):
            raise ValueError(f"operand={self.operand!r}; use None, 'multiply' or 'add'")
        for name, announced, array, shape, dtype in (
            ("operand", self.operand is not None, operand, tuple(out_shape), jnp.dtype(out_dtype)),
            ("row_scale", self.row_scale, row_scale, (rows,), jnp.dtype(jnp.float32)),
            ("column_scale", self.column_scale, column_scale, (columns,), jnp.dtype(jnp.float32)),
        ):
            if announced != (array is not None):
                raise ValueError(f"{self} and {name}={'an array' if array is not None else None} contradict each other")
            if array is not None and (array.shape != shape or array.dtype != dtype):
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; want {dtype}{list(shape)}")


def apply(
    epilogue: Epilogue,
    acc: Array,
    operand: Array | None,
    row_scale: Array | None,
    column_scale: Array | None = None,
    *,
    row_axis: int,
    out_dtype,
) -> Array:
    """The epilogue in plain jnp; `row_axis` is the output's axis of A's rows.

    row_scale: [m], or of the output's shape where groups of columns have scales of their own.
    """
    acc = acc * epilogue.alpha
    if row_scale is not None:
        acc = acc * (row_scale if row_scale.ndim == acc.ndim else jnp.expand_dims(row_scale, 1 - row_axis))
    if column_scale is not None:
        acc = acc * jnp.expand_dims(column_scale, row_axis)
    if epilogue.activation is not None:
        acc = jnp.maximum(acc, 0)
    if epilogue.activation == "relu2":
        acc = acc * acc
    if operand is not None:
        acc = acc * operand.astype(acc.dtype) if epilogue.operand == "multiply" else acc + operand.astype(acc.dtype)
    return acc.astype(out_dtype)
