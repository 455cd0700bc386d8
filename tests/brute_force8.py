"""The FFN in eight bits once more, in numpy: all six products with the casts of their operands, one after the other.

Products in float64, casts by ml_dtypes from float32, scales by logarithms; of the library it shares nothing.
"""

import math

import ml_dtypes
import numpy as np

from tests.brute_force import GEMMS, along, groups, keep_two, soft_threshold

HEADROOM_Y2, HEADROOM_DY1, SAMPLE = 32, 16, 256


def scale_of(largest, power=1):
    """The smallest power of 2^power, from 2^-60 to 2^60, under which `largest` is at most 448."""
    if not np.isfinite(largest):
        return math.nan
    if largest == 0:
        return 2.0**-60
    exponent = math.ceil(math.log2(float(largest)) - math.log2(448))
    return 2.0 ** min(max(math.ceil(exponent / power) * power, -60), 60)


def cast(matrix, scale):
    """What is left of a matrix in e4m3; `scale` broadcasts."""
    v = np.clip((matrix / scale).astype(np.float32), -448, 448)
    return v.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def over(matrix, axis):
    """A matrix cast with one scale for each entry of `axis`."""
    largest = np.abs(matrix).max(axis=1 - axis)
    scales = np.array([scale_of(each) for each in largest])
    return cast(matrix, scales[:, None] if axis == 0 else scales), scales


def bf16(matrix):
    return matrix.astype(ml_dtypes.bfloat16).astype(np.float64)


def peak(sampled, tokens, every, weight, width):
    """The largest magnitude to expect of each neuron."""
    largest, seen = tokens.max(), tokens[::every].max()
    found = np.abs(sampled).max(axis=0)
    return np.where(found > 0, found * largest / seen, largest * weight * 448.0**2 / 4 * math.sqrt(width))


def fold(weight, scales, factor):
    """A weight [F, D] over one scale, times `factor`, which comes out again."""
    t = (factor * scales).max()
    return cast(weight * factor[:, None], t) / factor[:, None]


def ffn(x, w1, w2, beta, route, recipe, dy3):
    """y3, dx, dW1, dW2, rows and neurons that a token does not compute being masked."""
    x, w1, w2, beta, dy3 = (np.asarray(t, np.float64) for t in (x, w1, w2, beta, dy3))
    tokens, hidden, experts = x.shape[0], w1.shape[1], recipe.experts
    width, size, every = x.shape[1], hidden // experts, max(1, -(-tokens // SAMPLE))
    route = np.zeros((tokens, 1), int) if route is None else np.asarray(route)
    own = np.repeat((route[:, :, None] == np.arange(experts)).any(axis=1), size, axis=1)

    def sparse_or(dense, scale, gemm, w):
        """beta S(w) in bf16, then in e4m3 with a scale that beta w would have; or what there is of the dense weight."""
        if gemm not in recipe.weights:
            return dense, scale
        each = np.float32(beta[GEMMS.index(gemm)])
        scale = np.array([scale_of(each * row) for row in np.abs(w.astype(np.float32)).max(axis=1)])
        return cast(bf16(each * along(soft_threshold, w.astype(np.float32), 1)), scale[:, None]), scale

    (dense1, scale1), (dense2, scale2) = over(w1.T, 0), over(w2, 0)
    first, first_scale = sparse_or(dense1, scale1, "y1", w1.T)
    second, second_scale = sparse_or(dense2, scale2, "dy2", w2)

    x8, x_scale = over(x, 0)
    m = peak(bf16(over(x[::every], 0)[0] @ first.T), x_scale, every, first_scale, width)
    s = np.array([scale_of(each, 2) for each in HEADROOM_Y2 * m * m])
    a = np.maximum(bf16(x8 @ first.T), 0) * own
    if recipe.activations:
        a = a * along(keep_two, a, 1)
    y2 = cast(a * a, s)
    y3 = y2 @ fold(dense2, scale2, s)

    dy8, dy_scale = over(dy3, 0)
    n = peak(bf16(over(dy3[::every], 0)[0] @ second.T), dy_scale, every, second_scale, width)
    q = np.array([scale_of(each) for each in 2 * HEADROOM_DY1 * n * m])
    root = bf16(np.sqrt(y2 / s)) * np.sqrt(s)
    dy1 = cast(2 * bf16(dy8 @ second.T) * root, q)
    dx = dy1 @ fold(dense1, scale1, q)

    kept = np.ones_like(own)
    if recipe.wgrad == "24":
        ranked, kept = (a if recipe.token_copy == "kept" else root), np.zeros_like(own)
        fours = groups(route, experts, recipe.group_rows, recipe.token_blocks, recipe.token_order)
        for e, four in [(expert, four) for expert in range(experts) for four in fours[expert]]:
            for f in range(e * size, (e + 1) * size):
                values = np.array([0.0 if t is None else ranked[t, f] for t in four])
                for i in np.flatnonzero(keep_two(values)):
                    if four[i] is not None:
                        kept[four[i], f] = True
    dw2 = (y2 * kept).T @ over(dy3, 1)[0]
    dw1 = over(x, 1)[0].T @ (dy1 * kept)
    return y3, dx, dw1, dw2
