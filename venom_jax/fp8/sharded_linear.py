"""`linear` where several devices share its weight: for use inside `jax.shard_map`.

Each device holds rows of w and computes its own tokens. The weight travels in e4m3, a byte an entry, once for the
forward and once more for the backward, which lets go of it in between as `venom_jax.sharded_ffn` does. Its scales are
those of the whole weight; x and dy are scaled on each device, so that dw changes with their number as roundings do.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float
from pallas_kernels.cast8 import api as cast8
from pallas_kernels.cast8 import reference
from pallas_kernels.cast8.api import Cast
from pallas_kernels.dispatch import Implementation
from venom_jax.fp8 import products
from venom_jax.fp8.linear import as_before, choose, in_rows, linear, product_backward, product_forward
from venom_jax.sharded_ffn import gather, scatter

_ROWS, _COLUMNS = 0, 1


def sharded_linear(
    x: Float[Array, "*B D"], part: Float[Array, "Dn N"], *, axis: str, implementation: Implementation | None = None
) -> Float[Array, "*B N"]:
    """`venom_jax.fp8.linear` on this device's tokens, with this device's Dn = D / n of the weight's rows.

    Args:
      axis: the mesh axis over whose n devices w is cut; its gradient is summed over them and scattered.
      implementation: as in `linear`.

    Raises:
      ValueError, NotImplementedError: as `linear`.
    """
    if jax.lax.axis_size(axis) == 1:
        return linear(x, part, implementation=implementation)
    chosen = choose(implementation, x.shape[-1], part.shape[1])
    rows = in_rows(x)
    return as_before(_linear(chosen, axis, rows, part), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(implementation: Implementation, axis: str, x, part):
    return _forward(implementation, axis, x, part)[0]


def _forward(implementation, axis, x, part):
    largest = jax.lax.pmax(jnp.max(jnp.abs(part), axis=_ROWS).astype(jnp.float32), axis)
    scale = reference.scale_of(largest)
    forward = Cast(gather(reference.cast(part.T, scale[:, None]), axis, _COLUMNS), scale)
    y, (kept, _, _) = product_forward(implementation, x, part, forward, None)
    return y, (kept, part)


def _backward(implementation, axis, saved, dy):
    kept, part = saved
    own = cast8.by_row(part, implementation=products.casting(implementation))
    weight = Cast(*(gather(array, axis, _ROWS, after=kept.values) for array in own))
    dx, dw, _ = product_backward(implementation, (kept, part, weight), dy)
    return dx, scatter(dw, axis, _ROWS)


_linear.defvjp(_forward, _backward)
