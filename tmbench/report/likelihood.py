"""The means that bounded samples still allow: nonparametric likelihood with mass at the bounds, over strata.

A distribution on [-1, 1] is held against samples by how much less likely it makes them than their own frequencies do, over
all strata ``sum_k n_k KL(F_k || G_k)`` for the frequencies ``F_k`` and candidates ``G_k``. Candidates may put mass where no
sample fell, at the bounds: a loss too rare to have been seen is a candidate too. The lowest mean is the least
``sum_k w_k E[G_k]`` over all candidates within ``allowance``; the highest is that of the mirrored samples.

This is empirical likelihood (Owen 2001, Empirical Likelihood, chapter 2) with the ends of the scale in its support. Its dual
is the best wealth of constant bets against a mean (Waudby-Smith and Ramdas 2024, JRSSB 86, 1-27), and its cost the KL_inf of
Honda and Takemura (2010, COLT, 67-79). For each Lagrange multiplier ``t`` the best candidate has ``g_i = T_k f_i / (h_k +
x_i)`` with ``T_k = t n_k / w_k``; what is missing to 1 lies at -1, where ``h_k = 1``; its mean is ``T_k - h_k``. Newton's
method finds ``h`` and ``t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEPS, NEWTON_ALONE, TOLERANCE = 200, 8, 1e-11


@dataclass(frozen=True)
class Strata:
    """``E`` experiments of ``K`` strata each, as their values and how often each came, all of one shape ``[E, K, V]``."""

    values: Floats
    """From -1 to 1; 0 where the share is 0."""
    shares: Floats
    """Of the stratum's samples; 0 pads strata of fewer values."""
    evidence: Floats
    """``[E, K]``: how many samples a stratum counts for; 0 means that it tells nothing."""
    weights: Floats
    """``[K]``, of the strata's means."""

    @property
    def mirrored(self) -> Strata:
        """The same with the signs of all values changed."""
        return replace(self, values=-self.values)

    @property
    def means(self) -> Floats:
        """``[E, K]``: the strata's own means."""
        return _over(self.values * self.shares)


def tabled(experiments: Sequence[Sequence[Floats]]) -> tuple[Floats, Floats]:
    """Values and shares ``[E, K, V]`` of experiments of equally many strata each."""
    found = [[np.unique(stratum, return_counts=True) for stratum in strata] for strata in experiments]
    most = max(len(values) for strata in found for values, _ in strata)
    values = np.zeros((len(found), len(found[0]), most))
    shares = np.zeros_like(values)
    for e, strata in enumerate(found):
        for k, (own, counts) in enumerate(strata):
            values[e, k, : len(own)], shares[e, k, : len(own)] = own, counts / counts.sum()
    return values, shares


def lowest_means(strata: Strata, allowance: float) -> Floats:
    """``[E]``: the least weighted mean of which the samples are at most ``exp(allowance)`` times less likely."""
    means = strata.means
    telling = strata.evidence > 0
    at_bound = _over(strata.shares * (strata.values == -1))
    # A stratum without evidence may lie anywhere; one whose samples all lie at the bound can lie nowhere else.
    settled = np.where(telling, means, -1.0) @ strata.weights
    open_ = np.asarray((telling & (at_bound < 1)).any(axis=1))
    found: Floats = settled
    if open_.any():
        found[open_] = _search(_chosen(strata, open_), means[open_], at_bound[open_], telling[open_], allowance)
    return found


def _chosen(strata: Strata, rows: NDArray[np.bool_]) -> Strata:
    return replace(strata, values=strata.values[rows], shares=strata.shares[rows], evidence=strata.evidence[rows])


def _search(strata: Strata, means: Floats, at_bound: Floats, telling: NDArray[np.bool_], allowance: float) -> Floats:
    """The lowest means by the multiplier: Newton's method on the logarithms, which are nearly linear, within a bracket."""
    n, w = strata.evidence, strata.weights
    variances = _over(strata.shares * (strata.values - means[..., None]) ** 2)
    spread = (w * w * variances / np.maximum(n, 1)).sum(axis=1)
    least = -np.log((n / w).max(axis=1))
    # A normal approximation where samples spread, else as if the bound alone held the mass.
    at = np.maximum(0.5 * np.log(np.maximum(spread, 1e-300) / (2 * allowance)), least - 20)
    low, high = np.full(len(at), -60.0) + least, np.full(len(at), 60.0) + least
    best = np.empty(len(at))
    running = np.arange(len(at))
    for count in range(STEPS):
        part = replace(strata, values=strata.values[running], shares=strata.shares[running], evidence=n[running])
        cost, slope, mean = _tilted(part, at[running], means[running], at_bound[running], telling[running])
        best[running] = mean
        low[running] = np.where(cost > allowance, at[running], low[running])
        high[running] = np.where(cost > allowance, high[running], at[running])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step = at[running] + np.log(allowance / cost) * cost / slope
        middle = (low[running] + high[running]) / 2
        # The slope breaks where a stratum's mass reaches the bound; Newton's steps may alternate there: halve the bracket.
        newton = (low[running] < step) & (step < high[running]) & (count < NEWTON_ALONE or count % 2 == 1)
        step = np.where(newton, step, middle)
        done = (np.abs(cost - allowance) <= TOLERANCE * allowance) | (high[running] - low[running] < 1e-12)
        at[running] = step
        running = running[~done]
        if not len(running):
            break
    return best


def _tilted(
    strata: Strata, at: Floats, means: Floats, at_bound: Floats, telling: NDArray[np.bool_]
) -> tuple[Floats, Floats, Floats]:
    """``[E]`` each: the candidates' cost, its derivative by the multiplier's logarithm, and their weighted mean."""
    n, w, x, f = strata.evidence, strata.weights, strata.values, strata.shares
    scale = np.exp(at)[:, None] * np.where(telling, n, 1) / w
    # From below, where Newton's method on the concave 1 / sum(f / (h + x)) never passes the root.
    h = np.maximum(scale - means, 1 + scale * at_bound)
    for _ in range(STEPS):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(f > 0, f / (h[..., None] + x), 0)
            harmonic = 1 / _over(ratio)
            rise = _over(np.where(f > 0, ratio / (h[..., None] + x), 0)) * harmonic**2
        new = np.maximum(h + (scale - harmonic) / rise, 1)
        moving = np.abs(new - h) > 1e-13 * (1 + h)
        if not moving.any():
            break
        h = np.where(moving, new, h)
    bound = h <= 1
    cost = _over(f * np.log(np.where(f > 0, h[..., None] + x, 1))) - np.log(scale)
    slope = np.where(bound, -1, 1 / rise - 1)
    mean = np.where(telling, scale - h, -1.0)
    counted = np.where(telling, n, 0)
    return (counted * cost).sum(axis=1), (counted * slope).sum(axis=1), mean @ w


def _over(values: Floats) -> Floats:
    total: Floats = values.sum(axis=-1)
    return total
