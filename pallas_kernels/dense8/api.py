"""out = epilogue(A B^T), both of 8 bits and dense: validate, choose the implementation, run it.

XLA has such products (cublasLt) with a scale for each operand. Here the kernel of the sparse products multiplies the
dense A, so that scales for each row and column, an activation or an operand cost no pass over the output.
"""

import jax.numpy as jnp

from pallas_kernels import device, dispatch, tuned
from pallas_kernels.array_types import Array, Float
from pallas_kernels.epilogue import Epilogue, apply
from pallas_kernels.hopper import kernel
from pallas_kernels.sparse24.hopper import padded
from pallas_kernels.tiles import GRANULE, Problem, TileConfig

_PLAIN = Epilogue()


def dense8(
    a: Float[Array, "_m _k"],
    b: Float[Array, "_n _k"],
    *,
    transpose_out: bool = False,
    out_dtype=None,
    epilogue: Epilogue = _PLAIN,
    operand: Float[Array, "_m _n"] | None = None,
    row_scale: Float[Array, "_m"] | None = None,
    column_scale: Float[Array, "_n"] | None = None,
    promote: int | None = None,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> Float[Array, "_m _n"]:
    """out[m, n] = epilogue(sum_k a[m, k] b[n, k]).

    Args:
      a, b: e4m3 or e5m2, each; k a multiple of 128, m and n of 16.
      transpose_out, out_dtype, epilogue, operand, row_scale, column_scale, promote, implementation, config: as in
        `sparse24`.

    Raises:
      ValueError: shapes or dtypes that do not belong together, or sizes that are no such multiples.
      NotImplementedError: the implementation does not take this device.
    """
    (m, a_k), (n, k) = a.shape, b.shape
    if a_k != k:
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)} differ in k")
    for name, operand_ in (("a", a), ("b", b)):
        if not dispatch.is_fp8(operand_.dtype):
            raise ValueError(f"{name} is {operand_.dtype}; want e4m3 or e5m2. Of 16 bits use jnp.dot")
    chosen = dispatch.resolve(implementation, b.dtype)
    dispatch.check_fp8(b.dtype, promote, b_k_major=True, k=k, m=m, n=n)
    out_dtype = dispatch.out_dtype_of(b, out_dtype)
    out_shape = (n, m) if transpose_out else (m, n)
    epilogue.check(operand, row_scale, column_scale, out_shape=out_shape, rows=m, columns=n, out_dtype=out_dtype)
    if chosen != "hopper":
        acc = jnp.dot(*dispatch.widened(a, b.T), precision="highest")
        row_axis = 1 if transpose_out else 0
        acc = acc.T if transpose_out else acc
        return apply(epilogue, acc, operand, row_scale, column_scale, row_axis=row_axis, out_dtype=out_dtype)
    dispatch.check_kernel_dtypes(b.dtype, out_dtype)
    padded_m, padded_n = padded(m, n, transpose_out)
    problem = Problem(
        m=padded_m,
        n=padded_n,
        k=k,
        b_k_major=True,
        transpose_out=transpose_out,
        dtype=a.dtype.name,
        b_type=b.dtype.name if b.dtype != a.dtype else "",
        out_dtype=out_dtype.name,
        epilogue=epilogue,
        a="k_major",
        promote=promote or 0,
    )
    if operand is not None:
        operand = jnp.pad(operand, ((0, 0), (0, -operand.shape[1] % GRANULE)))
    out = kernel.matmul(
        a,
        None,
        b,
        problem=problem,
        config=config or tuned.choose(problem),
        num_sms=device.sm_count(),
        operand=operand,
        row_scale=row_scale,
        column_scale=column_scale,
    )
    return out[:n, :m] if transpose_out else out[:m, :n]
