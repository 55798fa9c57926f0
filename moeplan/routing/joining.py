"""Several traces of one model as one: files of ranks, tasks of a file, batches of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError

__all__ = ["join_traces"]


def join_traces(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace after the other. An optional array stays where every trace has it; domains match by name.

    Raises:
        TraceError: the traces differ in layers, top-k or number of experts.
    """
    first = traces[0]
    if len(traces) == 1:
        return first
    for number, trace in enumerate(traces[1:], start=1):
        for what in ("layer_ids", "top_k", "num_experts"):
            mine, other = getattr(first, what), getattr(trace, what)
            if mine != other:
                raise TraceError(f"cannot join traces: {what} of part {number} ({other}) is not part 0's ({mine})")

    def join(name: str) -> NDArray[Any] | None:
        arrays = [getattr(trace, name) for trace in traces]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    domains = tuple(dict.fromkeys(name for trace in traces for name in trace.domains))
    domain_T = None
    if domains and all(trace.domain_T is not None for trace in traces):
        number_of = [np.array([domains.index(name) for name in trace.domains], np.int32) for trace in traces]
        domain_T = np.concatenate([n[trace.domain_T] for n, trace in zip(number_of, traces, strict=True)])
    return RoutingTrace(
        experts_TLK=np.concatenate([trace.experts_TLK for trace in traces]),
        num_experts=first.num_experts,
        layer_ids=first.layer_ids,
        scores_TLK=join("scores_TLK"),
        seq_lens_S=join("seq_lens_S"),
        phase_T=join("phase_T"),
        source_rank_T=join("source_rank_T"),
        domain_T=domain_T,
        domains=domains if domain_T is not None else (),
        dropped_padding=sum(trace.dropped_padding for trace in traces),
        origin=first.origin,
    )
