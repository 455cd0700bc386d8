"""What calibration gives: statistics of a layer's inputs, and the constants of its pruning made from them.

Everything here runs once a layer, on the host, in float64 where it sums.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from venom_jax.activation.linear import Parameters
from venom_jax.activation.patterns import Pattern
from venom_jax.activation.selection import select
from venom_jax.activation.settings import STATIC_SHIFTS, Sparsity

TRIM = 0.005  # the share of the weights at each end that Amber's moments leave out
_TINY = 1e-12


class Statistics(NamedTuple):
    """Of the inputs [T, I] that a layer sees over the calibration text.

    Attributes:
      tokens: T.
      total, squares: sums of x and of x^2 over the tokens, [I].
      largest: max |x| over the tokens, [I].
      medians: the sum over the tokens of the median of a token's inputs.
      sample: some of the tokens [t, I], of which medians of channels are taken.
    """

    tokens: int
    total: np.ndarray
    squares: np.ndarray
    largest: np.ndarray
    medians: float
    sample: np.ndarray

    @property
    def rms(self) -> np.ndarray:
        """sqrt(mean x_j^2)."""
        return np.sqrt(self.squares / self.tokens)

    def settled(self) -> "Statistics":
        """The same with the medians of the channels as the only row of the sample, which is small enough to keep."""
        return self._replace(sample=np.median(self.sample, axis=0, keepdims=True).astype(np.float32))


def collect(x: np.ndarray, sample: np.ndarray | None = None) -> Statistics:
    """Statistics of the inputs x [T, I]; ``sample`` are rows of x, all of them by default.

    Raises:
      ValueError: no token.
    """
    if not len(x):
        raise ValueError("no token to take statistics of: the calibration text is too short")
    x = np.asarray(x, np.float64)
    middle = (x.shape[1] - 1) // 2
    medians = float(np.partition(x, middle, axis=1)[:, middle].sum())
    rows = x if sample is None else sample
    return Statistics(len(x), x.sum(0), np.square(x).sum(0), np.abs(x).max(0), medians, np.asarray(rows, np.float32))


def join(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of several texts together.

    Raises:
      ValueError: there is none.
    """
    if not parts:
        raise ValueError("no statistics to join: the calibration text is too short")
    return Statistics(
        sum(p.tokens for p in parts),
        np.sum([p.total for p in parts], axis=0),
        np.sum([p.squares for p in parts], axis=0),
        np.max([p.largest for p in parts], axis=0),
        float(sum(p.medians for p in parts)),
        np.concatenate([p.sample for p in parts]),
    )


def parameters(sparsity: Sparsity, w: np.ndarray, statistics: Statistics | None, mask_weight=None) -> Parameters:
    """The constants of one layer: channel weight, static shift, factors of the low rank, and where learning starts.

    A learned shift starts at the channel medians, bias and scale at 0. The low rank is the truncated SVD,
    A = U sqrt(S), B = sqrt(S) V^T.

    Args:
      sparsity: the setting.
      w: the weight [I, O].
      statistics: of the layer's inputs; needed by what is calibrated.
      mask_weight: the weights [I, all O] of all layers that share the mask, for criteria that read the weight.

    Raises:
      ValueError: statistics are needed and missing.
    """
    size, outputs = w.shape

    def constant(value: np.ndarray | None):
        return None if value is None else jnp.asarray(value, jnp.float32)

    weight = channel_weight(sparsity.criterion, w if mask_weight is None else mask_weight, statistics)
    eta = shift(sparsity.shift, size, statistics)
    low_rank_a = low_rank_b = None
    if sparsity.low_rank:
        low_rank_a, low_rank_b = low_rank(w, sparsity.low_rank)
    return Parameters(
        channel_weight=constant(weight),
        shift=constant(eta),
        bias=jnp.zeros(outputs) if sparsity.learn_bias else None,
        scale=jnp.zeros(outputs) if sparsity.learn_scale else None,
        low_rank_a=constant(low_rank_a),
        low_rank_b=constant(low_rank_b),
    )


