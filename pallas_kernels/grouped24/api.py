"""2:4 products over ragged groups of tokens: validate, choose the implementation, run it.

Tokens lie group after group. `group_sizes` [G] lives on the device and never reaches the host. A group starts where
the one before it ends, rounded up to a multiple of 64 (the rows that one metadata word describes), so that sizes which
are multiples of 64 lie end to end; rows up to the next multiple of 64 are the group's own padding. Where the sizes add
up to more than there are tokens, groups end with the tokens; negative sizes count as 0. Tokens beyond the last group
give zeros (before the epilogue).

Operands of 8 bits (e4m3 and e5m2, any two): groups start at multiples of 128, the columns of a tile, in every product,
and so are the tokens and the contraction; b is given along the contraction (`b_k_major`).
"""

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.array_types import Array, Float, Int, Metadata
from pallas_kernels.epilogue import Epilogue, apply
from pallas_kernels.grouped24 import hopper, reference
from pallas_kernels.sparse24.reference import to_dense
from pallas_kernels.tiles import GRANULE, PROMOTE, Mode, Problem, TileConfig

_PLAIN = Epilogue()


def rows(
    values: Float[Array, "..."],
    metadata: Metadata,
    b: Float[Array, "_G _k _n"],
    group_sizes: Int[Array, "_G"],
    *,
    b_k_major: bool = False,
    transpose_out: bool = False,
    **options,
) -> Float[Array, "_R _n"]:
    """out[r, n] = epilogue(sum_k A[r, k] b[group of r, k, n]): sparse tokens times dense weights.

    Args:
      values, metadata: packed tokens A [R, k], 2:4 along k; values in rows or in tiles, as in `sparse24`.
      b: weights [G, k, n], or [n, G, k] if `b_k_major`.
      group_sizes: tokens of each group (see the module).
      transpose_out: give out^T [n, R].
      options: out_dtype, epilogue, operand, row_scale [R], column_scale [n], promote, implementation, config, as in
        `sparse24.api`.

    Raises:
      ValueError: shapes or dtypes that do not belong together, sizes that are no multiples of 64, of 8 bits tokens or k
        that are none of 128.
      NotImplementedError: the implementation does not take this device or these dtypes.
    """
    want = "[n, G, k]" if b_k_major else "[G, k, n]"
    if b.ndim != 3:
        raise ValueError(f"b is {list(b.shape)}; want {want}")
    n, groups, k = b.shape if b_k_major else (b.shape[2], *b.shape[:2])
    tokens, a_k = dispatch.check_packed(values, metadata, b)
    if a_k != k:
        raise ValueError(f"values {list(values.shape)} have k={a_k}, b {list(b.shape)} is {want}")
    flat = b.reshape(n, groups * k) if b_k_major else b.reshape(groups * k, n)
    sizes = {"m": tokens, "n": n, "k": k}
    return _run("rows", values, metadata, flat, group_sizes, groups, sizes, b_k_major, transpose_out, **options)


def columns(
    values: Float[Array, "..."],
    metadata: Metadata,
    b: Float[Array, "_k _R"],
    group_sizes: Int[Array, "_G"],
    *,
    b_k_major: bool = False,
    transpose_out: bool = False,
    **options,
) -> Float[Array, "_f _R"]:
    """out[f, r] = epilogue(sum_k A[g f_count + f, k] b[k, r]), g the group of r: sparse weights times dense tokens.

    Args:
      values, metadata: packed weights A [F, k], 2:4 along k, the F / G rows of each group one after another.
      b: tokens [k, R], or [R, k] if `b_k_major`.
      transpose_out: give out^T [R, F / G], one row per token.
      group_sizes, options, errors: as in `rows`; row_scale is [F], one entry for each row of A, column_scale [R].
    """
    groups = group_sizes.shape[0]
    tokens, k = b.shape if b_k_major else b.shape[::-1]
    rows_of_a, a_k = dispatch.check_packed(values, metadata, b)
    if a_k != k:
        raise ValueError(f"values {list(values.shape)} have k={a_k}, b {list(b.shape)} has {k=}")
    if rows_of_a % (groups * GRANULE):
        raise ValueError(f"{rows_of_a} rows of weights do not split into {groups=} parts of multiples of {GRANULE}")
    sizes = {"m": rows_of_a, "n": tokens, "k": k}
    return _run("columns", values, metadata, b, group_sizes, groups, sizes, b_k_major, transpose_out, **options)


