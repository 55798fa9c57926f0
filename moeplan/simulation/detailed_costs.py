"""Step costs of a service whose every step is played event by event: :mod:`moeplan.simulation.detailed`.

For small services: a step of L layers on R ranks is some 10 L R events and 2 L exchanges of up to R^2 transfers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.placement import Placement
from moeplan.costs.passes import Batch, Pass, StepSeconds, joined
from moeplan.costs.serving import ServingCosts
from moeplan.simulation.detailed import play_step
from moeplan.simulation.instance import Instance
from moeplan.simulation.network import Network

__all__ = ["SAMPLED_LAYERS", "DetailedCosts", "first_layers"]

Floats = NDArray[np.float64]
SAMPLED_LAYERS = 3


class DetailedCosts:
    """:class:`moeplan.costs.serving.ServingCosts` with the seconds of steps that were played."""

    def __init__(self, costs: ServingCosts) -> None:
        self._costs, self._network = costs, Network(costs.cluster)
        self.groups, self.cluster = costs.groups, costs.cluster
        self.source, self.extrapolated, self.part_errors = costs.source, costs.extrapolated, costs.part_errors
        self.chunk_s, self.swap_s = costs.chunk_s, costs.swap_s
        self.forget, self.clear = costs.forget, costs.clear
        self._off = costs

    def moved(self, ends: Mapping[str, float]) -> DetailedCosts:
        """The same costs where parts of them are off (:meth:`moeplan.costs.serving.ServingCosts.moved`): what is played
        is longer as the step mode's seconds are."""
        other = copy(self)
        other._off = self._costs.moved(ends)
        return other

    def step(self, batch: Batch, placement: Placement, load_LE: Floats) -> StepSeconds:
        """Play one step."""
        passes = self._costs.passes(batch)
        played = [self._played(each, placement, load_LE) for each in passes]
        return replace(joined(passes, played), log=_all_events(passes, played, len(load_LE)))

    def _played(self, each: Pass, placement: Placement, load_LE: Floats) -> StepSeconds:
        """One pass, once."""
        whole = self._costs.pass_seconds(each, placement, load_LE)
        model, batches, other_s_R, home_R = self._costs.batches(each, placement, load_LE)
        found = play_step(
            model, batches, other_s_R, self._network, home_R=home_R, overlap=self._costs.technique.overlap
        )
        alone_s = whole.total_s - whole.exposed_s
        exposed_s = max(0.0, found.total_s - alone_s)
        busy_R = np.minimum(found.busy_s_R, found.total_s - exposed_s)  # attention beside experts counts once
        if self._off is self._costs:
            return StepSeconds(found.total_s, exposed_s, busy_R, found.log)
        off = self._off.pass_seconds(each, placement, load_LE)
        exposed_s *= off.exposed_s / whole.exposed_s if whole.exposed_s else 1.0
        busy_R = busy_R * (off.busy_R / np.where(whole.busy_R, whole.busy_R, 1.0))
        total_s = found.total_s * off.total_s / whole.total_s
        return StepSeconds(total_s, exposed_s, busy_R, found.log)


def _all_events(passes: Sequence[Pass], played: Sequence[StepSeconds], layers: int) -> EventLog:
    """The events of passes one after another; the prediction layer is the one after the model's ``layers``."""
    start_s, logs = 0.0, []
    for each, found in zip(passes, played, strict=True):
        assert found.log is not None  # played
        for _ in range(each.times):
            logs.append(found.log.part_of_run(start_s, layers=[layers] if each.drafting else None))
            start_s += found.total_s
    return reduce(EventLog.joined, logs)


def first_layers(instance: Instance) -> EventLog | None:
    """What ranks did in the first MoE layers of a step of a run whose steps were not played; None where there is none.

    The step is the one of :attr:`Instance.sample`; ``origin`` names it.
    """
    sample = instance.sample
    if sample is None or not isinstance(sample.costs, ServingCosts):
        return None
    first = sample.costs.passes(sample.batch)[0]
    model, batches, other_s_R, home_R = sample.costs.batches(first, sample.placement, sample.load_LE)
    few = tuple(
        replace(
            parts,
            expert_s_LR=parts.expert_s_LR[:SAMPLED_LAYERS],
            exchange_s_L=parts.exchange_s_L[:SAMPLED_LAYERS],
            pairs_LR=parts.pairs_LR[:SAMPLED_LAYERS],
        )
        for parts in batches
    )
    found = play_step(
        model, few, 0 * other_s_R, Network(model.cluster), home_R=home_R, overlap=sample.costs.technique.overlap
    )
    return found.log.part_of_run(sample.start_s, rank=instance.first_rank, step=sample.number)
