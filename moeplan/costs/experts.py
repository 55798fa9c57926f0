"""Seconds of the routed experts of one layer on one rank, from its vector of tokens per local expert.

A grouped FFN over local experts with ``n_e`` tokens each takes

    t(n) = g(T) + sum_e w(n_e),    w(0) = 0

where ``w`` is what one expert adds (weight read, tiles, arithmetic) and ``g`` what is paid for the ``T``
tokens of the group whatever the experts: sorting, launches, passes over all rows. Both are read off balanced
measurements: at one number of tokens per expert, ``m = T K / E``, the time is a straight line in the number
of experts on the rank, ``t = g + A w(m)``; rows of several expert-parallel sizes give both. Skewed vectors
follow.

Shapes: ``e`` local experts, any leading axes before them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.dense import Direction
from moeplan.costs.frameworks import require_backend
from moeplan.costs.interpolation import line
from moeplan.costs.number_formats import WEIGHT_BYTES, table_dtypes
from moeplan.costs.tables import TableCosts, kernel_names
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.workload import Phase

__all__ = ["ExpertCosts", "expert_costs", "fit_experts", "kernel_fits", "of_phase"]

Floats = NDArray[np.float64]

_POISSON_MAX = 64  # expected tokens from which the count's scatter no longer matters


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCosts:
    """``g`` and ``w`` of one model on one device; see the module.

    ``pairs_m`` are tokens per expert, rising; ``weight_m`` seconds that one expert with so many adds;
    ``shared_m`` seconds of ``g`` at that mean number per expert.
    """

    pairs_m: Floats
    weight_m: Floats
    shared_m: Floats
    relative_error: float
    source: str
    extrapolated: bool = False

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
    pairs_n: Floats, active_n: Floats, seconds_n: Floats, source: str, weight_s: float = 0.0
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
    error = float(np.quantile(np.abs(predicted / seconds_n - 1), 0.9))
    return ExpertCosts(sizes, weight, shared, error, source)


def kernel_fits(rows: pa.Table, memory_bandwidth: float = np.inf) -> dict[str, ExpertCosts]:
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
    hidden, inter, tp, dtype = (rows[column][0].as_py() for column in ("hidden", "inter", "tp", "dtype"))
    matrices = 2 if "nongated" in name else 3
    read = matrices * hidden * inter / tp * WEIGHT_BYTES.get(dtype, 0.0)
    return fit_experts(pairs[use], active[use], seconds[use], name, read / memory_bandwidth)


def _roofline(model: ModelSpec, accelerator: AcceleratorSpec, dtype: Dtype, tp: int) -> ExpertCosts:
    """Weights are read beside arithmetic on whole tiles: at least one, and half a tile too much for even remainders.

    Of 426 grouped products measured on H20 (alibaba/InferSim, bench_data) this says 0.85 of the time in the median,
    without tiles 0.65.
    """
    n = np.geomspace(1, 2.0**20, 61)
    rows = np.maximum(accelerator.tile_rows, n + accelerator.tile_rows / 2)
    read = roofline.expert_weight_s(model, accelerator, dtype) / tp
    pair = roofline.expert_pair_s(model, accelerator, dtype) / tp
    moved = 2 * (2 * model.routed_hidden_size + 3 * model.expert_intermediate_size / tp)
    stream = moved / (roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth)
    seconds = np.hypot(read, pair * rows) + stream * n
    source = f"roofline of {accelerator.name}"
    return ExpertCosts(n, seconds, np.zeros(len(n)), roofline.RELATIVE_ERROR, source, extrapolated=True)


# DeepEP's two modes bring tokens in different layouts, each to kernels of its own (``moeplan.profiling.aic``).
_DEEPEP = "deepepmoe"
_OTHER_PHASE: dict[Phase, str] = {"decode": "/context", "prefill": "/generation", "mix": "/generation"}


def of_phase(kernels: list[str], phase: Phase, sent: bool = True) -> list[str]:
    """Those that serve a phase, of tokens that are ``sent`` to their experts or are there already; all where none is
    made for it."""
    fitting = [name for name in kernels if sent or not name.startswith(_DEEPEP)] or kernels
    return [name for name in fitting if not name.endswith(_OTHER_PHASE[phase])] or fitting


def expert_costs(
    model: ModelSpec,
    accelerator: AcceleratorSpec,
    dtype: Dtype,
    profile: HardwareProfile | None = None,
    tp: int = 1,
    backend: str | None = None,
    mean_pairs: float = 64.0,
    local_experts: float = 8.0,
    arriving: float = 1.0,
    direction: Direction = "forward",
    phase: Phase = "prefill",
    sent: bool = True,
) -> ExpertCosts:
    """Costs of ``model``'s experts: measured where the profile has the shape, else scaled from the nearest
    measured shape (weights and arithmetic both grow with ``H F``), else by the roofline.

    Of several number formats of ``dtype`` one serves alone: the first of :func:`table_dtypes` that was measured at the
    shape, since tables hold a shape in the formats its models come in; the first at all where none was. Of several
    kernels of the ``phase``, and of tokens ``sent`` to their experts or not, the fastest serves, for a rank of
    ``local_experts`` with ``mean_pairs`` tokens each that gets the part ``arriving`` of the group's tokens, among those
    of ``backend`` where it is named and those measured around such a rank where there are any. The roofline is of a
    forward, whatever the ``direction``.

    Raises:
        UnknownNameError: no such ``backend``.
    """
    require_backend("backend", backend, profile)
    shape = (model.routed_hidden_size, model.expert_intermediate_size, model.gated_ffn)
    bandwidth = accelerator.memory_bandwidth
    kernels = _measured(profile, *shape, dtype, tp, backend, direction, bandwidth) if profile is not None else ()
    if not kernels:
        return _roofline(model, accelerator, dtype, tp)
    ep = model.num_experts / local_experts
    at = model.num_experts, model.top_k, mean_pairs * model.num_experts / model.top_k, ep
    names = of_phase([kernel.names["kernel"] for kernel in kernels], phase, sent)
    own = [kernel for kernel in kernels if kernel.names["kernel"] in names]
    # Without expert parallelism kernels take another path: what was timed so stands in where nothing else was.
    fitting = [kernel for kernel in own if kernel.covers(mean_pairs, ep, local_experts)]
    if not fitting:  # beyond all loads the one that was measured at the largest goes on
        grouped = [kernel for kernel in own if kernel.ep[0] <= ep <= kernel.ep[1]]
        most = max((kernel.fit.pairs_m[-1] for kernel in grouped), default=0.0)
        fitting = [kernel for kernel in grouped if kernel.fit.pairs_m[-1] >= 0.99 * most]
    fitting = fitting or [kernel for kernel in own if ep <= 1 or kernel.ep[1] > 1] or own

    def rank_s(kernel: _Kernel) -> float:
        law = kernel.costs.shared_s(mean_pairs * arriving) + local_experts * float(kernel.costs.expected_s(mean_pairs))
        return law * kernel.over_law(*at)

    best = min(fitting, key=rank_s)
    costs = best.costs.times(best.over_law(*at))
    if costs.extrapolated or best.covers(mean_pairs, ep, local_experts):
        return costs
    how = f"{costs.source.replace('measured', 'extrapolated', 1)}, from EP {best.ep[0]:g} to {best.ep[1]:g}"
    how += f" and {best.held:g} experts on a rank" if local_experts > best.held else ""
    off = roofline.RELATIVE_ERROR / (1 if ep > 1 >= best.ep[1] else 2)
    return replace(costs, relative_error=max(costs.relative_error, off), source=how, extrapolated=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Kernel:
    """A kernel measured at a shape: the law there, and brought to the shape asked for; its rows, the least and the
    most ranks of a group, and the most experts of a rank, that the law was read off."""

    fit: ExpertCosts
    costs: ExpertCosts
    profile: HardwareProfile
    names: dict[str, Any]
    ep: tuple[float, float] = (1.0, np.inf)
    held: float = np.inf
    known: dict[tuple[float, ...], float] = field(default_factory=dict)

    def covers(self, mean_pairs: float, ep: float, local_experts: float) -> bool:
        """Whether so many tokens per expert in a group of ``ep`` ranks lie among what was measured; an expert with less
        than one token is one that is often not hit."""
        within = mean_pairs <= self.fit.pairs_m[-1] * (1 + 1e-6) and local_experts <= self.held
        return within and self.ep[0] <= ep <= self.ep[1]

    def over_law(self, experts: int, top_k: int, tokens: float, ep: float) -> float:
        """What an evenly loaded rank of a group takes as measured, over what the law says; 1 without such rows.

        One law stands for all group sizes and is smooth between sizes; measured rows tell more
        (``benchmarks/step_laws.py``).
        """
        asked = (experts, top_k, tokens, ep)
        if asked not in self.known:
            names = {**self.names, "num_experts": experts, "top_k": top_k}

            def law(coords: Floats) -> Floats:
                pairs = coords[:, 0] * top_k
                active = np.minimum(experts, np.maximum(pairs, coords[:, 1])) / coords[:, 1]
                each = pairs / coords[:, 1] / active
                return np.array([self.fit.shared_s(m) for m in each]) + active * self.fit.one_expert_s(each)

            measured = TableCosts(self.profile, "experts", ("tokens", "ep"), names, law, "")
            self.known[asked] = measured.seconds(tokens, ep).total / float(law(np.array([[tokens, ep]]))[0])
        return self.known[asked]


@lru_cache(maxsize=64)
def _measured(
    profile: HardwareProfile,
    hidden: int,
    inter: int,
    gated: bool,
    dtype: Dtype,
    tp: int,
    backend: str | None,
    direction: Direction,
    memory_bandwidth: float,
) -> tuple[_Kernel, ...]:
    """Every kernel measured at this shape or the nearest."""
    where: dict[str, Any] = {"distribution": "balanced", "direction": direction, "scope": "experts"}
    where |= {"backend": backend} if backend else {}
    kinds = table_dtypes(dtype)
    for at in (where | {"hidden": hidden, "inter": inter, "tp": tp}, where):
        for kind in kinds:
            rows = profile.select("experts", **at, dtype=kind)
            format_note = "" if kind == dtype else f" in {kind}"
            if kernels := _kernels(profile, rows, hidden, inter, gated, tp, format_note, memory_bandwidth):
                return kernels
    return ()


def _kernels(
    profile: HardwareProfile,
    rows: pa.Table,
    hidden: int,
    inter: int,
    gated: bool,
    tp: int,
    kind: str,
    memory_bandwidth: float,
) -> tuple[_Kernel, ...]:
    """:func:`_measured` of rows in one number format, named ``kind`` in the source."""
    plain = pc.match_substring(rows["kernel"].cast("string"), "nongated")
    own = rows.filter(pc.invert(plain) if gated else plain)
    others = not gated and not own.num_rows
    rows = rows if others else own
    if not rows.num_rows:
        return ()
    shapes = np.stack([rows[c].to_numpy() for c in ("hidden", "inter", "tp")], 1)
    exact = (shapes == (hidden, inter, tp)).all(1)
    # Two matrices of three where the measured experts are gated and these are not.
    weights, wide, note = (2 / 3 if others else 1.0), 1.0, ""
    if not exact.any():
        cut = shapes[:, 1] / shapes[:, 2]
        distance = np.abs(np.log(shapes[:, 0] / hidden)) + np.abs(np.log(cut * tp / inter))
        exact = distance == distance.min()
        nearest = shapes[int(distance.argmin())]
        wide = hidden / float(nearest[0])
        weights *= wide * (inter / tp) / float(nearest[1] / nearest[2])
        note = f", scaled from {nearest[0]} x {nearest[1]} (tp {nearest[2]})"
    note += ", from gated experts" if others else ""

    def scaled(fit: ExpertCosts) -> ExpertCosts:
        error = fit.relative_error if not note else max(fit.relative_error, roofline.RELATIVE_ERROR / 2)
        how = "measured" if not note else "modelled"
        source = f"{how}: {fit.source}{kind}{note}"
        return replace(fit.of_shape(weights, wide), relative_error=error, source=source, extrapolated=bool(note))

    rows = rows.filter(pa.array(exact))
    columns = ("hidden", "inter", "tp", "dtype", "source", "kernel", "distribution", "direction", "scope")
    ranks, experts = rows["ep"].to_numpy(), rows["num_experts"].to_numpy()
    of: dict[str, list[int]] = {}
    for row, name in enumerate(kernel_names(rows)):
        of.setdefault(name, []).append(row)

    def kernel(name: str, fit: ExpertCosts) -> _Kernel:
        mine = of[name]
        names = {column: rows[column][mine[0]].as_py() for column in columns}
        ep = float(ranks[mine].min()), float(ranks[mine].max())
        return _Kernel(fit, scaled(fit), profile, names, ep, float((experts / ranks)[mine].max()))

    return tuple(kernel(name, fit) for name, fit in kernel_fits(rows, memory_bandwidth).items())