def contraction(
    values: Float[Array, "..."],
    metadata: Metadata,
    b: Float[Array, "_R _n"],
    group_sizes: Int[Array, "_G"],
    *,
    b_k_major: bool = False,
    transpose_out: bool = False,
    **options,
) -> Float[Array, "_G _m _n"]:
    """out[g, m, n] = epilogue(sum over the tokens r of group g of A[m, r] b[r, n]): the weight gradient.

    Padding tokens of a group take part: they must be zero in A or in b. A group without tokens gives zeros.

    Args:
      values, metadata: packed activations A [m, R], 2:4 along the tokens.
      b: tokens [R, n], or [n, R] if `b_k_major`.
      transpose_out: give out^T [n, G, m].
      group_sizes, options, errors: as in `rows`; row_scale is [G m], column_scale [n]. Of 8 bits `promote` is
        `tiles.PROMOTE` where it is None.
    """
    groups = group_sizes.shape[0]
    n, tokens = b.shape if b_k_major else b.shape[::-1]
    m, a_tokens = dispatch.check_packed(values, metadata, b)
    if a_tokens != tokens:
        raise ValueError(f"values {list(values.shape)} cover {a_tokens} tokens, b {list(b.shape)} {tokens}")
    sizes = {"m": m, "n": n, "k": tokens}
    out = _run("contraction", values, metadata, b, group_sizes, groups, sizes, b_k_major, transpose_out, **options)
    return out.reshape(n, groups, m) if transpose_out else out.reshape(groups, m, n)


def _run(
    mode: Mode,
    values,
    metadata,
    b,
    group_sizes,
    groups: int,
    sizes: dict[str, int],
    b_k_major: bool,
    transpose_out: bool,
    *,
    out_dtype=None,
    epilogue: Epilogue = _PLAIN,
    operand=None,
    row_scale=None,
    column_scale=None,
    promote: int | None = None,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
):
    chosen, fp8 = dispatch.resolve(implementation, b.dtype), dispatch.is_fp8(b.dtype)
    dispatch.check_multiple(GRANULE, **sizes)
    dispatch.check_fp8(b.dtype, promote, b_k_major=b_k_major, **sizes)
    if group_sizes.shape != (groups,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; want integers [{groups}]")
    out_dtype = dispatch.out_dtype_of(b, out_dtype)
    if promote is None and fp8 and mode == "contraction":
        promote = PROMOTE
    problem = Problem(
        m=sizes["m"],
        n=sizes["n"],
        k=sizes["k"],
        mode=mode,
        groups=groups,
        b_k_major=b_k_major,
        transpose_out=transpose_out,
        dtype=values.dtype.name,
        b_type=b.dtype.name if b.dtype != values.dtype else "",
        out_dtype=out_dtype.name,
        epilogue=epilogue,
        promote=promote or 0,
    )
    if mode != "contraction":
        tokens = sizes["m" if mode == "rows" else "n"]
        if tokens % problem.tile_k:
            raise ValueError(f"{tokens=} must be a multiple of {problem.tile_k}: groups start there; pad with zeros")
    out_shape, (rows, columns) = problem.out_shape, problem.scale_entries
    shaped = None if operand is None else operand.reshape(out_shape)
    epilogue.check(
        shaped, row_scale, column_scale, out_shape=out_shape, rows=rows, columns=columns, out_dtype=out_dtype
    )
    if chosen == "hopper":
        dispatch.check_kernel_dtypes(b.dtype, out_dtype)
        return hopper.grouped24(problem, values, metadata, b, group_sizes, shaped, row_scale, config, column_scale)
    unit, (a, b) = problem.tile_k, dispatch.widened(to_dense(dispatch.in_rows(values), metadata), b)
    acc = _REFERENCE[mode](a, b.T if b_k_major else b, group_sizes, groups, unit)
    if row_scale is not None and mode == "columns":
        group = reference.tile_groups(padded_sizes(group_sizes, acc.shape[1], unit), acc.shape[1], 1)
        row_scale = row_scale.reshape(groups, -1)[jnp.minimum(group, groups - 1)].T
        row_scale = row_scale.T if transpose_out else row_scale
    acc = acc.T if transpose_out else acc
    row_axis = 1 if transpose_out else 0
    return apply(epilogue, acc, shaped, row_scale, column_scale, row_axis=row_axis, out_dtype=out_dtype)


def _reference_rows(a, b, group_sizes, groups: int, unit: int):
    return dense_rows(a, b.reshape(groups, -1, b.shape[1]), group_sizes, unit)


def dense_rows(rows, by_group, group_sizes, unit: int = GRANULE):
    """rows [R, k] times the matrix [k, n] of each row's group, as the kernels take group sizes: in plain jnp."""
    sizes = padded_sizes(group_sizes, rows.shape[0], unit)
    out = reference.rows(rows, by_group, sizes, align=unit)
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < jnp.sum(sizes), out, 0)


def _reference_columns(a, b, group_sizes, groups: int, unit: int):
    weights = a.reshape(groups, -1, a.shape[1]).transpose(0, 2, 1)
    return _reference_rows(b.T, weights.reshape(-1, weights.shape[2]), group_sizes, groups, unit).T


def _reference_contraction(a, b, group_sizes, groups: int, unit: int):
    del groups
    out = reference.contraction(a.T, b, padded_sizes(group_sizes, a.shape[1], unit), align=unit)
    return out.reshape(-1, b.shape[1])


_REFERENCE = {"rows": _reference_rows, "columns": _reference_columns, "contraction": _reference_contraction}


def padded_sizes(group_sizes, tokens: int, unit: int = GRANULE):
    """Sizes rounded up to a unit and cut where the tokens end: what the kernels make of them."""
    padded = -(-jnp.clip(group_sizes, 0, tokens) // unit) * unit
    ends = jnp.minimum(jnp.cumsum(padded), tokens)
    return jnp.diff(ends, prepend=0)
