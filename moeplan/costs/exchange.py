"""Seconds of dispatch and combine from the copies that a placement really sends.

A measured exchange of ``b`` tokens per rank with choices falling evenly takes ``T_balanced(b)``; its fixed
part ``t0`` is the intercept of a line through the small sizes. On a real traffic matrix

    T = t0 + alpha (T_balanced - t0),    alpha = max over ends of max(sent, received) / balanced mean

Two paths run at once and the slower counts: between nodes (NICs) and inside a node (scale-up links). What one
copy means depends on the dispatch kind: per (token, expert), per (token, rank) or per (token, node).

``N`` nodes, ``R`` ranks, ``K`` top-k, ``b`` tokens per rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside
from moeplan.specs.workload import DispatchKind, Phase

__all__ = [
    "MODES",
    "NVLINK_MODES",
    "ExchangeCosts",
    "PathCosts",
    "balanced_copies",
    "exchange_costs",
    "mode_of",
    "touched",
    "touched_share",
]

Floats = NDArray[np.float64]

_TABLE_ERROR = 0.15  # two published measurements of one exchange differ by about this
_NEAREST_ERROR = 0.3

NVLINK_MODES = ("nvlink_one_sided", "nvlink_two_sided")
FLAT = "flat"  # what `moeplan profile collectives` measures: one copy per (token, expert)
MODES: dict[str, tuple[str, ...]] = {
    "low_latency": ("low_latency", FLAT),
    "normal": ("normal", FLAT),
    "nvlink": (*NVLINK_MODES, "normal", FLAT),
}


def mode_of(dispatch: DispatchKind, phase: Phase) -> str:
    """Kernels of a dispatch kind: low latency sends per expert, normal per node, NVLink ones per rank."""
    if dispatch == "per_rank":
        return "nvlink"
    return "low_latency" if dispatch == "per_expert" and phase == "decode" else "normal"


def touched(places: int, top_k: int) -> float:
    """Distinct places among ``n`` that ``K`` even choices touch: n (1 - (1 - 1/n)^K)."""
    return places * (1 - (1 - 1 / places) ** top_k)


def touched_share(part: Floats, top_k: int) -> Floats:
    """Share of tokens that touch a place which gets ``part`` of all independent choices: 1 - (1 - p)^K."""
    share: Floats = -np.expm1(top_k * np.log1p(-np.minimum(part, 1 - 1e-12)))
    return share


def balanced_copies(dispatch: DispatchKind, top_k: int, num_ranks: int, num_nodes: int) -> tuple[float, float]:
    """(copies into other nodes, copies into other ranks) per token when choices fall evenly.

    ``per_node`` copies are passed on inside the node, one for each rank touched.
    """
    foreign_nodes = touched(num_nodes, top_k) * (1 - 1 / num_nodes)
    foreign_ranks = touched(num_ranks, top_k) * (1 - 1 / num_ranks)
    if dispatch == "per_expert":
        return top_k * (1 - 1 / num_nodes), top_k * (1 - 1 / num_ranks)
    if dispatch == "per_rank":
        return touched(num_ranks, top_k) * (1 - 1 / num_nodes), foreign_ranks
    return foreign_nodes, foreign_ranks


@dataclass(frozen=True, slots=True, eq=False)
class PathCosts:
    """One path: seconds of dispatch and combine together at balanced ``tokens_b`` per rank, fixed part ``t0``."""

    tokens_b: Floats
    seconds_b: Floats
    fixed_s: float
    copies_per_token: float
    source: str
    relative_error: float
    extrapolated: bool

    def balanced_s(self, tokens_per_rank: float) -> float:
        """``T_balanced``; linear in tokens beyond the largest measured number."""
        inner = float(np.interp(tokens_per_rank, self.tokens_b, self.seconds_b))
        beyond = max(1.0, tokens_per_rank / float(self.tokens_b[-1]))
        return self.fixed_s + max(0.0, inner - self.fixed_s) * beyond

    def per_copy_s(self, tokens_per_rank: float) -> float:
        """Seconds per token of a rank's batch and copy, beyond the fixed part; 0 where nothing is sent."""
        if self.copies_per_token == 0:
            return 0.0
        return (self.balanced_s(tokens_per_rank) - self.fixed_s) / (tokens_per_rank * self.copies_per_token)

    def time_s(self, tokens_per_rank: float, alpha: Any) -> Any:
        """``t0 + alpha (T_balanced - t0)``; ``alpha`` may be an array."""
        return self.fixed_s + alpha * (self.balanced_s(tokens_per_rank) - self.fixed_s)