def channel_weight(criterion: str, w: np.ndarray, statistics: Statistics | None) -> np.ndarray | None:
    """c of a criterion that is a constant of the layer, float64 [I]; None for those computed from the input itself.

        rms           sqrt(mean x_j^2)
        amber         || (w_j - mean) / std ||, divided by the least of them; mean and std over the weights between
                      their 0.5th and 99.5th percentile, the norm over all (amber_trimmed: over those as well)
        wina          || w_j ||
        pcs           sqrt(max |w_j| / max |x_j|): pruning x / s and multiplying by s w, s = 1 / c
        outstanding   the inverse of pcs
        weight_var    Var(w_j)

    w_j are the weights of input j.

    Raises:
      ValueError: statistics are needed and missing.
    """
    w = np.asarray(w, np.float64)
    match criterion:
        case "rms":
            return _needed(statistics, criterion).rms
        case "amber" | "amber_trimmed":
            low, high = np.quantile(w, (TRIM, 1 - TRIM))
            inside = (w >= low) & (w <= high)
            standard = (w - w[inside].mean()) / max(w[inside].std(), _TINY)
            norm = np.sqrt(np.square(np.where(inside, standard, 0) if criterion != "amber" else standard).sum(1))
            return norm / max(norm.min(), _TINY)
        case "wina":
            return np.sqrt(np.square(w).sum(1))
        case "pcs" | "outstanding":
            weight, data = np.abs(w).max(1), _needed(statistics, criterion).largest
            smoothing = np.sqrt((data + _TINY) / (weight + _TINY))
            return smoothing if criterion == "outstanding" else 1 / smoothing
        case "weight_var":
            return w.var(1)
        case _:
            return None


def shift(name: str, size: int, statistics: Statistics | None) -> np.ndarray | None:
    """eta of a static shift, or where a learned one starts; None where it is computed from the input.

        tensor         the mean over the tokens of the median of a token's inputs, one number
        channel        the median over the tokens of each channel
        channel_mean   the mean over the tokens of each channel
        learned        begins as channel does, at 0 without statistics

    Raises:
      ValueError: statistics are needed and missing.
    """
    if name not in STATIC_SHIFTS:
        return None
    if name == "learned":
        return np.zeros(size) if statistics is None else np.median(statistics.sample, axis=0)
    found = _needed(statistics, name)
    match name:
        case "tensor":
            return np.asarray(found.medians / found.tokens)
        case "channel":
            return np.median(found.sample, axis=0)
        case _:
            return found.total / found.tokens


def low_rank(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [O, r] and B [r, I] of the truncated SVD of w^T: A B is the closest matrix of that rank.

    Raises:
      ValueError: the rank is larger than the matrix.
    """
    if rank > min(w.shape):
        raise ValueError(f"low_rank = {rank} is more than the {min(w.shape)} that a weight {w.shape} has")
    left, singular, right = np.linalg.svd(np.asarray(w, np.float64).T, full_matrices=False)
    root = np.sqrt(singular[:rank])
    return left[:, :rank] * root, root[:, None] * right[:rank]


def prune_weight(w: np.ndarray, pattern: Pattern, statistics: Statistics | None = None) -> np.ndarray:
    """The baseline that prunes weights instead: of each output's inputs the largest |w|, or |w| rms (Wanda), stay.

    Args:
      w: [I, O].
      pattern: along I.
      statistics: of the layer's inputs, for Wanda (arXiv 2306.11695).
    """
    score = np.abs(np.asarray(w, np.float32)).T
    score = score if statistics is None else score * statistics.rms.astype(np.float32)
    return np.where(np.asarray(select(jnp.asarray(score), pattern)).T, w, 0)


def _needed(statistics: Statistics | None, name: str) -> Statistics:
    if statistics is None:
        raise ValueError(f"{name} needs statistics of the layer's inputs: calibrate on some text first")
    return statistics
