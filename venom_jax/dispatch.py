"""Which form of the FFN runs: masked dense products, or packed operands on sparse tensor cores."""

import functools
import warnings
from pathlib import Path
from typing import Literal, get_args

import flax
import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch
from venom_jax import packed_ffn
from venom_jax.pattern import Recipe

Implementation = Literal["reference", "hopper"]

Kernels = dispatch.Implementation
"""Which kernels the packed form calls; "reference" is their jnp form, for tests."""


class ReferenceWarning(UserWarning):
    """A GPU that has kernels for the layer runs its masked reference, which is slower than the dense layer."""


UNKNOWN_MESH = (
    "several devices are visible and nothing says how they share the arrays, so no kernel can run. Give the mesh: "
    "jax.set_mesh(mesh) around the program, or SparseMLP(..., mesh=mesh); for one GPU of several, set "
    "CUDA_VISIBLE_DEVICES or a mesh of one device"
)
_PACKAGES = tuple(str(Path(module.__file__ or "").parent) for module in (packed_ffn, dispatch, flax, jax))


@functools.cache
def warn_reference(reason: str) -> None:
    """Say once for each reason, at the caller's line, that a GPU with kernels runs the masked reference."""
    warnings.warn(
        f"The sparse layer runs as masked dense products, slower than the dense layer: {reason}.",
        ReferenceWarning,
        skip_file_prefixes=_PACKAGES,
    )


def resolve_implementation(implementation: Implementation | None) -> Implementation:
    """Check a name before anything is compiled: a named implementation is taken or refused, never replaced.

    None is "hopper" on a Hopper GPU, and elsewhere "reference".

    Raises:
      ValueError: no such implementation.
      NotImplementedError: it does not run on this device.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation = {implementation!r}; use one of {', '.join(map(repr, get_args(Implementation)))} or None."
        )
    return dispatch.resolve(implementation)


def choose_kernels(
    implementation: Implementation | None,
    recipe: Recipe,
    d_model: int,
    d_ffn: int,
    dtype: jax.typing.DTypeLike,
    *,
    local: bool = False,
) -> Kernels | None:
    """The kernels for the packed form, or None for the masked form.

    With implementation None the packed form runs where it can: on a Hopper GPU, where recipe, sizes and dtype suit the
    kernels and the arrays are one device's part, since XLA cannot split a kernel. Where one of these is missing on such
    a GPU, `ReferenceWarning` says which, once. `local`: the arrays are one device's part, whatever JAX says of it.

    Raises:
      ValueError, NotImplementedError: as `resolve_implementation`; also where a named implementation does not take
        the recipe, the sizes or the dtype, and for eight bits on a GPU that has none, unless the reference is named.
    """
    chosen = resolve_implementation(implementation)
    if recipe.in_fp8 and implementation is None:
        chosen = dispatch.resolve(None, jnp.float8_e4m3fn)
    if chosen == "reference":
        return None
    reason = packed_ffn.unsupported(recipe, d_model, d_ffn)
    if reason is None and jnp.dtype(dtype).name not in dispatch.KERNEL_DTYPES:
        reason = f"tokens are {jnp.dtype(dtype).name}, the kernels take {' or '.join(dispatch.KERNEL_DTYPES)}"
    if reason is not None and implementation is not None:
        raise NotImplementedError(f"implementation = 'hopper': {reason}. Use implementation = None or 'reference'.")
    if reason is None and implementation is None and not (local or device.arrays_lie_on_one_device()):
        reason = UNKNOWN_MESH
    if reason is None:
        return "hopper"
    if not recipe.is_dense:
        warn_reference(reason)
    return None
