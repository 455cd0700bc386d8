"""Dense products over ragged groups of tokens, on the kernels of grouped24 with a dense A.

Arguments, groups and errors as in `pallas_kernels.grouped24.api`; where A is weights or tokens, here it is the array
itself. XLA's `ragged_dot` on GPUs runs one product after the other, or all of every group (docs/log.md).
"""

import jax.numpy as jnp

from pallas_kernels import device, dispatch, tuned
from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.grouped24 import reference
from pallas_kernels.grouped24.api import dense_rows, padded_sizes
from pallas_kernels.hopper import kernel
from pallas_kernels.tiles import GRANULE, AForm, Problem, TileConfig


def rows(
    a: Float[Array, "R k"],
    b: Float[Array, "_G _k _n"],
    group_sizes: Int[Array, "_G"],
    *,
    b_k_major: bool = False,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> Float[Array, "R n"]:
    """out[r, n] = sum_k a[r, k] b[group of r, k, n], in a's dtype; b [n, G, k] if `b_k_major`."""
    if b_k_major:
        n, groups, k = b.shape
    else:
        groups, k, n = b.shape
    if a.shape[1] != k or group_sizes.shape != (groups,):
        raise ValueError(f"a {list(a.shape)}, b {list(b.shape)} and group_sizes {list(group_sizes.shape)} do not fit")
    dispatch.check_multiple(GRANULE, rows=a.shape[0], k=k, n=n)
    if dispatch.resolve(implementation) != "hopper":
        by_group = jnp.moveaxis(b, 0, 2) if b_k_major else b
        return dense_rows(a, by_group, group_sizes).astype(a.dtype)
    flat = b.reshape(n, groups * k) if b_k_major else b.reshape(groups * k, n)
    problem = Problem(
        a.shape[0], n, k, "rows", groups, b_k_major, dtype=a.dtype.name, out_dtype=a.dtype.name, a="k_major"
    )
    return _launch(problem, a, flat, group_sizes, config)


def columns(
    weights: Float[Array, "_ _"],
    tokens: Float[Array, "R k"],
    group_sizes: Int[Array, "G"],
    *,
    transposed: bool = False,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> Float[Array, "R _f"]:
    """out[r, f] = sum_k A[g f_count + f, k] tokens[r, k], g the group of r; A [F, k], or given `transposed`, [k, F]."""
    k, groups = tokens.shape[1], group_sizes.shape[0]
    features, a_k = weights.shape[::-1] if transposed else weights.shape
    if a_k != k:
        raise ValueError(f"weights {list(weights.shape)} and tokens {list(tokens.shape)} differ in k")
    dispatch.check_multiple(GRANULE, rows=tokens.shape[0], k=k)
    if features % (groups * GRANULE):
        raise ValueError(f"{features} rows of weights do not split into {groups=} parts of multiples of {GRANULE}")
    if dispatch.resolve(implementation) != "hopper":
        by_row = weights if transposed else weights.T
        by_group = jnp.moveaxis(by_row.reshape(k, groups, -1), 1, 0)
        return dense_rows(tokens, by_group, group_sizes).astype(tokens.dtype)
    form: AForm = "m_major" if transposed else "k_major"
    name = tokens.dtype.name
    problem = Problem(features, tokens.shape[0], k, "columns", groups, True, True, name, name, a=form)
    return _launch(problem, weights, tokens, group_sizes, config)


def contraction(
    a: Float[Array, "R m"],
    b: Float[Array, "R n"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype=jnp.float32,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> Float[Array, "G m n"]:
    """out[g, m, n] = the sum over the tokens r of group g of a[r, m] b[r, n]; a group without tokens gives zeros."""
    (tokens, m), n, groups = a.shape, b.shape[1], group_sizes.shape[0]
    if b.shape[0] != tokens:
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)} differ in tokens")
    dispatch.check_multiple(GRANULE, rows=tokens, m=m, n=n)
    if dispatch.resolve(implementation) != "hopper":
        sizes = padded_sizes(group_sizes, tokens)
        return reference.contraction(a, b, sizes, align=GRANULE).astype(out_dtype)
    out_name = jnp.dtype(out_dtype).name
    problem = Problem(m, n, tokens, "contraction", groups, dtype=a.dtype.name, out_dtype=out_name, a="m_major")
    return _launch(problem, a, b, group_sizes, config).reshape(groups, m, n)


def _launch(problem: Problem, a, b, group_sizes, config: TileConfig | None):
    dispatch.check_kernel_dtypes(a.dtype, problem.out_dtype)
    return kernel.matmul(
        a,
        None,
        b,
        problem=problem,
        config=config or tuned.choose(problem),
        num_sms=device.sm_count(),
        groups=group_sizes.astype(jnp.int32),
    )
