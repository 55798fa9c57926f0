"""What grouped expert kernels take, by a law read off balanced measurements.

A grouped FFN over local experts with ``n_e`` tokens each takes

    t(n) = g(T) + sum_e w(n_e),    w(0) = 0

where ``w`` is what one expert adds (weight read, tiles, arithmetic) and ``g`` what is paid for the ``T``
tokens of the group whatever the experts: sorting, launches, passes over all rows. Both are read off balanced
measurements: at one number of tokens per expert, ``m = T K / E``, the time is a straight line in the number
of experts on the rank, ``t = g + A w(m)``; rows of several expert-parallel sizes give both. Skewed vectors
follow.

Shapes: ``e`` local experts, any leading axes before them; ``n`` measured rows, ``m`` their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from moeplan.costs.interpolation import line
from moeplan.costs.number_formats import WEIGHT_BYTES
from moeplan.costs.tables import kernel_names

__all__ = ["ExpertCosts", "expert_weight_bytes", "fit_experts", "kernel_fits"]

Floats = NDArray[np.float64]

_POISSON_MAX = 64  # expected tokens from which the count's scatter no longer matters
_ENOUGH = 8  # rows that tell an error


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCosts:
    """``g`` and ``w`` of one model on one device; see the module.

    ``pairs_m`` are tokens per expert, rising; ``weight_m`` seconds that one expert with so many adds;
    ``shared_m`` seconds of ``g`` at that mean number per expert; ``misses_2n`` tokens per expert of the measured rows
    and by how much the law misses each, relative.
    """

    pairs_m: Floats
    weight_m: Floats
    shared_m: Floats
    relative_error: float
    source: str
    extrapolated: bool = False
    misses_2n: Floats = field(default_factory=lambda: np.zeros((2, 0)))

    def error_around(self, mean_pairs: float) -> float:
        """What nine of ten rows with a quarter to four times this load are missed by; of all where so few are."""
        load_n, miss_n = self.misses_2n
        near = (load_n >= mean_pairs / 4) & (load_n <= mean_pairs * 4)
        return float(np.quantile(miss_n[near], 0.9)) if near.sum() >= _ENOUGH else self.relative_error

    def one_expert_s(self, pairs: ArrayLike) -> Floats:
        """``w``: linear in tokens beyond the largest measured number, constant below one."""
        n = np.asarray(pairs, float)
        inner = line(self.pairs_m, self.weight_m, np.clip(n, self.pairs_m[0], self.pairs_m[-1]))
        beyond = np.maximum(n / self.pairs_m[-1], 1.0)
        return np.where(n > 0, inner * beyond, 0.0)

    def expected_s(self, mean_pairs: ArrayLike) -> Floats:
        """``w`` averaged over Poisson arrivals with this mean: an expert with few tokens is often not hit."""
        mean = np.asarray(mean_pairs, float)
        grid, table = _poisson_table(self)
        return np.where(mean < _POISSON_MAX, np.interp(mean, grid, table), self.one_expert_s(mean))

    def shared_s(self, mean_pairs: float) -> float:
        """``g`` where the group's mean number of tokens per expert is ``mean_pairs``."""
        x = float(np.clip(mean_pairs, self.pairs_m[0], self.pairs_m[-1]))
        return float(np.interp(x, self.pairs_m, self.shared_m)) * max(1.0, mean_pairs / float(self.pairs_m[-1]))

    def rank_s(self, pairs_e: ArrayLike, mean_pairs: float, expected: bool = False) -> Floats:
        """Seconds of ranks whose experts get ``pairs_e`` [..., e] tokens; ``expected``: these are means."""
        each = self.expected_s(pairs_e) if expected else self.one_expert_s(pairs_e)
        total: Floats = self.shared_s(mean_pairs) + each.sum(-1)
        return total

    def times(self, factor: float) -> ExpertCosts:
        """``factor`` times as slow."""
        return replace(self, weight_m=self.weight_m * factor, shared_m=self.shared_m * factor)

    def of_shape(self, weights: float, hidden: float) -> ExpertCosts:
        """Of experts with ``weights`` times the weights and ``hidden`` times as wide tokens: of what is shared, that of
        the smallest group is launches and stays."""
        shared_m = self.shared_m[0] + hidden * (self.shared_m - self.shared_m[0])
        return replace(self, weight_m=self.weight_m * weights, shared_m=shared_m)

    def linear(self, mean_pairs: float) -> tuple[float, float, float]:
        """(fixed, per active expert, per pair) seconds around ``mean_pairs`` tokens per expert.

        The secant of ``w`` over half to twice the mean, taken over counts of at least one; none negative.
        """
        low, high = max(1.0, mean_pairs / 2), max(2.0, mean_pairs * 2)
        w_low, w_high = self.one_expert_s([low, high])
        slope = max(0.0, float(w_high - w_low) / (high - low))
        start = float(w_low) - slope * low
        if start < 0:
            slope, start = float(w_low + w_high) / (low + high), 0.0
        return self.shared_s(mean_pairs), start, slope


