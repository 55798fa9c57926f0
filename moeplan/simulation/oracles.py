"""What the engine is held against: :func:`token_by_token` keeps the same rules without its short cuts, walking every
sequence in every step; :class:`PlainCosts` makes steps whose seconds are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.costs.kv_cache import SwapCosts
from moeplan.costs.passes import Batch, StepSeconds
from moeplan.simulation.acceptance import Acceptance
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.serving import EngineSpec

__all__ = ["PlainCosts", "token_by_token"]

Floats = NDArray[np.float64]


class PlainCosts:
    """Steps of ``base_s`` and ``per_token_s`` for each token of the fullest group, whatever the model, and ``draft_s``
    beside; caches go to the host and back over PCIe."""

    def __init__(self, cluster: ClusterSpec, base_s: float, per_token_s: float, draft_s: float = 0.0) -> None:
        self.cluster, self.groups = cluster, cluster.num_ranks
        self.base_s, self.per_token_s, self.draft_s = base_s, per_token_s, draft_s
        self.source: dict[str, str] = {}
        self.extrapolated: set[str] = set()
        self.part_errors: dict[str, float] = {}
        self._swaps = {to_host: SwapCosts(cluster, to_host) for to_host in (True, False)}

    def chunk_s(self, before: int, new: int) -> Floats:
        """Nothing: prompts cost as their tokens do."""
        return np.zeros(4)

    def swap_s(self, size_bytes: float, to_host: bool) -> float:
        """At the bandwidth of PCIe."""
        return self._swaps[to_host].seconds(size_bytes)

    def step(self, batch: Batch, placement: Placement, load_LE: Floats) -> StepSeconds:
        """The same on every rank."""
        total_s = self.base_s + self.per_token_s * float(batch.tokens_D.max()) + self.draft_s
        drafts = StepSeconds(self.draft_s, 0.0, np.full(self.groups, self.draft_s)) if self.draft_s else None
        return StepSeconds(total_s, 0.0, np.full(self.groups, total_s), drafts=drafts)

    def forget(self, placement: Placement) -> None:
        """Nothing to forget."""


@dataclass(slots=True)
class _Sequence:
    number: int
    input: int
    output: int
    arrival_ns: int
    left: int = 0  # to prefill
    cached: int = 0
    generated: int = 0
    blocks: int = 0
    coming: list[int] = field(default_factory=list)  # tokens of the steps to come, once it decodes
    first_ns: int = -1
    finish_ns: int = -1


@dataclass(slots=True)
class _Group:
    free: int
    waiting: list[_Sequence] = field(default_factory=list)
    running: list[_Sequence] = field(default_factory=list)  # in the order they were admitted


def token_by_token(
    requests: Sequence[tuple[int, int, int]],
    engine: EngineSpec,
    groups: int,
    capacity_blocks: int,
    step_ns: Callable[[list[int]], int],
    acceptance: Acceptance | None = None,
) -> list[tuple[int, int]]:
    """(first token, finish) of each request ``(arrival_ns, input, output)``; request q is served by group q mod D.

    Chunked prefill and preemption by recomputation; ``step_ns`` takes the tokens of each group.
    """
    every = [_Sequence(q, i, o, at) for q, (at, i, o) in enumerate(requests)]
    state = [_Group(capacity_blocks) for _ in range(groups)]
    coming = sorted(every, key=lambda s: (s.arrival_ns, s.number))
    now = 0
    while any(s.finish_ns < 0 for s in every):
        while coming and coming[0].arrival_ns <= now:
            sequence = coming.pop(0)
            state[sequence.number % groups].waiting.append(sequence)
        work = [_work_of(group, engine) for group in state]
        tokens = [sum(count for _, count in each) for each in work]
        if not any(tokens):
            now = coming[0].arrival_ns
            continue
        now += step_ns(tokens)
        for group, each in zip(state, work, strict=True):
            for sequence, count in each:
                _advance(group, sequence, count, now, acceptance)
    return [(s.first_ns, s.finish_ns) for s in every]


def _work_of(group: _Group, engine: EngineSpec) -> list[tuple[_Sequence, int]]:
    """What a group does in the next step: each decoding sequence one token and its drafts, then prompts as far as they
    fit."""
    block = engine.block_tokens
    for sequence in list(group.running):
        if sequence.left or sequence not in group.running:
            continue
        needed = -(-(sequence.cached + sequence.coming[0]) // block) - sequence.blocks
        while group.free < needed and sequence in group.running:
            newest = group.running.pop()
            group.free += newest.blocks
            newest.blocks = newest.cached = newest.left = 0
            group.waiting.insert(0, newest)
        if sequence in group.running:
            group.free -= needed
            sequence.blocks += needed
    work = [(s, engine.tokens_per_sequence) for s in group.running if not s.left]
    budget = engine.max_num_batched_tokens - sum(count for _, count in work)
    for sequence in group.running:
        if sequence.left and budget > 0:
            work.append((sequence, min(budget, sequence.left)))
            budget -= work[-1][1]
    while group.waiting and budget > 0 and len(group.running) < engine.max_num_seqs:
        sequence = group.waiting[0]
        needed = -(-(sequence.input + sequence.generated) // block)
        if needed > group.free:
            break
        group.waiting.pop(0)
        group.running.append(sequence)
        group.free -= needed
        sequence.blocks, sequence.left = needed, sequence.input + sequence.generated
        work.append((sequence, min(budget, sequence.left)))
        budget -= work[-1][1]
    return work


def _advance(group: _Group, sequence: _Sequence, count: int, now: int, acceptance: Acceptance | None) -> None:
    taken = 1
    if sequence.left:
        sequence.cached += count
        sequence.left -= count
        if sequence.left:
            return
        if sequence.first_ns < 0:
            sequence.first_ns = now
        left = sequence.output - sequence.generated - 1
        sequence.coming = [1] * left
        if acceptance is not None and left:
            sequence.coming = np.diff(acceptance.tokens_after(sequence.number, sequence.generated + 1, left)).tolist()
    else:
        taken = sequence.coming.pop(0)
        sequence.cached += taken
    sequence.generated += taken
    if sequence.generated == sequence.output:
        sequence.finish_ns = now
        group.running.remove(sequence)
        group.free += sequence.blocks
