"""Which implementation runs: the plain jnp reference, or kernels for this device."""

from typing import Literal, get_args

import jax

Implementation = Literal["reference", "hopper"]


def resolve_implementation(implementation: Implementation | None) -> Implementation:
    """The implementation to run. A named one is taken or refused, never replaced.

    Raises:
      ValueError: no such implementation.
      NotImplementedError: it does not run on this device.
    """
    if implementation is None or implementation == "reference":
        return "reference"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation = {implementation!r}; use one of {', '.join(map(repr, get_args(Implementation)))} or None."
        )
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        raise NotImplementedError(
            "implementation = 'hopper' needs an NVIDIA GPU of compute capability 9.0 (H100, H200); this process runs "
            f"on {device.device_kind!r}. Use implementation = None or 'reference'."
        )
    raise NotImplementedError(
        "implementation = 'hopper': the FFN does not call the Hopper kernels yet; they are usable alone in "
        "pallas_kernels.sparse24 and pallas_kernels.grouped24. Use implementation = None or 'reference'."
    )
