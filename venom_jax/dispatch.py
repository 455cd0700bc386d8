"""Which form of the FFN runs: masked dense products, or packed operands on sparse tensor cores."""

from typing import Literal, get_args

from pallas_kernels import dispatch
from venom_jax import packed_ffn
from venom_jax.pattern import Recipe

Implementation = Literal["reference", "hopper"]

Kernels = dispatch.Implementation
"""Which kernels the packed form calls; "reference" is their jnp form, for tests."""


def resolve_implementation(implementation: Implementation | None) -> Implementation:
    """Check a name before anything is compiled: a named implementation is taken or refused, never replaced.

    None is "reference" for now: the packed form is not yet faster everywhere (docs/kernels.md).

    Raises:
      ValueError: no such implementation.
      NotImplementedError: it does not run on this device.
    """
    if implementation is None:
        return "reference"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation = {implementation!r}; use one of {', '.join(map(repr, get_args(Implementation)))} or None."
        )
    return dispatch.resolve(implementation)


def choose_kernels(implementation: Implementation | None, recipe: Recipe, d_model: int, d_ffn: int) -> Kernels | None:
    """The kernels for the packed form, or None for the masked form.

    Raises:
      ValueError, NotImplementedError: as `resolve_implementation`; also where a named implementation does not take
        the recipe or the sizes.
    """
    if resolve_implementation(implementation) == "reference":
        return None
    reason = packed_ffn.unsupported(recipe, d_model, d_ffn)
    if reason is not None:
        raise NotImplementedError(f"implementation = 'hopper': {reason}. Use implementation = None or 'reference'.")
    return "hopper"
