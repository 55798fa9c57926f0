"""One batch of an engine instance, step by step: continuous batching over all its attention groups at once.

All groups step together. Decoding sequences are not touched one by one: a group counts them, sums their contexts,
and knows by a histogram which of them begin a new block at which step, and by a heap which finish when. A step costs
a few array operations over groups, and Python only for what begins, ends or is preempted.

A pipeline of ``pp`` stages holds ``pp`` lanes, each with its own sequences, a stage apart, and its even part of the
slots: SGLang's ``pp_max_micro_batch_size``, ``max_running_requests // pp_size``. Neither it nor vLLM spreads sequences
further: a batch that is formed takes what waits.

``D`` groups, ``B`` tokens of a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np

from moeplan.costs.passes import Batch
from moeplan.simulation.clock import Order
from moeplan.simulation.request import Request

if TYPE_CHECKING:
    from moeplan.simulation.instance import Instance

__all__ = ["Lane"]

_FAR = np.iinfo(np.int64).max


@dataclass(slots=True, eq=False)
class _Step:
    """A step under way. ``chunks``: request, its epoch, tokens prefilled. ``decoding_D``: groups that decode."""

    batch: Batch
    chunks: list[tuple[Request, int, int]]
    decoding_D: Any
    swap_s: float


class Lane:
    """Sequences that step together; see the module."""

    def __init__(self, instance: Instance) -> None:
        self.inst = instance
        D, block = instance.groups, instance.block
        self.decodes_D, self.cached_D = np.zeros(D), np.zeros(D)
        self.growth_DB = np.zeros((D, block), np.int64)
        self.step_D = np.zeros(D, np.int64)
        self.finish_D = np.full(D, _FAR)
        self._heaps: list[list[tuple[int, int, int, Request]]] = [[] for _ in range(D)]
        self.running: list[dict[int, Request]] = [{} for _ in range(D)]
        self.prefilling: list[list[Request]] = [[] for _ in range(D)]
        self.arriving: list[dict[int, Request]] = [{} for _ in range(D)]  # have a slot and room, their caches travel
        self.landed: list[deque[Request]] = [deque() for _ in range(D)]  # their caches are here
        self._fresh: dict[int, list[int]] = {}  # group -> last tokens of sequences that have not decoded since
        self._fresh_D = np.zeros(D)
        self._decoded_ns_D = np.zeros(D, np.int64)
        self._every_D = np.arange(D)
        self._width = instance.spec.tokens_per_sequence
        self.wake: Any = None
        self._slots = max(1, instance.spec.max_num_seqs // instance.spec.pp)  # of a group

    # ------------------------------------------------------------------ the process

    def run(self) -> Generator[Any, Any, None]:
        """Step while there is work; wait where there is none."""
        inst, clock = self.inst, self.inst.clock
        while True:
            now = int(clock.now)
            if now < inst.blocked_until_ns:
                yield clock.at(inst.blocked_until_ns, Order.START)
                continue
            if (stall_ns := inst.migrate_one_layer()) > 0:
                yield clock.at(now + stall_ns, Order.STEP)
                now = int(clock.now)
            if now < inst.stage_free_ns:
                yield clock.at(inst.stage_free_ns, Order.START)
                continue
            step = self._form()
            if step is None:
                inst.note_state()
                self.wake = clock.event()
                yield self.wake
                self.wake = None
                yield clock.at(int(clock.now), Order.START)
                continue
            duration_ns = inst.begin_step(self, step.batch, step.swap_s)
            yield clock.at(now + duration_ns, Order.STEP)
            self._complete(step)

    # ------------------------------------------------------------------ forming a step

    def _form(self) -> _Step | None:
        inst, spec = self.inst, self.inst.spec
        chunked = spec.chunked_prefill
        decoding_D = self.decodes_D > 0
        if chunked:
            self._grow(decoding_D)
            decoding_D = self.decodes_D > 0
        chunks: list[tuple[Request, int, int]] = []
        chunk_s_D4, prefill_D = inst.no_chunks_D4, inst.nothing_D
        swap_s = 0.0
        waiting, prefilling, landed = inst.waiting, self.prefilling, self.landed
        for d in [d for d in range(inst.groups) if waiting[d] or prefilling[d] or landed[d]]:
            found, seconds, swapped = self._prompts(d, chunked)
            swap_s = max(swap_s, swapped)
            if found:
                if not chunks:
                    chunk_s_D4, prefill_D = chunk_s_D4.copy(), prefill_D.copy()
                chunk_s_D4[d], prefill_D[d] = seconds, sum(tokens for _, _, tokens in found)
                chunks += found
        decoding_D = self.decodes_D > 0
        if not chunked:
            decoding_D &= prefill_D == 0
            self._grow(decoding_D)
            decoding_D &= self.decodes_D > 0
        decodes_D = np.where(decoding_D, self.decodes_D, 0.0)
        tokens_D = decodes_D * self._width + prefill_D
        if not tokens_D.any():
            return None
        cached_D = np.where(decoding_D, self.cached_D, 0.0)
        batch = Batch(decodes_D, cached_D, chunk_s_D4, tokens_D, bool(chunks))
        return _Step(batch, chunks, decoding_D, swap_s)

    def _grow(self, decoding_D: Any) -> None:
        """Room for the tokens of this step: new blocks where sequences begin one, else preempt the newest."""
        inst, place_D = self.inst, self._place(self.step_D)
        need_D = self.growth_DB[self._every_D, place_D] * decoding_D
        free_D = inst.free_D
        short_D = need_D > free_D
        if short_D.any():
            for d in np.flatnonzero(short_D).tolist():
                pool = inst.pools[d]
                while not pool.make_free(int(self.growth_DB[d, place_D[d]])) and self.running[d]:
                    self.preempt(next(reversed(self.running[d].values())))
                need_D[d] = self.growth_DB[d, place_D[d]]
        free_D -= need_D

    def _prompts(self, d: int, chunked: bool) -> tuple[list[tuple[Request, int, int]], Any, float]:
        """Chunks of group ``d`` in this step with seconds ``[4]`` of their attention; and seconds of caches brought
        back."""
        inst, spec, costs = self.inst, self.inst.spec, self.inst.costs
        running, waiting = self.running[d], inst.waiting[d]
        budget = spec.max_num_batched_tokens - (int(self.decodes_D[d]) * self._width if chunked else 0)
        chunks: list[tuple[Request, int, int]] = []
        seconds, swap_s = np.zeros(4), 0.0
        for request in self.prefilling[d]:
            if budget <= 0:
                break
            tokens = min(budget, request.to_prefill)
            seconds += costs.chunk_s(request.context - request.to_prefill, tokens)
            chunks.append((request, request.epoch, tokens))
            budget -= tokens
        while self.landed[d] and budget >= self._width:
            request = self.landed[d].popleft()
            running[request.number] = request
            inst.first_token(request)
            self._join(request, d)
            budget -= self._width
        arriving = self.arriving[d]
        while waiting and budget > 0 and len(running) + len(arriving) + len(self.landed[d]) < self._slots:
            request = waiting[0]
            if request.saved and request.kept is None and budget < self._width:
                break
            if not chunked and chunks and not request.saved and request.context > budget:
                break
            if not inst.admit(self, request, d):
                break
            waiting.popleft()
            if request.kept is not None:
                inst.hooks.fetch(request, self)
                continue
            if request.saved:
                swap_s += inst.swap_seconds(request.swap_tokens, to_host=False)
                request.swap_tokens = 0
                self._join(request, d)
                budget -= self._width
                continue
            self.prefilling[d].append(request)
            tokens = min(budget, request.to_prefill)
            seconds += costs.chunk_s(request.context - request.to_prefill, tokens)
            chunks.append((request, request.epoch, tokens))
            budget -= tokens
        return chunks, seconds, swap_s

    def _join(self, request: Request, d: int) -> None:
        """From the next step on the request decodes: its context is in the cache but for its newest token."""
        step, cached = int(self.step_D[d]), request.context - 1
        request.join_step, request.join_cached, request.saved = step, cached, 0
        self.decodes_D[d] += 1
        self.cached_D[d] += cached
        finish = step + self._enter(request, d)
        heappush(self._heaps[d], (finish, request.number, request.epoch, request))
        self.finish_D[d] = self._heaps[d][0][0]
        self._fresh.setdefault(d, []).append(request.last_token_ns)
        self._fresh_D[d] += 1

    def _leave(self, request: Request, d: int) -> int:
        """A decoding request stops; its tokens in the cache."""
        cached = request.join_cached + self._decoded(request, d)
        self.decodes_D[d] -= 1
        self.cached_D[d] -= cached
        self._withdraw(request, d)
        if int(self.step_D[d]) == request.join_step:  # has not decoded yet
            self._fresh[d].remove(request.last_token_ns)
            self._fresh_D[d] -= 1
        return cached

    # ------------------------------------------------------------------ tokens of a step

    def first_tokens(self, _request: Request) -> int:
        """Tokens that the first step of decoding brings a request."""
        return 1

    def _place(self, step: Any) -> Any:
        """Column of ``growth_DB`` that holds the blocks begun at a step."""
        return -step % self.inst.block

    def _taken_D(self, decoding_D: Any) -> Any:
        """Tokens that the step brings each group, which are then no longer to come."""
        return self.decodes_D * decoding_D

    def _decoded(self, request: Request, d: int) -> int:
        """Tokens of a decoding request since it joined."""
        return int(self.step_D[d]) - request.join_step

    def _enter(self, request: Request, d: int) -> int:
        """Note the blocks that a request will begin; steps to its last token."""
        self.growth_DB[d, (request.join_cached - request.join_step) % self.inst.block] += 1
        return request.output - request.generated

    def _withdraw(self, request: Request, d: int) -> None:
        """Take back what :meth:`_enter` noted and has not come yet."""
        self.growth_DB[d, (request.join_cached - request.join_step) % self.inst.block] -= 1

    # ------------------------------------------------------------------ preemption

    def preempt(self, request: Request) -> None:
        """Take a request's blocks away; it goes to the head of its queue."""
        inst, d = self.inst, request.group
        prefilling = request in self.prefilling[d]
        if prefilling:
            self.prefilling[d].remove(request)
            cached = 0
        else:
            request.generated += self._decoded(request, d)
            cached = self._leave(request, d)
            if int(self.step_D[d]) > request.join_step:
                request.last_token_ns = int(self._decoded_ns_D[d])
        del self.running[d][request.number]
        request.epoch += 1
        request.preemptions += 1
        inst.preempted(request, cached, prefilling)

    def evict(self, d: int) -> None:
        """All requests of a lost group, as they would be after a preemption."""
        for request in list(self.running[d].values()):
            self.preempt(request)
        self._heaps[d].clear()
        self.finish_D[d] = _FAR

    # ------------------------------------------------------------------ after a step

    def _complete(self, step: _Step) -> None:
        inst, now = self.inst, int(self.inst.clock.now)
        decoding_D = step.decoding_D
        taken_D = self._taken_D(decoding_D)
        self.step_D += decoding_D
        self.cached_D += taken_D
        inst.stats.brought(int(taken_D.sum()), int(self.decodes_D @ decoding_D))
        self._between_tokens(decoding_D, now)
        for d in np.flatnonzero(self.step_D >= self.finish_D).tolist():
            heap, reached = self._heaps[d], int(self.step_D[d])
            while heap and heap[0][0] <= reached:
                _, _, epoch, request = heappop(heap)
                if epoch == request.epoch:
                    self._leave(request, d)
                    request.generated = request.output
                    self._finish(request, d, now)
            self.finish_D[d] = heap[0][0] if heap else _FAR
        for request, epoch, tokens in step.chunks:
            if epoch == request.epoch:
                request.to_prefill -= tokens
                inst.stats.prefilled += tokens
                if request.to_prefill == 0:
                    self._prefilled(request, now)

    def _between_tokens(self, decoding_D: Any, now: int) -> None:
        """Note the gap before the tokens that each sequence has of this step."""
        stats = self.inst.stats
        old_D = (self.decodes_D - self._fresh_D) * decoding_D
        gaps_D = now - self._decoded_ns_D
        for d in [d for d in self._fresh if decoding_D[d]]:
            for last in self._fresh.pop(d):
                stats.gap(now - last, 1)
            self._fresh_D[d] = 0
        if old_D.any():
            if self.inst.spec.chunked_prefill:  # every group decodes in every step: they share one gap
                stats.gap(int(gaps_D[old_D.argmax()]), int(old_D.sum()))
            else:
                for d in np.flatnonzero(old_D).tolist():
                    stats.gap(int(gaps_D[d]), int(old_D[d]))
        self._decoded_ns_D[decoding_D] = now

    def _prefilled(self, request: Request, now: int) -> None:
        """The prompt is in the cache and its next token is out; a prefill pool's is sent once decoding has a place."""
        inst, d = self.inst, request.group
        self.prefilling[d].remove(request)
        if request.generated:  # computed again after a preemption
            inst.stats.gap(now - request.last_token_ns, 1)
        request.generated += 1
        request.last_token_ns = now
        inst.stats.generated += 1
        inst.prompt_done(request)
        done = request.generated >= request.output
        if done or inst.role != "prefill":
            inst.first_token(request)
        if done:
            self._finish(request, d, now)
        elif inst.role == "prefill":
            del self.running[d][request.number]
            inst.hand_over(request)
        else:
            self._join(request, d)

    def _finish(self, request: Request, d: int, now: int) -> None:
        del self.running[d][request.number]
        request.finish_ns = request.last_token_ns = now
        inst = self.inst
        inst.release(request, request.context - 1)
        inst.finished(request)
