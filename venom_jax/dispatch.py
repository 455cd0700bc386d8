"""Which form of the FFN runs: masked dense products, or packed operands on sparse tensor cores."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from venom_jax import packed_ffn
from venom_jax.pattern import Recipe

Implementation = Literal["reference", "hopper"]

Kernels = dispatch.Implementation
"""Which kernels the packed form calls; "reference" is their jnp form, for tests."""


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
    kernels, and on one device only unless `local` (the arrays are one device's part), since XLA cannot split a kernel.

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
    if implementation is None and (reason is not None or (jax.device_count() > 1 and not local)):
        return None
    if reason is not None:
        raise NotImplementedError(f"implementation = 'hopper': {reason}. Use implementation = None or 'reference'.")
    return "hopper"