@dataclass(frozen=True, slots=True)
class ExchangeCosts:
    """Both paths of an exchange; ``between`` is None on one node."""

    dispatch: DispatchKind
    between: PathCosts | None
    inside: PathCosts

    def time_s(self, tokens_per_rank: float, node_copies: Any, rank_copies: Any) -> Any:
        """Seconds of dispatch and combine.

        ``node_copies``: copies into or out of the busiest node, times nodes over all tokens;
        ``rank_copies``: into or out of the busiest rank, times ranks over all tokens. Evenly spread
        choices give :func:`balanced_copies`.
        """
        path = self.inside
        inner = path.time_s(tokens_per_rank, rank_copies / path.copies_per_token)
        if self.between is None:
            return inner
        path = self.between
        return np.maximum(inner, path.time_s(tokens_per_rank, node_copies / path.copies_per_token))


def _intercept(tokens: Floats, seconds: Floats) -> float:
    """``t0``: least relative squares over the smaller half of the sizes, within 0 and the smallest time."""
    half = max(3, len(tokens) // 2)
    weight = 1 / seconds[:half]
    design = np.stack([weight, tokens[:half] * weight], 1)
    return float(np.clip(np.linalg.lstsq(design, np.ones(len(weight)), rcond=None)[0][0], 0, seconds.min()))


@dataclass(frozen=True, slots=True, eq=False)
class _Curve:
    """One measured phase: seconds by tokens per rank, at which nodes and ranks, and bytes wanted over measured."""

    tokens: Floats
    seconds: Floats
    nodes: int
    ranks: int
    bytes_factor: float
    source: str
    names: dict[str, str]


def _nearest(rows: pa.Table, wanted: dict[str, int]) -> NDArray[np.int64]:
    """Rows nearest to the wanted column values, by the sum of log distances."""
    apart = np.zeros(rows.num_rows)
    for column, value in wanted.items():
        apart += np.abs(np.log(rows[column].to_numpy() / value))
    return np.flatnonzero(apart <= apart.min() + 1e-9)


def _measured(
    profile: HardwareProfile, mode: str, phase: str, model: ModelSpec, nodes: int, ranks: int, dtype: str, **only: Any
) -> _Curve | None:
    """The nearest measured exchange: on one node where there is one, over several where there are several; of a kernel
    measured in several types the one in ``dtype``, or else in that of most nearly its bytes."""
    for name in MODES[mode]:
        rows = profile.select(
            "alltoall", mode=name, phase=phase, dtype=[*DTYPE_BYTES, "nvfp4"], distribution="balanced", **only
        )
        if name.startswith("nvlink"):
            place = {"ranks": ranks}
        else:
            place = {"nodes": nodes} | ({"ranks": ranks} if name == FLAT else {})
            rows = rows.filter(pc.greater(rows["nodes"], 1) if nodes > 1 else pc.equal(rows["nodes"], 1))
        if not rows.num_rows:
            continue
        rows = rows.take(_nearest(rows, place))
        shape = {"hidden": model.hidden_size, "top_k": model.top_k, "num_experts": model.num_experts}
        rows = rows.take(_nearest(rows, shape))
        names = zip(rows["source"].to_pylist(), rows["kernel"].to_pylist(), rows["sms"].to_pylist(), strict=True)
        keys = [f"{source} ({kernel}{f', {sms} SMs' if sms else ''})" for source, kernel, sms in names]
        best: _Curve | None = None
        for key in sorted(set(keys)):
            part = rows.filter(pa.array([k == key for k in keys])).sort_by("tokens_per_rank")
            types = sorted(set(part["dtype"].to_pylist()))
            nearest = min(types, key=lambda name: (name != dtype, abs(np.log(_width(name) / _width(dtype)))))
            part = part.filter(pc.equal(part["dtype"], nearest))
            tokens = part["tokens_per_rank"].to_numpy().astype(float)
            first = np.unique(tokens, return_index=True)[1]
            seconds = part["latency_us"].to_numpy()[first] * 1e-6
            size = part["hidden"][0].as_py() * part["top_k"][0].as_py()
            factor = model.hidden_size * model.top_k / size
            at = part["nodes"][0].as_py(), part["ranks"][0].as_py()
            library = {c: part[c][0].as_py() for c in ("backend", "kernel", "dtype", "mode")}
            curve = _Curve(tokens[first], seconds, *at, factor, key, library)
            # Of several numbers of SMs and versions the one with most bandwidth at its largest size.
            if len(first) >= 3 and (best is None or seconds[-1] / tokens[-1] < best.seconds[-1] / best.tokens[-1]):
                best = curve
        if best is not None:
            return best
    return None


def _width(name: str) -> float:
    return DTYPE_BYTES[_wire_type(name)]


def _wire_type(name: str) -> Dtype:
    """The type that a name of the tables sends in."""
    return "fp4" if name == "nvfp4" else name  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _pair(
    profile: HardwareProfile, mode: str, model: ModelSpec, nodes: int, ranks: int, activation: Dtype
) -> list[_Curve] | None:
    """Dispatch and combine of one library, the dispatch brought to the wire's type; None where one is missing."""
    out = _measured(profile, mode, "dispatch", model, nodes, ranks, "nvfp4" if activation == "fp4" else activation)
    if out is None:
        return None
    library = {name: out.names[name] for name in ("backend", "kernel")}
    back = _measured(profile, mode, "combine", model, nodes, ranks, out.names["dtype"], **library)
    if back is None:
        return None
    measured = _wire_type(out.names["dtype"])

    def sent_in(curve: _Curve, dtype: Dtype) -> _Curve:
        wire = roofline.token_bytes(model.hidden_size, dtype) / roofline.token_bytes(model.hidden_size, measured)
        return replace(curve, bytes_factor=curve.bytes_factor * wire)

    if out.names["mode"] == FLAT:  # measured in one type both ways; tokens come back in 16 bits or more
        back = sent_in(back, activations_beside(activation))
    return [sent_in(out, activation), back]


def _table_path(found: list[_Curve], copies: float, exact: bool) -> PathCosts:
    """Dispatch and combine together on the sizes both cover; an exchange takes what the measured one of its bytes does.

    That is checked on TensorRT-LLM's two-sided kernels, measured in three types: from a narrower type this misses by
    less than scaling the time beyond the fixed part, from a wider one by as much (a little more below 64 tokens).
    """
    sizes = [curve.tokens / curve.bytes_factor for curve in found]
    tokens = np.unique(np.concatenate(sizes))
    tokens = tokens[(tokens >= max(size[0] for size in sizes)) & (tokens <= min(size[-1] for size in sizes))]
    fixed = sum(_intercept(curve.tokens, curve.seconds) for curve in found)
    seconds = np.sum([np.interp(tokens, size, curve.seconds) for size, curve in zip(sizes, found, strict=True)], 0)
    exact = exact and all(abs(curve.bytes_factor - 1) < 1e-9 for curve in found)
    kind = "measured" if exact else "modelled from the nearest"
    source = f"{kind}: {found[0].source} dispatch, {found[1].source} combine, {found[0].ranks} ranks"
    seconds = np.maximum.accumulate(np.maximum(seconds, fixed))
    error = _TABLE_ERROR if exact else _NEAREST_ERROR
    return PathCosts(tokens, seconds, fixed, copies, source, error, not exact)


def exchange_costs(
    model: ModelSpec,
    cluster: ClusterSpec,
    dispatch: DispatchKind,
    phase: Phase,
    activation_dtype: Dtype,
    one_way: bool = False,
    profile: HardwareProfile | None = None,
) -> ExchangeCosts:
    """Costs of dispatch and combine on ``cluster``; ``one_way``: tokens stay where they are computed.

    Tables serve where they know the mode of this dispatch kind; the roofline elsewhere. An all-gather moves
    every token to every rank, whatever is chosen.
    """
    out = roofline.token_bytes(model.hidden_size, activation_dtype)
    wire = out if one_way else out + roofline.returned_bytes(model.hidden_size, activation_dtype)
    mode, passes = mode_of(dispatch, phase), 1 if one_way else 2
    usable = profile is not None and not one_way and dispatch != "allgather"
    joined = cluster.topology in ("flat", "nvl72") or cluster.num_nodes == 1
    sheet = f"roofline of {cluster.accelerator.name}"

    def path(between: bool, nodes: int, ranks: int, copy_s: float, latency_s: float) -> PathCosts:
        def copies(num_ranks: int, num_nodes: int, kind: DispatchKind = dispatch) -> float:
            if kind == "allgather":
                return float(num_nodes - 1 if between else num_ranks - 1)
            both = balanced_copies(kind, model.top_k, num_ranks, num_nodes)
            return both[0] if between else both[1]

        # Tables were measured on the machine's own network: links given one by one are another.
        covered = usable and not (between and cluster.topology == "explicit")
        found = _pair(profile, mode, model, nodes, ranks, activation_dtype) if profile and covered else None
        if found is not None:
            at = found[0]
            if at.names["mode"] == FLAT:
                same = (at.nodes, at.ranks) == (nodes, ranks)
                return _table_path(found, copies(at.ranks, at.nodes, "per_expert"), same)
            same = at.nodes == nodes if mode != "nvlink" else at.ranks == ranks
            return _table_path(found, copies(at.ranks, at.nodes), same)
        tokens, here = np.geomspace(1, 2.0**17, 18), max(copies(ranks, nodes), 1e-9)
        seconds = latency_s + tokens * here * copy_s
        return PathCosts(tokens, seconds, latency_s, here, sheet, roofline.RELATIVE_ERROR, True)

    up = wire / cluster.accelerator.scale_up_bandwidth
    local = cluster.num_ranks if joined else cluster.ranks_per_node
    inside = path(False, 1, local, up, passes * cluster.scale_up_latency)
    if joined:
        return ExchangeCosts(dispatch, None, inside)
    across = wire * cluster.ranks_per_node / roofline.internode_bandwidth(cluster)
    between = path(True, cluster.num_nodes, cluster.num_ranks, across, passes * cluster.nic_latency)
    return ExchangeCosts(dispatch, between, inside)
