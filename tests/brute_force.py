"""The algorithm once more, in numpy with loops and float64: slow, obvious, and sharing no code with the library."""

import numpy as np

GEMMS = ("y1", "y3", "dy2", "dx")


def magnitude_order(four):
    """Indices of four entries, largest magnitude first, NaN before inf, ties by index."""
    return sorted(range(4), key=lambda i: (-(np.inf if np.isnan(four[i]) else abs(four[i])), not np.isnan(four[i]), i))


def keep_two(vector):
    """Mask of the two largest of each four entries of a vector."""
    mask = np.zeros(len(vector), bool)
    for start in range(0, len(vector), 4):
        for i in magnitude_order(vector[start : start + 4])[:2]:
            mask[start + i] = True
    return mask


def soft_threshold(vector):
    """S of one vector of finite numbers."""
    out = np.zeros_like(vector)
    for start in range(0, len(vector), 4):
        four = vector[start : start + 4]
        t = sorted(abs(four))[1]
        for i, a in enumerate(four):
            if abs(a) > t:
                out[start + i] = a - np.sign(a) * t
    return out


def along(function, matrix, axis):
    return np.apply_along_axis(function, axis, matrix)


def groups(route, experts, v, blocks, order):
    """For each expert a list of fours: token indices, None for padding."""
    tokens = route.shape[0]
    result = {e: [] for e in range(experts)}
    for e in range(experts):
        for block in range(blocks):
            span = range(block * tokens // blocks, (block + 1) * tokens // blocks)
            members = [t for t in span if e in route[t]]
            padded = members + [None] * (-len(members) % v)
            quarter = len(padded) // 4
            for p in range(quarter):
                if order == "interleaved":
                    four = [padded[p + j * quarter] for j in range(4)]
                else:
                    four = padded[4 * p : 4 * p + 4]
                result[e].append(four)
    return result


def ffn(x, w1, w2, beta, route, recipe, dy3):
    """y3, dx, dW1, dW2 of the recipe, every product a plain float64 matmul of masked arrays over all T x F."""
    x, w1, w2, beta, dy3 = (np.asarray(t, np.float64) for t in (x, w1, w2, beta, dy3))
    tokens, hidden, experts = x.shape[0], w1.shape[1], recipe.experts
    size = hidden // experts
    route = np.zeros((tokens, 1), int) if route is None else np.asarray(route)

    def weight(gemm, w, axis):
        if gemm not in recipe.weights:
            return w
        return beta[GEMMS.index(gemm)] * along(soft_threshold, w, axis)

    own = np.zeros((tokens, hidden), bool)  # the neurons each token computes
    for t in range(tokens):
        for e in route[t]:
            own[t, e * size : (e + 1) * size] = True

    a = np.maximum(x @ weight("y1", w1, 0), 0) * own
    features = along(keep_two, a, 1) if recipe.activations else np.ones_like(own)
    if "y3" not in recipe.weights:
        a = a * features
    y3 = (a * a) @ weight("y3", w2, 0)
    dy1 = 2 * (dy3 @ weight("dy2", w2, 1).T) * a
    dx = (dy1 if "dx" in recipe.weights else dy1 * features) @ weight("dx", w1, 1).T

    kept = np.ones_like(own)
    if recipe.wgrad != "dense":
        kept[:] = False
        fours = groups(route, experts, recipe.v, recipe.token_blocks, recipe.token_order)
        for e in range(experts):
            span = range(e * size, (e + 1) * size)
            exempt = int(0.05 * size / 128) * 128 if recipe.wgrad == "split95" else 0
            count = {f: -(a[:, f] > 0).sum() for f in span}
            dense = sorted(span, key=lambda f: (count[f], f))[:exempt]
            for four in fours[e]:
                for f in span:
                    values = np.array([0.0 if t is None else a[t, f] for t in four])
                    for i in range(4) if f in dense else np.flatnonzero(keep_two(values)):
                        if four[i] is not None:
                            kept[four[i], f] = True
    dw2 = (a * a * kept).T @ dy3
    dw1 = x.T @ (dy1 * kept)
    if recipe.threshold_grad == "ste_scaled":
        dw1 = beta[0] * dw1 if "y1" in recipe.weights else dw1
        dw2 = beta[1] * dw2 if "y3" in recipe.weights else dw2
    return y3, dx, dw1, dw2
