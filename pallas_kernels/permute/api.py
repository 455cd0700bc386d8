"""Tokens to experts and back; kernels or plain jnp.

No function here has a derivative of its own: they run inside the `custom_vjp` of the layer. Under `jax.vmap` a kernel
takes one more grid axis.
"""

import jax.numpy as jnp

from pallas_kernels import device, dispatch
from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.permute import hopper, reference, threads
from pallas_kernels.permute.reference import Sorted


def gather_rows(
    tokens: Float[Array, "T D"],
    token_of_row: Int[Array, "R"],
    weights: Float[Array, "R"] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "R D"]:
    """rows[r] = tokens[token_of_row[r]] (times weights[r], in f32); zero in padding rows, where that is T.

    Raises:
      NotImplementedError: the named implementation does not take this device, dtype or D.
    """
    if _choose(implementation, tokens) != "reference":
        return hopper.gather_rows(tokens, token_of_row, weights)
    return reference.gather_rows(tokens, token_of_row, weights)


def sum_copies(
    rows: Float[Array, "R D"],
    row_of_slot: Int[Array, "T k"],
    weights: Float[Array, "T k"] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "T D"]:
    """tokens[t] = the sum over j of rows[row_of_slot[t, j]] (times weights[t, j]), in order of j, in f32, rounded once.

    Raises:
      NotImplementedError: as `gather_rows`.
    """
    if _choose(implementation, rows) != "reference":
        return hopper.sum_copies(rows, row_of_slot, weights)
    return reference.sum_copies(rows, row_of_slot, weights)


def sort_into_groups(
    group: Int[Array, "T k"],
    groups: int,
    *,
    align: int,
    interleaved: bool,
    implementation: dispatch.Implementation | None = None,
) -> Sorted:
    """Rows group after group, each padded to `align`, tokens in order or in fours far apart (`reference`).

    More than 128 groups are sorted by XLA under either name: the kernel keeps a counter of each in a thread.

    Raises:
      ValueError: `align` is no multiple of 4.
      NotImplementedError: the named implementation does not take this device.
    """
    if align % 4:
        raise ValueError(f"groups of rows are padded to {align=}, which is no multiple of 4.")
    if dispatch.resolve(implementation) != "reference" and groups <= threads.MAX_GROUPS:
        return hopper.sort_into_groups(group, groups, align=align, interleaved=interleaved)
    return reference.sort_into_groups(group, groups, align=align, interleaved=interleaved)


def choose_experts(
    x: Float[Array, "T D"],
    means: Float[Array, "E D"],
    bias: Float[Array, "E"] | None,
    top_k: int,
    *,
    cosine: bool,
    implementation: dispatch.Implementation | None = None,
) -> Int[Array, "T k"]:
    """The `top_k` experts with the largest <x, mean_e>, over |x| if `cosine`, + bias_e; ascending, ties to the lower.

    Scores are sums in f32 of products of x and f32 means. The kernel adds in another order than the reference and
    divides by |x| last, so experts whose cosines differ by less than about 1e-6 may change places.

    Args:
      implementation: None takes the kernel where device, sizes and dtype allow it, and XLA has nothing to split
        (`device.arrays_lie_on_one_device`).

    Raises:
      NotImplementedError: the named implementation does not take this device, x's dtype, D or E.
    """
    reason = _no_choice(x, means)
    if implementation is None and (reason is not None or not device.arrays_lie_on_one_device()):
        implementation = "reference"
    if dispatch.resolve(implementation) != "reference":
        if reason is not None:
            raise NotImplementedError(f"{reason}. Use implementation='reference'.")
        return hopper.choose_experts(x, means, bias, top_k, cosine=cosine)
    return reference.choose_top(reference.score_experts(x, means, cosine=cosine), bias, top_k)


def _no_choice(x: Array, means: Array) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"the kernel scores tokens in bfloat16, got {x.dtype}"
    if x.shape[1] % 128 or x.shape[0] == 0:
        return f"the kernel takes at least one token and features in multiples of 128, got {list(x.shape)}"
    if means.shape[0] > threads.MAX_EXPERTS:
        return f"the kernel scores at most {threads.MAX_EXPERTS} experts, got {means.shape[0]}"
    return None


def _choose(implementation: dispatch.Implementation | None, rows: Array) -> dispatch.Implementation:
    chosen = dispatch.resolve(implementation)
    if chosen != "reference" and (
        rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or rows.shape[1] * rows.dtype.itemsize % 16
    ):
        raise NotImplementedError(
            f"the kernel moves rows of 16-bit or f32 numbers in multiples of 16 bytes, got {rows.dtype}"
            f"{list(rows.shape)}. Pad the rows, or use implementation='reference'."
        )
    return chosen