@lru_cache(maxsize=64)
def _poisson_table(costs: ExpertCosts) -> tuple[Floats, Floats]:
    mean = np.concatenate([np.linspace(0, 4, 65)[:-1], np.linspace(4, _POISSON_MAX, 121)])
    counts = np.arange(1, 4 * _POISSON_MAX)
    log_factorial = np.cumsum(np.log(counts))
    with np.errstate(divide="ignore"):
        log_p = counts * np.log(mean)[:, None] - mean[:, None] - log_factorial
    return mean, np.exp(log_p) @ costs.one_expert_s(counts)


def _intercept(active: Floats, seconds: Floats, least_s: float) -> float:
    """Where a straight line over ``active`` that rises by ``least_s`` or more begins, by least relative squares; nan
    where one number cannot tell."""
    if np.ptp(active) == 0:
        return float("nan")
    design = np.stack([1 / seconds, active / seconds], 1)
    start, slope = np.linalg.lstsq(design, np.ones(len(active)), rcond=None)[0]
    if slope < least_s:
        start = ((1 - least_s * active / seconds) / seconds).sum() / (seconds**-2.0).sum()
    return float(start)


def _rising(values: Floats) -> Floats:
    """The nearest values that never fall, in logs (isotonic regression)."""
    rising: Floats = np.exp(isotonic_regression(np.log(values)).x)
    return rising


def fit_experts(
    pairs_n: Floats, active_n: Floats, seconds_n: Floats, source: str, weight_s: float
) -> ExpertCosts | None:
    """``g`` and ``w`` from balanced rows: pairs and active experts of the measured rank, and its seconds.

    ``g`` first: the intercepts of all sizes brought into rising order, each counting by how short its times are; one
    below zero balances one too high. Then ``w`` at every size, of what ``g`` leaves. None where the rows do not tell:
    fewer than three sizes.

    ``weight_s``: what memory takes to give an expert's weights. ``w`` is no less, but where measured times are: a few
    experts hide behind a launch, or lie in a cache, and what they seem to add stands for no rank of many.
    """
    sizes, size_n = np.unique(np.round(pairs_n / active_n, 6), return_inverse=True)
    of_size = [size_n == i for i in range(len(sizes))]
    least = np.array([min(weight_s, (seconds_n[rows] / active_n[rows]).min()) for rows in of_size])
    intercepts = np.array(
        [_intercept(active_n[rows], seconds_n[rows], low) for rows, low in zip(of_size, least, strict=True)]
    )
    told = np.isfinite(intercepts)
    shared = np.full(len(sizes), seconds_n.min() / 2)  # one number of experts only: no less than the fastest launch
    if told.any():
        typical = np.array([np.median(seconds_n[rows]) for rows in of_size])
        rising = isotonic_regression(intercepts[told], weights=typical[told] ** -2.0).x
        shared = np.interp(sizes, sizes[told], np.maximum(rising, 0.0))
    left, each = 1 - shared[size_n] / seconds_n, active_n / seconds_n
    weight = np.array([(each[rows] * left[rows]).sum() / (each[rows] ** 2).sum() for rows in of_size])
    weight = np.maximum(weight, least)
    good = weight > 0
    if good.sum() < 3:
        return None
    sizes, shared, weight = sizes[good], shared[good], _rising(weight[good])
    draft = ExpertCosts(sizes, weight, shared, 0.0, source)
    mean = pairs_n / active_n
    predicted = np.array([draft.shared_s(m) for m in mean]) + active_n * draft.one_expert_s(mean)
    miss = np.abs(predicted / seconds_n - 1)
    return replace(draft, relative_error=float(np.quantile(miss, 0.9)), misses_2n=np.stack([mean, miss]))


def expert_weight_bytes(row: Mapping[str, Any]) -> float:
    """Bytes of an expert's weights on one of the ``tp`` ranks that split it, of a row of the table of experts."""
    matrices = 2 if "nongated" in row["kernel"] else 3
    return float(matrices * row["hidden"] * row["inter"] / row["tp"] * WEIGHT_BYTES.get(row["dtype"], 0.0))


def kernel_fits(rows: pa.Table, memory_bandwidth: float) -> dict[str, ExpertCosts]:
    """The law of each kernel that balanced rows of one shape and number format tell, by :func:`kernel_names`."""
    names = kernel_names(rows)
    found = {
        name: _fit_rows(name, rows.filter(pa.array([n == name for n in names])), memory_bandwidth)
        for name in sorted(set(names))
    }
    return {name: fit for name, fit in found.items() if fit is not None}


def _fit_rows(name: str, rows: pa.Table, memory_bandwidth: float) -> ExpertCosts | None:
    # Without expert parallelism kernels take another path (no masked rows): only when there is no other.
    ep, active = rows["ep"].to_numpy(), rows["active_experts"].to_numpy().astype(float)
    use = (active > 0) & ((ep > 1) if (ep > 1).sum() >= 6 else (ep > 0))
    if use.sum() < 6:
        return None
    pairs, seconds = rows["rank_pairs"].to_numpy().astype(float), rows["latency_us"].to_numpy() * 1e-6
    read = expert_weight_bytes(rows.slice(0, 1).to_pylist()[0])
    return fit_experts(pairs[use], active[use], seconds[use], name, read / memory_bandwidth)
