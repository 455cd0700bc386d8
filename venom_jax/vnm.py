"""Linear layers with V:N:M weights: y = x W, W^T stored as V:N:M along its inputs, forward on sparse tensor cores.

    y[t, o] = sum_i x[t, i] W[i, o]            A = W^T is V:N:M [out, in]: y^T = A x^T, the kernel's product
    dx      = dy A                             exact, a dense product of the unpacked A (`pallas_kernels.vnm`)
    dW      = x^T dy                           a dense product: "ste" passes it on as it is, "masked" where A is stored

The masters W are dense. Which entries are stored is *held*: a `VNM` whose values are taken anew from the masters in
every call, and which only `VNMLinear.prune` changes.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import dispatch
from pallas_kernels.array_types import Array, Float
from pallas_kernels.vnm import vnm, vnm_transposed
from venom_jax.formats import VNM, Sparse24
from venom_jax.mlp import Method
from venom_jax.pattern import Pattern
from venom_jax.prune import ColumnChoice
from venom_jax.prune import vnm as prune_vnm

Gradient = Literal["ste", "masked"]


def vnm_matmul(
    a: VNM,
    b: Float[Array, "_C _n"],
    *,
    as_24: Sparse24 | None = None,
    implementation: dispatch.Implementation | None = None,
    **options: Any,
) -> Float[Array, "_R _n"]:
    """out = A B for a stored matrix, without its padding rows; any n.

    Args:
      as_24: the same matrix as `a.to_sparse24()`, for a fixed weight whose memory allows both: the faster is taken
        (`pallas_kernels.vnm.best_form`). Not used where C is no multiple of 64.
      options: transpose_out (out^T [n, R]), out_dtype and config of `pallas_kernels.vnm.vnm`.

    Raises:
      ValueError: sizes or dtypes that do not belong together.
      NotImplementedError: the named implementation does not take this device or these dtypes.

    No gradient is defined; `vnm_linear` has one.
    """
    if b.ndim != 2:
        raise ValueError(f"b of shape {b.shape} is no matrix.")
    if b.shape[0] != a.shape[1]:
        raise ValueError(f"b of shape {b.shape} has {b.shape[0]} rows; the stored matrix is {a.shape}.")
    if as_24 is not None and (as_24.shape, as_24.axis) != (a.shape, 1):
        raise ValueError(f"as_24 is {as_24.shape} along axis {as_24.axis}; the stored matrix is {a.shape}, axis 1.")
    n = b.shape[1]
    # With m = 4 all columns are kept in their order: the stored matrix is plain 2:4 as it stands.
    plain = a if as_24 is None and a.pattern.m == 4 else as_24
    out = vnm(
        a.values,
        a.metadata,
        a.columns,
        jnp.pad(b, ((0, 0), (0, -n % 8))),
        as_24=(plain.values, plain.metadata) if plain is not None and a.shape[1] % 64 == 0 else None,
        implementation=implementation,
        **options,
    )
    return out[:n, : a.shape[0]] if options.get("transpose_out") else out[: a.shape[0], :n]


def vnm_linear(
    x: Float[Array, "T in"],
    w: Float[Array, "in out"],
    held: VNM,
    *,
    gradient: Gradient = "masked",
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "T _out"]:
    """y = x A^T with A the entries of w^T at the places that `held` stores, in x's dtype.

    Args:
      held: [out, in]; its values are not used.
      gradient: of w. "masked": dW where an entry is stored, 0 elsewhere, the derivative of what is computed; "ste":
        all of dW = x^T dy, as if every entry were stored, so that what is pruned can grow back.

    Raises:
      ValueError, NotImplementedError: as `vnm_matmul`; also an unknown gradient.
    """
    check_gradient(gradient)
    if held.shape != w.shape[::-1]:
        raise ValueError(f"a VNM of shape {held.shape} for weights {w.shape}; it stores w^T, {w.shape[::-1]}.")
    packed = held.take(w.T.astype(x.dtype))

    @jax.custom_vjp
    def apply(x, w, packed):
        return vnm_matmul(packed, x.T, transpose_out=True, implementation=implementation)

    def forward(x, w, packed):
        return apply(x, w, packed), (x, packed)

    def backward(saved, dy):
        x, packed = saved
        rows = packed.columns.shape[0] * packed.pattern.v
        dy_padded = jnp.pad(dy.T, ((0, rows - dy.shape[1]), (0, 0)))
        dx = vnm_transposed(packed.values, packed.metadata, packed.columns, dy_padded, packed.shape[1]).T
        dw = (x.T @ dy).astype(w.dtype)
        return dx, jnp.where(packed.mask().T, dw, 0) if gradient == "masked" else dw, None

    apply.defvjp(forward, backward)
    return apply(x, w, jax.tree.map(jax.lax.stop_gradient, packed))


def check_gradient(gradient: str) -> None:
    """Raise ValueError for a name that is none of `Gradient`."""
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient = {gradient!r}: use one of {', '.join(map(repr, get_args(Gradient)))}.")


class VNMLinear(nnx.Module):
    """y = x W without bias, W read as V:N:M.

    Attributes:
      w: Param [in, out], dense masters.
      columns, metadata: Method, the places that are stored (see `VNM`); gradients and optimizers leave them alone.

    Example:
      >>> layer = VNMLinear(512, 1024, pattern=Pattern(v=64, m=16), rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((2, 8, 512)))
      >>> layer.prune(columns="best")  # choose anew from the masters
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        pattern: Pattern,
        gradient: Gradient = "masked",
        param_dtype: Any = jnp.float32,
        w_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Make the layer and prune its initial weights by L1.

        Args:
          gradient: of the masters, see `vnm_linear`.

        Raises:
          ValueError: d_in is no multiple of pattern.m, the pattern cannot be stored, or an unknown gradient.
        """
        check_gradient(gradient)
        init = nnx.initializers.lecun_normal() if w_init is None else w_init
        self.pattern, self.gradient = pattern, gradient
        w = init(rngs.params(), (d_in, d_out), param_dtype)
        packed = prune_vnm(w.T, pattern)
        self.w = nnx.Param(w)
        self.columns, self.metadata = Method(packed.columns), Method(packed.metadata)

    def packed(self, dtype: Any = None) -> VNM:
        """W^T as it is read: the masters' entries at the stored places."""
        w = self.w[...].T
        return self._held().take(w if dtype is None else w.astype(dtype))

    def prune(self, *, columns: ColumnChoice = "l1", input_norm: Float[Array, " in"] | None = None) -> None:
        """Choose the stored places anew from the masters; arguments as in `venom_jax.prune.vnm`."""
        packed = prune_vnm(self.w[...].T, self.pattern, columns=columns, input_norm=input_norm)
        self.columns[...], self.metadata[...] = packed.columns, packed.metadata

    def __call__(
        self, x: Float[Array, "*batch in"], *, implementation: dispatch.Implementation | None = None
    ) -> Float[Array, "*batch _out"]:
        """Apply the layer; y has x's dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        y = vnm_linear(tokens, self.w[...], self._held(), gradient=self.gradient, implementation=implementation)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _held(self) -> VNM:
        d_in, d_out = self.w[...].shape
        return VNM(None, self.metadata[...], self.columns[...], (d_out, d_in), self.pattern)
