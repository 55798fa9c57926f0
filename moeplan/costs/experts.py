"""Seconds of the routed experts of one layer on one rank: which kernel serves, and how its law is brought there.

:mod:`moeplan.costs.expert_law` tells each kernel's time from the vector of tokens per local expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.dense import Direction
from moeplan.costs.expert_law import ExpertCosts, kernel_fits
from moeplan.costs.frameworks import require_backend
from moeplan.costs.number_formats import table_dtypes
from moeplan.costs.tables import TableCosts, kernel_names
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.workload import Phase

__all__ = ["expert_costs", "of_phase"]

Floats = NDArray[np.float64]


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
    covering = [kernel for kernel in own if kernel.covers(mean_pairs, ep)]
    fitting = [kernel for kernel in covering if local_experts <= kernel.held] or covering
    if not fitting:  # beyond all loads the one that was measured at the largest goes on
        grouped = [kernel for kernel in own if kernel.ep[0] <= ep <= kernel.ep[1]]
        most = max((kernel.fit.pairs_m[-1] for kernel in grouped), default=0.0)
        fitting = [kernel for kernel in grouped if kernel.fit.pairs_m[-1] >= 0.99 * most]
    fitting = fitting or [kernel for kernel in own if ep <= 1 or kernel.ep[1] > 1] or own

    def rank_s(kernel: _Kernel) -> float:
        law = kernel.costs.shared_s(mean_pairs * arriving) + local_experts * float(kernel.costs.expected_s(mean_pairs))
        return law * kernel.over_law(*at)[0]

    best = min(fitting, key=rank_s)
    factor, error = best.over_law(*at)
    costs = best.costs.times(factor)
    if costs.extrapolated:
        return costs
    # Where rows near the load happen to lie on the law, it is not surer than elsewhere, nor than the rows are.
    error = max(best.fit.error_around(mean_pairs), min(error, best.fit.relative_error))
    costs = replace(costs, relative_error=error)
    if best.covers(mean_pairs, ep) and local_experts <= best.held:
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
    known: dict[tuple[float, ...], tuple[float, float]] = field(default_factory=dict)

    def covers(self, mean_pairs: float, ep: float) -> bool:
        """Whether so many tokens per expert in a group of ``ep`` ranks lie among what was measured; an expert with less
        than one token is one that is often not hit."""
        return mean_pairs <= self.fit.pairs_m[-1] * (1 + 1e-6) and self.ep[0] <= ep <= self.ep[1]

    def over_law(self, experts: int, top_k: int, tokens: float, ep: float) -> tuple[float, float]:
        """What an evenly loaded rank of a group takes as measured, over what the law says, and by what that may be off;
        1 and 0 without such rows.

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
            found = measured.seconds(tokens, ep)
            ratio = found.total / float(law(np.array([[tokens, ep]]))[0])
            self.known[asked] = ratio, found.relative_error if measured.measured else 0.0
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
