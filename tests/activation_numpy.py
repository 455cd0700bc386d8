"""N:M activation sparsity in float64 numpy, written from its definition: loops and sorts, nothing shared with ours."""

import numpy as np


def keep(score, pattern):
    """The mask of one token's scores [I]: `n:m`, or the share to prune as a float."""
    mask = np.zeros(len(score), bool)
    if isinstance(pattern, str):
        n, m = map(int, pattern.split(":"))
        blocks = [range(first, first + m) for first in range(0, len(score), m)]
    else:
        n, blocks = int(np.floor(len(score) * (1 - pattern) + 1e-9)), [range(len(score))]
    for block in blocks:
        order = sorted(
            block, key=lambda j: (0 if np.isnan(score[j]) else 1, -score[j] if score[j] == score[j] else 0, j)
        )
        mask[order[:n]] = True
    return mask


def lower_median(row):
    return np.sort(row)[(len(row) - 1) // 2]


def static_weight(criterion, w, calibration):
    """c for w [I, O] and the inputs [T, I] of a calibration text."""
    if criterion == "rms":
        return np.sqrt((calibration**2).mean(0))
    if criterion == "wina":
        return np.linalg.norm(w, axis=1)
    if criterion == "pcs":
        return np.sqrt(np.abs(w).max(1) / np.abs(calibration).max(0))
    if criterion == "outstanding":
        return 1 / np.sqrt(np.abs(w).max(1) / np.abs(calibration).max(0))
    if criterion == "weight_var":
        return ((w - w.mean(1, keepdims=True)) ** 2).mean(1)
    assert criterion.startswith("amber")
    flat = np.sort(w.ravel())
    place = np.array([0.005, 0.995]) * (len(flat) - 1)
    low, high = (flat[int(p)] + (p % 1) * (flat[int(p) + 1] - flat[int(p)]) for p in place)
    trimmed = flat[(flat >= low) & (flat <= high)]
    standard = (w - trimmed.mean()) / np.sqrt(((trimmed - trimmed.mean()) ** 2).mean())
    if criterion == "amber_trimmed":
        standard = np.where((w < low) | (w > high), 0, standard)
    norm = np.sqrt((standard**2).sum(1))
    return norm / norm.min()


def static_shift(shift, calibration):
    if shift == "tensor":
        return np.mean([lower_median(row) for row in calibration])
    if shift == "channel":
        return np.median(calibration, axis=0)
    return calibration.mean(0)


def forward(x, w, b, pattern, criterion, shift, variance, calibration):
    """(y [T, O], masks [T, I]) of one sequence x [T, I]."""
    x, w, b, calibration = (np.asarray(a, np.float64) for a in (x, w, b, calibration))
    y, masks = [], []
    for t, row in enumerate(x):
        if shift == "none":
            eta = np.zeros_like(row)
        elif shift == "token":
            eta = np.full_like(row, lower_median(row))
        elif shift == "token_mean":
            eta = np.full_like(row, row.mean())
        else:
            eta = np.zeros_like(row) + static_shift(shift, calibration)
        if criterion == "act":
            c = np.ones_like(row)
        elif criterion == "clact":
            c = np.sqrt((x**2).sum(0))
        elif criterion == "clact_causal":
            c = np.sqrt((x[: t + 1] ** 2).sum(0))
        else:
            c = static_weight(criterion, w, calibration)
        z = row - eta
        mask = keep(np.abs(z) * c, pattern)
        nu = 1.0
        if variance == "variance":
            nu = np.sqrt(z.var() / max((z * mask).var(), 1e-9))
        elif variance == "energy":
            nu = np.sqrt((z**2).sum() / max(((z * mask) ** 2).sum(), 1e-9))
        y.append(nu * ((z * mask) @ w) + eta @ w + b)
        masks.append(mask)
    return np.array(y), np.array(masks)
