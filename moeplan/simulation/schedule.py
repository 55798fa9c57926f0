"""Pipeline schedules: what each stage does in which order, and when.

``1f1b`` (Narayanan et al. 2019, PipeDream-Flush) and its interleaved form (Narayanan et al. 2021, arXiv 2104.04473,
figure 4): stage ``s`` of ``p`` runs some forwards ahead, then one forward and one backward in turn, then the rest.
With ``v`` chunks per stage, chunk ``c`` of stage ``s`` is virtual stage ``c p + s`` of ``p v``; micro-batches go by
groups of ``p`` through all chunks.

``p`` stages, ``v`` chunks per stage, ``m`` micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from moeplan.errors import SpecError

__all__ = ["Op", "Timed", "one_forward_one_backward", "run_schedule"]


@dataclass(frozen=True, slots=True)
class Op:
    """Forward or backward of one micro-batch on one chunk of a stage."""

    kind: Literal["forward", "backward"]
    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Timed:
    """An operation with its stage and its place in time."""

    op: Op
    stage: int
    start_s: float
    end_s: float


@lru_cache(maxsize=16)
def one_forward_one_backward(stages: int, micro_batches: int, chunks: int = 1) -> tuple[tuple[Op, ...], ...]:
    """Order of operations of each stage.

    Raises:
        SpecError: several chunks, and ``m`` is not a multiple of ``p``.
    """
    p, m, v = stages, micro_batches, chunks
    if v > 1 and m % p:
        raise SpecError(f"the interleaved schedule needs micro-batches ({m}) in multiples of stages ({p})")
    total = m * v

    def op(kind: Literal["forward", "backward"], number: int) -> Op:
        if v == 1:
            return Op(kind, number, 0)
        group, inside = divmod(number, p * v)
        chunk = inside // p
        return Op(kind, group * p + inside % p, chunk if kind == "forward" else v - 1 - chunk)

    orders = []
    for stage in range(p):
        ahead = p - stage - 1 if v == 1 else (p - stage - 1) * 2 + (v - 1) * p
        ahead = min(ahead, total)
        order = [op("forward", i) for i in range(ahead)]
        for i in range(total - ahead):
            order += [op("forward", ahead + i), op("backward", i)]
        order += [op("backward", i) for i in range(total - ahead, total)]
        orders.append(tuple(order))
    return tuple(orders)


def run_schedule(
    orders: Sequence[Sequence[Op]],
    seconds: Callable[[int, Op], float],
    transfer_s: Callable[[int, Op], float],
    chunks: int = 1,
) -> list[Timed]:
    """Earliest times when each stage keeps its order and waits for what it needs.

    ``seconds(stage, op)`` is an operation's duration, ``transfer_s(stage, op)`` that of sending its result to the
    stage that goes on; sending does not hold the sender up. By start, then stage.

    Raises:
        SpecError: the orders wait for each other.
    """
    p = len(orders)
    last = p * chunks - 1
    ends: dict[tuple[str, int, int], float] = {}  # kind, micro-batch, virtual stage -> result is where it is needed
    free, place = [0.0] * p, [0] * p
    done: list[Timed] = []
    left = sum(len(order) for order in orders)
    while left:
        before = left
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                op = order[place[stage]]
                here = op.chunk * p + stage
                if op.kind == "forward":
                    needs = [] if here == 0 else [("forward", op.micro_batch, here - 1)]
                else:
                    needs = [("forward", op.micro_batch, last)] if here == last else []
                    needs += [] if here == last else [("backward", op.micro_batch, here + 1)]
                if any(need not in ends for need in needs):
                    break
                start = max([free[stage], *(ends[need] for need in needs)])
                end = start + seconds(stage, op)
                sends = here != last if op.kind == "forward" else here != 0
                ends[op.kind, op.micro_batch, here] = end + (transfer_s(stage, op) if sends else 0.0)
                free[stage] = end
                done.append(Timed(op, stage, start, end))
                place[stage] += 1
                left -= 1
        if left == before:
            waiting = next(stage for stage in range(p) if place[stage] < len(orders[stage]))
            raise SpecError(f"the schedule stops: stage {waiting} waits for what comes after it")
    return sorted(done, key=lambda timed: (timed.start_s, timed.stage))
