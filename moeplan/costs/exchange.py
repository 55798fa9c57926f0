"""Seconds of dispatch and combine from the copies that a placement really sends.

A measured exchange of ``b`` tokens per rank with choices falling evenly takes ``T_balanced(b)``; its fixed
part ``t0`` is the intercept of a line through the small sizes. On a real traffic matrix

    T = t0 + alpha (T_balanced - t0),    alpha = max over ends of max(sent, received) / balanced mean

Two paths run at once and the slower counts: between nodes (NICs) and inside a node (scale-up links). What one
copy means depends on the dispatch kind: per (token, expert), per (token, rank) or per (token, node).

``N`` nodes, ``R`` ranks, ``K`` top-k, ``b`` tokens per rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.exchange_tables import (
    FLAT,
    LIKE_MACHINES,
    TWO_LEVEL,
    UNKNOWN,
    Copies,
    Curve,
    curve_error,
    dispatch_and_combine,
)
from moeplan.costs.technique import reduces_in_place
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.workload import DispatchKind, Phase

__all__ = [
    "MODES",
    "NVLINK_MODES",
    "ExchangeCosts",
    "PathCosts",
    "balanced_copies",
    "engine_dispatch",
    "exchange_costs",
    "mode_of",
    "touched",
    "touched_share",
]

Floats = NDArray[np.float64]

NVLINK_MODES = ("nvlink_one_sided", "nvlink_two_sided")
_SENDS: dict[str, DispatchKind] = {
    "low_latency": "per_expert",
    "normal": "per_node",
    FLAT: "per_expert",
    TWO_LEVEL: "per_node",
    **dict.fromkeys(NVLINK_MODES, "per_rank"),
}
"""What the kernels of a mode send one copy per."""
MODES: dict[str, tuple[str, ...]] = {
    "low_latency": ("low_latency", FLAT),
    "normal": (TWO_LEVEL, "normal", FLAT),
    FLAT: (FLAT, "normal"),
    "nvlink": (*NVLINK_MODES, "normal", FLAT),
}


def mode_of(dispatch: DispatchKind, phase: Phase) -> str:
    """Kernels of a dispatch kind: low latency and plain all-to-alls send per expert, normal per node, NVLink ones per
    rank."""
    if dispatch == "per_rank":
        return "nvlink"
    if dispatch == "per_expert":
        return "low_latency" if phase == "decode" else FLAT
    return "normal"


def engine_dispatch(dispatch: DispatchKind, phase: Phase) -> DispatchKind:
    """What an engine sends a copy per: one whose decode sends per expert, in DeepEP's low-latency mode, prefills in the
    normal mode, which merges copies per node (DeepEP's README, usage in model training or inference prefilling)."""
    return "per_node" if (dispatch, phase) == ("per_expert", "prefill") else dispatch


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
    if dispatch == "allgather":
        return num_nodes - 1.0, num_ranks - 1.0
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

    def told(self, tokens_per_rank: float) -> tuple[float, bool]:
        """(relative error, whether extrapolated) at that many tokens: beyond the largest measured, by the law."""
        if tokens_per_rank <= self.tokens_b[-1] * (1 + 1e-9):
            return self.relative_error, self.extrapolated
        return max(self.relative_error, roofline.RELATIVE_ERROR), True

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

        ``node_copies``: copies from or to other nodes over the busiest NIC, times NICs over all tokens;
        ``rank_copies``: into or out of the busiest rank, times ranks over all tokens. Evenly spread choices give
        :func:`balanced_copies`.
        """
        path = self.inside
        inner = path.time_s(tokens_per_rank, rank_copies / path.copies_per_token)
        if self.between is None:
            return inner
        path = self.between
        return np.maximum(inner, path.time_s(tokens_per_rank, node_copies / path.copies_per_token))


def _sent(dispatch: DispatchKind, between: bool) -> Copies:
    """Copies per token into other nodes, or into other ranks, at (top-k, ranks, nodes)."""
    return lambda top_k, ranks, nodes: balanced_copies(dispatch, top_k, ranks, nodes)[0 if between else 1]


@lru_cache(maxsize=64)
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
    """Dispatch and combine together on the sizes both cover; an exchange takes what the measured one of its bytes does,
    in proportion to copies where its kernel merges others than ``dispatch``. None where none is measured.

    Bytes are checked on TensorRT-LLM's two-sided kernels, measured in three types: from a narrower type this misses by
    less than scaling the time beyond the fixed part, from a wider one by as much (a little more below 64 tokens).
    """
    # NVLink ends where nodes are joined by NICs. Two levels of other numbers of ranks are another exchange.
    left_out = {*NVLINK_MODES} if between else set()
    if not profile.select("alltoall", mode=TWO_LEVEL, nodes=nodes, ranks=ranks).num_rows:
        left_out.add(TWO_LEVEL)
    modes = tuple(name for name in MODES[mode] if name not in left_out)
    nearest = dispatch_and_combine(profile, modes, model, nodes, ranks, activation)
    if nearest is None:
        return None
    sends = _SENDS[nearest[0].mode]
    copies = _sent(sends, between)

    def of_top_k(curve: Curve) -> Curve:
        more = copies(model.top_k, curve.ranks, curve.nodes) / copies(curve.top_k, curve.ranks, curve.nodes)
        return replace(curve, bytes_factor=curve.bytes_factor * more)

    found = [of_top_k(curve) for curve in nearest]
    out = found[0]
    here = out.ranks == ranks and (out.nodes == nodes or out.mode in NVLINK_MODES)
    asked, sent = _sent(dispatch, between)(model.top_k, ranks, nodes), copies(model.top_k, ranks, nodes)
    alike = abs(asked - sent) < 1e-9
    exact = here and alike and all(abs(curve.bytes_factor - 1) < 1e-9 for curve in found)
    phases = zip(found, ("dispatch", "combine"), strict=True)
    error = max(curve_error(profile, curve, phase, here, copies) for curve, phase in phases)
    error = error if alike else float(np.hypot(error, UNKNOWN))

    sizes = [curve.tokens / curve.bytes_factor for curve in found]
    tokens = np.unique(np.concatenate(sizes))
    tokens = tokens[(tokens >= max(size[0] for size in sizes)) & (tokens <= min(size[-1] for size in sizes))]
    fixed = sum(curve.fixed_s for curve in found)
    seconds = np.sum([np.interp(tokens, size, curve.seconds) for size, curve in zip(sizes, found, strict=True)], 0)
    kind = "measured" if exact else "modelled from the nearest"
    source = f"{kind}: {found[0].name} dispatch, {found[1].name} combine, {out.ranks} ranks"
    source += "" if alike else f", sent {sends.replace('_', ' ')}"
    seconds = np.maximum.accumulate(np.maximum(seconds, fixed))
    reference = copies(model.top_k, out.ranks, out.nodes)
    return PathCosts(tokens, seconds, fixed, reference, source, error, not exact)


def _collectives(cluster: ClusterSpec, links: CollectiveCosts, sizes: Mapping[str, float]) -> ExchangeCosts:
    """Collectives over all ranks, one after the other, each of so many bytes a token of one rank: at the numbers of
    tokens that are measured, or at all by their law where fewer than two are."""
    tokens, ranks = np.geomspace(1, 2.0**17, 35), cluster.num_ranks
    parts = [[links.seconds(op, ranks, n * size) for op, size in sizes.items()] for n in tokens.tolist()]
    inner = [n for n, part in enumerate(parts) if not any(each.extrapolated for each in part)]
    measured = len(inner) > 1
    rows = slice(inner[0], inner[-1] + 1) if measured else slice(None)
    every = [each for part in parts[rows] for each in part]
    source = "; ".join(dict.fromkeys(each.source for each in every))
    error = float(np.hypot(max(each.relative_error for each in every), LIKE_MACHINES))
    seconds = np.maximum.accumulate([sum(each.total for each in part) for part in parts[rows]])
    path = PathCosts(tokens[rows], seconds, float(seconds[0]), float(ranks - 1), source, error, not measured)
    between = None if roofline.is_joined(cluster) else replace(path, copies_per_token=float(cluster.num_nodes - 1))
    return ExchangeCosts("allgather", between, path)


def exchange_costs(
    model: ModelSpec,
    cluster: ClusterSpec,
    dispatch: DispatchKind,
    phase: Phase,
    activation_dtype: Dtype,
    one_way: bool = False,
    profile: HardwareProfile | None = None,
    tp: int = 1,
    backend: str | None = None,
) -> ExchangeCosts:
    """Costs of dispatch and combine on ``cluster``; ``one_way``: tokens stay where they are computed.

    Tables serve where they know the mode of this dispatch kind; the roofline elsewhere. An all-gather moves
    every token to every rank, whatever is chosen, by collectives, ``backend``'s before others. Where ``tp`` ranks, all
    there are, hold every token already, results are all-reduced
    (:func:`moeplan.costs.technique.reduces_in_place`). One rank sends nothing.

    Raises:
        InputError: the nodes are parts of several racks.
    """
    hidden, chip = model.routed_hidden_size, cluster.accelerator
    out, back = roofline.token_bytes(hidden, activation_dtype), roofline.returned_bytes(hidden, activation_dtype)
    wire, passes = (out, 1) if one_way else (out + back, 2)

    def path(between: bool, nodes: int, ranks: int, copy_s: float, latency_s: float) -> PathCosts:
        # Tables were measured on the machine's own network: links given one by one are another.
        if profile is not None and not one_way and not (between and cluster.topology == "explicit"):
            mode = mode_of(dispatch, phase)
            found = _table_path(profile, mode, dispatch, model, between, nodes, ranks, activation_dtype)
            if found is not None:
                return found
        copies = max(_sent(dispatch, between)(model.top_k, ranks, nodes), 1e-9)
        tokens = np.geomspace(1, 2.0**17, 18)
        seconds = latency_s + tokens * copies * copy_s
        return PathCosts(tokens, seconds, latency_s, copies, f"roofline of {chip.name}", roofline.RELATIVE_ERROR, True)

    if cluster.num_ranks == 1:
        nothing = PathCosts(np.array([1.0, np.inf]), np.zeros(2), 0.0, 1.0, "one rank", 0.0, False)
        return ExchangeCosts(dispatch, None, nothing)
    joined = roofline.is_joined(cluster)
    if dispatch == "allgather":
        every = cluster.num_ranks
        gathered = {"all_gather": every * out} | ({} if one_way else {"reduce_scatter": every * back})
        in_place = {"all_reduce": every * back}
        links = CollectiveCosts(cluster, profile, backend)
        return _collectives(cluster, links, in_place if reduces_in_place(dispatch, tp, cluster) else gathered)
    local = cluster.num_ranks if joined else cluster.ranks_per_node
    up = wire / roofline.scale_up_bandwidth(cluster, local)
    inside = path(False, 1, local, up, passes * cluster.scale_up_latency)
    if joined:
        return ExchangeCosts(dispatch, None, inside)
    across = wire * cluster.ranks_per_node / roofline.internode_bandwidth(cluster)
    between = path(True, cluster.num_nodes, cluster.num_ranks, across, passes * cluster.nic_latency)
    return ExchangeCosts(dispatch, between, inside)
