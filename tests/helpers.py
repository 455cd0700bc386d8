"""One table of tolerances, and the error they bound."""

import jax.numpy as jnp
import numpy as np

# Norm-wise relative error ||out - ref|| / ||ref|| allowed for results computed in each dtype.
TOLERANCE = {
    "float64": 1e-12,
    "float32": 2e-6,
    "bfloat16": 1e-2,  # one rounding of y1, y2 and dy1 each; the selected patterns may differ where values tie
}


def relative_error(out, reference) -> float:
    """||out - ref|| / ||ref||, or ||out|| where the reference is zero; NaN counts as infinite."""
    out, reference = (np.asarray(t, np.float64) for t in (out, reference))
    assert out.shape == reference.shape, f"{out.shape} against {reference.shape}"
    scale = np.linalg.norm(reference) or 1.0
    error = np.linalg.norm(out - reference) / scale
    return float(error) if np.isfinite(error) else float("inf")


def assert_close(out, reference, dtype="float32"):
    """`out` agrees with `reference` as far as `dtype` can."""
    error = relative_error(out, reference)
    limit = TOLERANCE[jnp.dtype(dtype).name]
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g} for {dtype}"
