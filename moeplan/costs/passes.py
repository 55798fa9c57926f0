"""A step of a serving engine as its costs see it: what every group does in it, and the passes that it runs one after
another.

``R`` ranks, ``D`` attention data-parallel groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.event_log import EventLog
from moeplan.specs.workload import Phase

__all__ = ["Batch", "Pass", "StepSeconds", "joined", "no_chunks", "passes_of"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What every group does in one step. ``chunk_s_D4``: prefill attention of a layer, the sum of
    :meth:`moeplan.costs.serving.ServingCosts.chunk_s` over its chunks; -1 first where it has none.

    ``decodes_D`` sequences with ``cached_D`` tokens in the cache together; ``tokens_D`` of prefill and decode, drafts
    to check among them.
    """

    decodes_D: Floats
    cached_D: Floats
    chunk_s_D4: Floats
    tokens_D: Floats
    has_prefill: bool


@dataclass(frozen=True, slots=True, eq=False)
class StepSeconds:
    """``total_s``; ``exposed_s`` of it is exchange that nothing hides.

    ``busy_R``: seconds in which each rank computes; ``log``: what happened inside, where that was played; ``drafts``:
    the part of it that the prediction layer takes, where there are any.
    """

    total_s: float
    exposed_s: float
    busy_R: Floats
    log: EventLog | None = None
    drafts: StepSeconds | None = None

    def of_stage(self, stages: int, last: bool) -> StepSeconds:
        """What one of so many pipeline stages takes of a step that all layers would take on its ranks: its even part
        of them, and all that is drafted where it is the ``last``, as SGLang and vLLM place the prediction layer."""
        if stages == 1:
            return self
        total_s, exposed_s, busy_R = self.total_s / stages, self.exposed_s / stages, self.busy_R / stages
        if (drafts := self.drafts) is not None:
            more = (stages - 1 if last else -1) / stages  # of the drafts, of which an even part is among them
            total_s, exposed_s = total_s + more * drafts.total_s, exposed_s + more * drafts.exposed_s
            busy_R = busy_R + more * drafts.busy_R
        return StepSeconds(total_s, exposed_s, busy_R, self.log)


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What runs ``times`` in a step: ``batch``, ``queries`` tokens of each decoding sequence, through all layers of the
    model, or ``drafting`` through the prediction layer."""

    times: int
    batch: Batch
    queries: int
    drafting: bool = False

    @property
    def phase(self) -> Phase:
        """Whose kernels and dispatch it takes."""
        return "prefill" if self.batch.has_prefill else "decode"


def no_chunks(groups: int) -> Floats:
    """:attr:`Batch.chunk_s_D4` of a step without prompts."""
    chunk_s_D4 = np.zeros((groups, 4))
    chunk_s_D4[:, 0] = -1.0
    return chunk_s_D4


def joined(passes: Sequence[Pass], found: Sequence[StepSeconds]) -> StepSeconds:
    """The seconds of a step from those of its passes."""
    if len(found) == 1:
        return found[0]
    often = [(each.times, one) for each, one in zip(passes, found, strict=True)]
    drafting = [pair for each, pair in zip(passes, often, strict=True) if each.drafting]
    return replace(_together(often), drafts=_together(drafting) if drafting else None)


def _together(often: Sequence[tuple[int, StepSeconds]]) -> StepSeconds:
    """So many of each, one after another."""
    total_s = sum(times * one.total_s for times, one in often)
    exposed_s = sum(times * one.exposed_s for times, one in often)
    busy_R = np.sum([times * one.busy_R for times, one in often], 0)
    return StepSeconds(total_s, exposed_s, busy_R)


def passes_of(batch: Batch, drafts: int) -> tuple[Pass, ...]:
    """What a step with so many ``drafts`` of each decoding sequence runs."""
    found = [Pass(1, batch, 1 + drafts)]
    if drafts:
        found.append(Pass(1, batch, 1 + drafts, drafting=True))
    if drafts > 1 and batch.decodes_D.any():
        alone = Batch(batch.decodes_D, batch.cached_D, no_chunks(len(batch.decodes_D)), batch.decodes_D, False)
        found.append(Pass(drafts - 1, alone, 1, drafting=True))
    return tuple(found)
