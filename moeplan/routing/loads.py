"""From tokens to loads; traces in parts. ``W`` windows, ``T`` tokens, ``L`` layers, ``E`` experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import TraceError

__all__ = [
    "count_selections",
    "expert_load",
    "pick_layers",
    "pick_tokens",
    "split_trace",
    "stream_load",
    "without_stretches",
]

MAX_RANKS = 2**16


def count_selections(experts_TLK: NDArray[np.integer[Any]], num_experts: int) -> NDArray[np.int64]:
    """Selections of each expert in each layer; ``-1`` is not counted."""
    counts_LE = np.empty((experts_TLK.shape[1], num_experts), np.int64)
    for layer in range(len(counts_LE)):
        ids = experts_TLK[:, layer].reshape(-1)
        if np.issubdtype(ids.dtype, np.signedinteger):
            ids = ids[ids >= 0]
        counts_LE[layer] = np.bincount(ids, minlength=num_experts)
    return counts_LE


def _window_of_tokens(trace: RoutingTrace, windows: str) -> tuple[NDArray[np.integer[Any]], tuple[str, ...]]:
    """Window number of each token and the names of the windows."""
    tokens = trace.num_tokens
    if windows == "all":
        return np.zeros(tokens, np.int64), ("all",)
    if windows == "domain":
        if trace.domain_T is None:
            raise TraceError("windows (domain) need a trace with domains, it has none; use 'all' or 'time:4'")
        return trace.domain_T, trace.domains
    if windows == "phase":
        if trace.phase_T is None:
            raise TraceError("windows (phase) need a trace with phases, it has none; use 'all' or 'time:4'")
        return trace.phase_T, PHASES
    kind, _, number = windows.partition(":")
    if kind != "time" or not number.isdigit() or not 1 <= int(number) <= tokens:
        raise TraceError(
            f"windows ({windows}) must be 'all', 'domain', 'phase' or 'time:N', N up to the tokens ({tokens})"
        )
    names = tuple(f"time {i + 1}/{number}" for i in range(int(number)))
    return np.arange(tokens) * int(number) // tokens, names


def expert_load(trace: RoutingTrace | ExpertLoad, windows: str = "all") -> ExpertLoad:
    """Selections per window, layer and expert; keeps the trace. An :class:`ExpertLoad` is returned as is.

    ``windows``: ``all`` (one), ``domain``, ``phase``, or ``time:N`` (N stretches of equally many tokens,
    in the order recorded). Domains and phases without tokens are left out.

    Raises:
        TraceError: the trace has no domains or phases, ``windows`` is none of these, or a source rank is absurd.
    """
    if isinstance(trace, ExpertLoad):
        return trace
    window_T, names = _window_of_tokens(trace, windows)
    present = np.flatnonzero(np.bincount(window_T, minlength=len(names)))
    E = trace.num_experts

    def tokens(window: np.integer[Any]) -> NDArray[np.integer[Any]]:
        return trace.experts_TLK if len(present) == 1 else trace.experts_TLK[window_T == window]

    load_WLE = np.stack([count_selections(tokens(w), E) for w in present]).astype(np.float64)
    source_SLE = None
    if trace.source_rank_T is not None:
        highest = int(trace.source_rank_T.max())
        if highest >= MAX_RANKS or int(trace.source_rank_T.min()) < 0:
            raise TraceError(f"source_rank goes up to {highest}; ranks must lie within 0..{MAX_RANKS - 1}")
        ranks = range(highest + 1)
        parts = [count_selections(trace.experts_TLK[trace.source_rank_T == rank], E) for rank in ranks]
        source_SLE = np.stack(parts).astype(np.float64)
    return ExpertLoad(
        load_WLE=load_WLE,
        windows=tuple(names[w] for w in present),
        layer_ids=trace.layer_ids,
        top_k=trace.top_k,
        trace=trace,
        window_T=np.searchsorted(present, window_T),
        source_SLE=source_SLE,
        origin=trace.origin,
    )


def without_stretches(load: ExpertLoad, count: int) -> Iterator[ExpertLoad]:
    """The load ``count`` times, each without one stretch: every window is cut into ``count`` stretches of equally many
    tokens, in the order recorded, and the first time lacks all windows' first ones. Each is made when it is asked for:
    its tokens are copied.

    Raises:
        TraceError: the load has no tokens, or a window fewer than ``count``.
    """
    trace, window_T, windows = load.trace, load.window_T, len(load.windows)
    if trace is None or window_T is None or np.bincount(window_T, minlength=windows).min() < count:
        raise TraceError(f"windows of fewer than {count} tokens cannot be cut into {count} stretches; record more")
    stretch_T = np.empty(trace.num_tokens, np.int64)
    for w in range(windows):
        own = np.flatnonzero(window_T == w)
        stretch_T[own] = np.arange(len(own)) * count // len(own)

    def without(stretch: int) -> ExpertLoad:
        kept = np.flatnonzero(stretch_T != stretch)
        part, kept_T = trace.tokens(kept), window_T[kept]
        loads = [count_selections(part.experts_TLK[kept_T == w], part.num_experts) for w in range(windows)]
        return replace(load, load_WLE=np.stack(loads).astype(np.float64), trace=part, window_T=kept_T)

    return map(without, range(count))


def stream_load(batches: Iterable[RoutingTrace]) -> ExpertLoad:
    """The load of a trace that comes in batches, one window per domain (or one for all); keeps no tokens.

    Raises:
        TraceError: there is no batch, or batches differ in layers, top-k or number of experts.
    """
    totals: dict[str, NDArray[np.int64]] = {}
    first: RoutingTrace | None = None
    for batch in batches:
        first = first or batch
        mine, other = ((b.layer_ids, b.num_experts, b.top_k) for b in (first, batch))
        if mine != other:
            raise TraceError(f"batches of one trace differ in layers, experts or top-k: {mine} and {other}")
        by_domain = expert_load(batch, "all" if batch.domain_T is None else "domain")
        for name, counts_LE in zip(by_domain.windows, by_domain.load_WLE.astype(np.int64), strict=True):
            totals[name] = totals[name] + counts_LE if name in totals else counts_LE
    if first is None:
        raise TraceError("the trace holds no tokens")
    return ExpertLoad(
        load_WLE=np.stack(list(totals.values())).astype(np.float64),
        windows=tuple(totals),
        layer_ids=first.layer_ids,
        top_k=first.top_k,
        origin=first.origin,
    )


def pick_layers(load: ExpertLoad, rows: list[int], layer_ids: tuple[int, ...] | None = None) -> ExpertLoad:
    """The layers at ``rows``, in that order, numbered as before or ``layer_ids``; transitions only where all stay."""
    ids = tuple(load.layer_ids[row] for row in rows) if layer_ids is None else layer_ids
    trace, whole = load.trace, rows == list(range(load.num_layers))
    if trace is not None:
        trace = replace(trace, experts_TLK=trace.experts_TLK[:, rows], layer_ids=ids, scores_TLK=None)
    return replace(
        load,
        load_WLE=load.load_WLE[:, rows],
        layer_ids=ids,
        trace=trace,
        source_SLE=None if load.source_SLE is None else load.source_SLE[:, rows],
        transitions_LEE=load.transitions_LEE if whole else None,
    )


def pick_tokens(trace: RoutingTrace, keep_T: NDArray[np.bool_]) -> RoutingTrace:
    """The tokens where ``keep_T``, in order; sequences shrink to the tokens that stay."""
    part = trace.tokens(np.flatnonzero(keep_T))
    if trace.seq_lens_S is None:
        return part
    starts_S = np.concatenate(([0], np.cumsum(trace.seq_lens_S)[:-1]))
    seq_lens_S = np.add.reduceat(keep_T, starts_S, dtype=np.int64)
    return replace(part, seq_lens_S=seq_lens_S[seq_lens_S > 0])


def split_trace(trace: RoutingTrace, fraction: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
    """First part and rest, for planning and for holding out.

    Each domain and phase is cut for itself, so that both parts hold all of them in like shares; where
    sequences are known at the boundary nearest to ``fraction`` (a single sequence is cut inside).

    Raises:
        TraceError: ``fraction`` is not between 0 and 1, or the trace has fewer than two tokens.
    """
    tokens = trace.num_tokens
    if not 0 < fraction < 1:
        raise TraceError(f"fraction ({fraction}) must lie between 0 and 1")
    if tokens < 2:
        raise TraceError(f"a trace of {tokens} token cannot be split; record more")
    seq_lens_S = trace.seq_lens_S if trace.seq_lens_S is not None else np.ones(tokens, np.int64)
    start_S = np.concatenate(([0], np.cumsum(seq_lens_S)[:-1]))
    group_S = np.zeros(len(seq_lens_S), np.int64)
    for index_T, count in ((trace.domain_T, len(trace.domains)), (trace.phase_T, len(PHASES))):
        if index_T is not None:
            group_S = group_S * count + index_T[start_S]
    first_T = np.zeros(tokens, bool)
    for group in np.unique(group_S):
        members = np.flatnonzero(group_S == group)
        ends = np.cumsum(seq_lens_S[members])
        if len(members) == 1:
            cut = round(fraction * int(ends[0]))
            first_T[start_S[members[0]] : start_S[members[0]] + cut] = True
            continue
        taken = 1 + int(np.abs(ends[:-1] - fraction * ends[-1]).argmin())
        for s in members[:taken]:
            first_T[start_S[s] : start_S[s] + seq_lens_S[s]] = True
    if first_T.all() or not first_T.any():
        first_T[:] = np.arange(tokens) < max(1, min(tokens - 1, round(fraction * tokens)))
    return pick_tokens(trace, first_T), pick_tokens(trace, ~first_T)
