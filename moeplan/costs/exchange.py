"""Seconds of dispatch and combine from the copies that a placement really sends.

A measured exchange of ``b`` tokens per rank with choices falling evenly takes ``T_balanced(b)``; its fixed
part ``t0`` is the intercept of a line through the small sizes. On a real traffic matrix

    T = t0 + alpha (T_balanced - t0),    alpha = max over ends of max(sent, received) / balanced mean

Two paths run at once and the slower counts: between nodes (NICs) and inside a node (scale-up links). What one
copy means depends on the dispatch kind: per (token, expert), per (token, rank) or per (token, node).

``N`` nodes, ``R`` ranks, ``K`` top-k, ``b`` tokens per rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.exchange_tables import FLAT, Copies, curve_error, dispatch_and_combine
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import Dtype, ModelSpec
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

NVLINK_MODES = ("nvlink_one_sided", "nvlink_two_sided")
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


def _sent(dispatch: DispatchKind, between: bool) -> Copies:
    """Copies per token into other nodes, or into other ranks, at (top-k, ranks, nodes)."""

    def copies(top_k: int, num_ranks: int, num_nodes: int) -> float:
        if dispatch == "allgather":
            return float(num_nodes - 1 if between else num_ranks - 1)
        return balanced_copies(dispatch, top_k, num_ranks, num_nodes)[0 if between else 1]

    return copies


def _table_path(
    profile: HardwareProfile,
    mode: str,
    dispatch: DispatchKind,
    model: ModelSpec,
    between: bool,
    nodes: int,
    ranks: int,
    activation: Dtype,
) -> PathCosts | None:
    """Dispatch and combine together on the sizes both cover; an exchange takes what the measured one of its bytes does.
    None where none is measured.

    That is checked on TensorRT-LLM's two-sided kernels, measured in three types: from a narrower type this misses by
    less than scaling the time beyond the fixed part, from a wider one by as much (a little more below 64 tokens).
    """
    found = dispatch_and_combine(profile, MODES[mode], model, nodes, ranks, activation)
    if found is None:
        return None
    out = found[0]
    sent = _sent("per_expert" if out.mode == FLAT else dispatch, between)
    places = ((out.nodes, nodes), (out.ranks, ranks))
    here = all(a == b for a, b in {FLAT: places, "nvlink": places[1:]}.get(out.mode.split("_")[0], places[:1]))
    exact = here and all(abs(curve.bytes_factor - 1) < 1e-9 for curve in found)
    phases = zip(found, ("dispatch", "combine"), strict=True)
    error = max(curve_error(profile, curve, phase, here, sent) for curve, phase in phases)

    sizes = [curve.tokens / curve.bytes_factor for curve in found]
    tokens = np.unique(np.concatenate(sizes))
    tokens = tokens[(tokens >= max(size[0] for size in sizes)) & (tokens <= min(size[-1] for size in sizes))]
    fixed = sum(curve.fixed_s for curve in found)
    seconds = np.sum([np.interp(tokens, size, curve.seconds) for size, curve in zip(sizes, found, strict=True)], 0)
    kind = "measured" if exact else "modelled from the nearest"
    source = f"{kind}: {found[0].name} dispatch, {found[1].name} combine, {out.ranks} ranks"
    seconds = np.maximum.accumulate(np.maximum(seconds, fixed))
    return PathCosts(tokens, seconds, fixed, sent(model.top_k, *out.place[::-1]), source, error, not exact)


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
    usable = not one_way and dispatch != "allgather"
    joined = cluster.topology in ("flat", "nvl72") or cluster.num_nodes == 1
    sheet = f"roofline of {cluster.accelerator.name}"

    def path(between: bool, nodes: int, ranks: int, copy_s: float, latency_s: float) -> PathCosts:
        # Tables were measured on the machine's own network: links given one by one are another.
        if profile is not None and usable and not (between and cluster.topology == "explicit"):
            found = _table_path(profile, mode, dispatch, model, between, nodes, ranks, activation_dtype)
            if found is not None:
                return found
        tokens, here = np.geomspace(1, 2.0**17, 18), max(_sent(dispatch, between)(model.top_k, ranks, nodes), 1e-9)
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
